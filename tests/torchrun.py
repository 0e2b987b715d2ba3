"""Several processes of one script on the CPU, as torchrun starts them."""

import os
import subprocess
import sys

import torch
from tiny import ROOT

HERE = ROOT / "tests"


def launched(script, folder, *arguments, processes=2, **environment):
    """What each process of a script saved, which torchrun started on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [*command, str(HERE / script), str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | own | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(processes)]
