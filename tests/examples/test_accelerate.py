"""Every configuration for `accelerate launch`, and the SLURM script, started on the CPU with as many processes."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import yaml
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = tiny.ROOT / "examples" / "accelerate"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
PROCESSES = {"one_gpu.yaml": 1, "cpu.yaml": 1, "eight_gpus.yaml": 8, "fsdp2.yaml": 8, "eight_machines.yaml": 64}
RUN = [
    *("--config", "examples/configs/digits.yaml", "--num_epochs", "1", "--sample_batch_size", "4"),
    *("--sample_num_batches_per_epoch", "2", "--num_generations", "8", "--train_batch_size", "4", "--eval_freq", "0"),
]
ON_CPU = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)}


def started(command, **environment):
    """What a command wrote to its output, at the root of the project."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FSDP_", "ACCELERATE_"))}
    done = subprocess.run(
        command, cwd=tiny.ROOT, capture_output=True, text=True, env=own | ON_CPU | environment, timeout=900
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def assert_trained(output, processes, folder):
    """One run of that many processes: the plan says so, and there is one log of one epoch's images."""
    spread = f" on {processes} processes" if processes > 1 else ""
    assert f"{8 * processes} images{spread}: {processes} prompt" in output
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 1
    assert (folder / "adapter" / "pytorch_lora_weights.safetensors").is_file()


def test_the_configurations_are_those_that_are_named():
    assert set(FILES) == set(PROCESSES)
    for name, processes in PROCESSES.items():
        config = load_config_from_file(str(FOLDER / name))
        assert config.num_processes == processes and config.mixed_precision == "no", "the run's configuration says it"
        assert f"--config_file examples/accelerate/{name}" in (FOLDER / name).read_text()
    assert yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())["fsdp_config"]["fsdp_version"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_configuration_starts_with_two_processes_where_it_has_several(name, tmp_path):
    processes = min(2, PROCESSES[name])
    fewer = ["--num_processes", str(processes)]
    if name == "eight_machines.yaml":
        fewer += ["--num_machines", "1", "--machine_rank", "0", "--main_process_ip", "127.0.0.1"]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(FOLDER / name)]
    command = [*launch, *fewer, "examples/train.py", *RUN, "--logdir", str(tmp_path), "--run_name", "run"]
    output = started(command)
    assert_trained(output, processes, tmp_path / "run")
    assert ("FSDP2: the denoiser lies in shards on 2 processes" in output) == (name == "fsdp2.yaml")


SRUN = """#!{python}
import os, subprocess, sys
command = [word for word in sys.argv[1:]]
while command[0].startswith("--"):
    command.pop(0)
count = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(count)
]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["", "1"])
def test_the_slurm_script_starts_a_task_a_gpu_and_resumes(shard, tmp_path):
    """With a stand-in for `srun` that starts the tasks here, as SLURM would on its machines."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN.format(python=sys.executable))
    (tools / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\n")
    for tool in ("srun", "scontrol"):
        (tools / tool).chmod(0o755)
    job = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here", "SHARD": shard}
    job |= {"PATH": f"{tools}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    command = ["bash", str(FOLDER / "slurm.sh"), *RUN, "--logdir", str(tmp_path), "--run_name", "run"]
    output = started(command, **job)
    assert_trained(output, 2, tmp_path / "run")
    assert ("FSDP2: the denoiser lies in shards on 2 processes" in output) == bool(shard)
    assert "resumed from" in started(command, **job), "once it is back from the queue"
