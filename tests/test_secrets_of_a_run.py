"""A secret planted wherever one can be given occurs in nothing that a run writes, sends or prints."""

import base64
import json
import os
import subprocess
import sys

import pytest
import tiny
from hub_stub import HubStub
from loopback import serving
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from trl_tafs.cli.main import main

CANARY = "canary-8b1f7d"
HUB_TOKEN = "hf_" + "canarytoken" * 3
REWARD = """
class Keyed:
    def __init__(self, api_key):
        self.api_key, self.calls = api_key, 0

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        if self.calls == 2:  # once in training: retried with a warning
            raise RuntimeError(f"the key {self.api_key} is refused")
        return images.mean((1, 2, 3))


class Failing(Keyed):
    def __call__(self, images, prompts, metadata):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError(f"the key {self.api_key} is refused")
        return images.mean((1, 2, 3))
"""
RUN = """
import sys
from trl_tafs.cli.main import main

sys.exit(main(sys.argv[1:]))
"""


def judge():
    """A served reward behind a password; it tells what it was sent."""

    async def answer(request):
        sent = request.headers.get("authorization", "")
        wanted = "Basic " + base64.b64encode(f"alice:{CANARY}".encode()).decode()
        if sent != wanted:
            return JSONResponse({"error": f"no such user: {sent}"}, 401)
        if request.method == "GET":
            return JSONResponse({"name": "judge"})
        return JSONResponse({"rewards": [0.5] * len((await request.json())["prompts"])})

    return Starlette(routes=[Route("/health", answer), Route("/score", answer, methods=["POST"])])


def written(folder):
    """All bytes of all files below a folder, with their names."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert files
    return b"".join(str(path).encode() + path.read_bytes() for path in files)


def options(folder, model, url):
    """A run with a canary in the password of an address, in trackers', Accelerate's and a reward's options."""
    (folder / "keyed.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("one\ntwo\n")
    return {
        "pretrained_model": str(model),
        "prompts": str(folder / "prompts.txt"),
        "reward": [f"{url.replace('://', f'://alice:{CANARY}@')}=0.5", f"{folder / 'keyed.py'}:Keyed=1.0"],
        "reward_options": {"Keyed": {"api_key": CANARY}},
        "reward_retry_delay": 0.0,
        "log_with": "tensorboard",
        "tracker_kwargs": {"tensorboard": {}, "wandb": {"settings": {"api_key": CANARY}, "notes": f"is {CANARY}"}},
        "mixed_precision": "no",
        "run_name": "run",
        "num_epochs": 1,
        "sample_batch_size": 4,
        "sample_num_batches_per_epoch": 2,
        "train_batch_size": 4,
        "disable_tqdm": True,
    }


def test_a_published_run_has_no_secret_in_it(pipeline_folder, tmp_path):
    run = tmp_path / "runs"
    with HubStub(tokens={HUB_TOKEN: "user"}) as stub, serving(judge()) as url:
        given = options(tmp_path, pipeline_folder, url)
        given |= {"logdir": str(run), "push_to_hub": True, "hub_model_id": "secretive"}
        (tmp_path / "config.yaml").write_text(json.dumps(given))
        environment = os.environ | stub.environment(tmp_path / "home", token=HUB_TOKEN)
        environment |= {"PYTHONPATH": f"{tiny.ROOT}{os.pathsep}{tiny.ROOT / 'tests'}", "ACCELERATE_USE_CPU": "1"}
        command = [sys.executable, "-c", RUN, "train", "--config", str(tmp_path / "config.yaml")]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "reward 'Keyed' raised RuntimeError: the key [removed] is refused; it is retried" in done.stderr
    files = stub.files("user/secretive")
    everything = {
        "files": written(run),
        "sent": b"".join([*stub.received, *files.values(), *map(str.encode, files)]),
        "printed": (done.stdout + done.stderr).encode(),
    }
    secrets = [CANARY, HUB_TOKEN, base64.b64encode(f"alice:{CANARY}".encode()).decode()]
    assert not [(place, secret) for place, text in everything.items() for secret in secrets if secret.encode() in text]
    assert b"127.0.0.1" in everything["files"] and b"events.out" in everything["files"], "there is a log to look into"
    assert b"[removed]" in everything["files"] and b"Keyed" in everything["sent"]


def test_errors_and_kept_rollouts_have_no_secret_in_them(pipeline_folder, tmp_path, capsys, recwarn):
    with serving(judge()) as url:
        given = options(tmp_path, pipeline_folder, url) | {"logdir": str(tmp_path / "runs"), "reward_max_retries": 1}
        given |= {"reward": [given["reward"][0], f"{tmp_path / 'keyed.py'}:Failing"], "log_with": None}
        given |= {"reward_options": {"Failing": {"api_key": CANARY}}}
        (tmp_path / "config.yaml").write_text(json.dumps(given))
        assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 1
        wrong = url.replace("://", f"://bob:{CANARY}@")
        for reward in (wrong, f"{wrong}=high", f"{wrong}/%zz?x", f"http://{CANARY}@[::1"):
            command = ["train", "--prompts", given["prompts"], "--reward", reward]
            assert main(command) == 1
    assert main(["train", "--tracker_kwargs", f'{{"wandb": {{"api_key": "{CANARY}"']) == 1
    assert main(["train", "--reward_options", f'{{"Keyed": {{"api_key": "{CANARY}", "api_key": 1}}}}']) == 1
    assert main(["train", f"--hub_tokens={CANARY}"]) == 2
    said = capsys.readouterr()
    assert "the key [removed] is refused" in said.err and "no reward server answers" in said.err
    printed = said.out + said.err + "".join(str(warning.message) for warning in recwarn)
    assert CANARY not in printed
    assert CANARY.encode() not in written(tmp_path / "runs")


def test_an_evaluation_and_names_of_rewards_have_no_secret_in_them(pipeline, pipeline_folder, tmp_path):
    (tmp_path / "keyed.py").write_text(REWARD.replace("self.calls == 2", "False"))
    (tmp_path / "prompts.txt").write_text("one\n")
    command = ["evaluate", "none", "--pretrained_model", str(pipeline_folder), "--dtype", "float32", "--num_steps", "2"]
    command += [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--reward",
        f"{tmp_path / 'keyed.py'}:Keyed",
        "--sampler",
        "ode",
    ]
    command += ["--reward_options", json.dumps({"Keyed": {"api_key": CANARY}}), "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0 and main(command) == 0, "what is recorded is what is compared"
    assert CANARY.encode() not in written(tmp_path / "out")
    rewards = {f"http://alice:{CANARY}@host": tiny.brightness}
    trainer = tiny.trainer(pipeline, tmp_path / "run", reward=rewards, num_epochs=1)
    trainer.train()
    assert trainer.rewards.names == ("http://host",) and CANARY.encode() not in written(tmp_path / "run")
    both = {f"http://{user}:{CANARY}@host": tiny.brightness for user in "ab"}
    with pytest.raises(ValueError, match="two rewards have one name once what is secret is left out: http://host"):
        tiny.trainer(pipeline, tmp_path / "both", reward=both)
