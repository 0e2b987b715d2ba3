"""Do wheel and sdist work where they are alone? Build them, install each into a new environment, use it from there.

    python tests/wheel/run.py [--dist FOLDER] [--keep FOLDER]

Asks the package index for the wheel's dependencies (gigabytes with torch; uv, where it is, takes them from its cache).
Which releases: by pip's and uv's own variables, PIP_CONSTRAINT and UV_CONSTRAINT. No extras are installed but [server],
before the last steps. The prompt sets come from this machine, so that nothing else is fetched.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from hub_stub import HubStub  # noqa: E402

BUILT_FROM = ("trl_tafs", "examples/digits", "tests", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in")
BUILT_FROM += ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md")
QUICK = ("quickstart", "--epochs", "1", "--images_per_digit", "2", "--output_dir", "quick")
UNKEPT = shutil.ignore_patterns("__pycache__", "runs", "logs")
GENEVAL = "djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
PARTI = b"Prompt\tCategory\tChallenge\tNote\na cat, asleep\tAnimals\tBasic\t\nthe digit two\tSigns\tBasic\t\n"
TRAINING = ["--mixed_precision", "no", "--num_epochs", "1", "--sample_batch_size", "4", "--num_generations", "4"]
TRAINING += ["--sample_num_batches_per_epoch", "2", "--train_batch_size", "4", "--logdir", "runs"]


class Failed(Exception):
    """A step didn't do what it should."""


class Environment:
    """A new virtual environment, and the folder outside the checkout that its commands are run in."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        folder.mkdir()
        uv = Path(sys.executable).with_name("uv")
        self.uv = str(uv) if uv.exists() else shutil.which("uv")
        self.bin, self.work = folder / "venv" / "bin", folder / "work"
        self.work.mkdir()
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.environ = kept | settings | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "MPLBACKEND": "agg"}
        make = [self.uv, "venv", "--quiet", "--python", sys.executable] if self.uv else [sys.executable, "-m", "venv"]
        self.call(*make, folder / "venv")

    def call(self, *command: Any) -> str:
        """What a command prints; Failed, with the end of it, if it fails."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run([*map(str, command)], cwd=self.work, env=self.environ, **options)
        if done.returncode:
            raise Failed(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}")
        return done.stdout

    def install(self, what: str) -> None:
        """By uv where it is, else by pip."""
        pip = [self.uv, "pip", "install", "--compile-bytecode", "--python", self.bin / "python"]
        self.call(*(pip if self.uv else [self.bin / "python", "-m", "pip", "install"]), what)

    def trl_tafs(self, *arguments: Any) -> str:
        """What the installed command prints."""
        return self.call(self.bin / "trl-tafs", *arguments)


def check(condition: bool, what: str) -> None:
    """Raise Failed unless it is so."""
    if not condition:
        raise Failed(what)


def build(folder: Path) -> Path:
    """A folder with the sdist of the present tree, whose own folder stays as it is, and the wheel that it makes."""
    source, dist = folder / "source", folder / "dist"
    for name in BUILT_FROM:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy = partial(shutil.copytree, ignore=UNKEPT) if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    uv = Path(sys.executable).with_name("uv")
    if uv.exists():  # the sdist, and the wheel from it
        subprocess.run([str(uv), "build", "--quiet", "--out-dir", str(dist), str(source)], check=True)
        return dist
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(dist)!r})"
    dist.mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, stdout=subprocess.DEVNULL)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(dist)]
    subprocess.run([*pip, str(next(dist.glob("*.tar.gz")))], check=True)
    return dist


def contents(dist: Path) -> tuple[Path, Path, str]:
    """The wheel and the sdist of a folder, which must have one of each, with what they need and nothing else."""
    wheels, sdists = list(dist.glob("*.whl")), list(dist.glob("*.tar.gz"))
    check((len(wheels), len(sdists)) == (1, 1), f"{dist} has {len(wheels)} wheels and {len(sdists)} sdists")
    with zipfile.ZipFile(wheels[0]) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdists[0]) as archive:
        files = {item.name.partition("/")[2] for item in archive.getmembers() if item.isfile()}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trl_tafs").rglob("*") if path.is_file()}
    here = {name for name in here if "__pycache__" not in name and not name.startswith("trl_tafs/embedded/")}
    own = {name for name in packed if not name.startswith("trl_tafs/embedded/")}
    check(own == here, f"the wheel and the tree differ in {sorted(own ^ here)}")
    check("trl_tafs/embedded/digits/quickstart.py" in packed, "the wheel has no digits example")
    check(here <= files, f"the sdist lacks {sorted(here - files)}")
    needed = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "setup.py", "pyproject.toml"}
    check(needed <= files, f"the sdist lacks {sorted(needed - files)}")
    check(not [name for name in files if name.startswith(("tests/", "runs/", "logs/"))], "the sdist has tests or runs")
    return wheels[0], sdists[0], f"{len(packed)} files in the wheel, {len(files)} in the sdist"


def quickstart(env: Environment) -> str:
    """The embedded example, an epoch of it, without what the extra brings."""
    told = env.trl_tafs(*QUICK)
    check("bit-equal to the trained policy" in told, f"quickstart ended with {told[-500:]}")
    summary = json.loads((env.work / "quick" / "summary.json").read_text())
    check(summary["epochs"] == 1 and (env.work / "quick" / "grid_after.png").is_file(), "quickstart left no pictures")
    return str({name: row["annealed"]["4"]["reward"] for name, row in summary.items() if name in ("before", "after")})


def installed(env: Environment, wheel: Path) -> str:
    """The wheel, or the sdist, and what it requires."""
    env.install(str(wheel))
    where = env.call(env.bin / "python", "-c", "import trl_tafs; print(trl_tafs.__file__)").strip()
    check(where.startswith(str(env.bin.parent)), f"trl_tafs is imported from {where}")
    check("diffusers" in env.trl_tafs("env"), "`trl-tafs env` names no diffusers")
    return where


def train(env: Environment, reward: str, name: str) -> str:
    """An epoch on a named set from GitHub's stand-in; the adapter is written."""
    options = ["--pretrained_model", env.work / "pipeline", "--prompts", "geneval", "--reward", reward]
    env.trl_tafs("train", *options, *TRAINING, "--run_name", name)
    check((env.work / "runs" / name / "adapter" / "pytorch_lora_weights.safetensors").is_file(), "no adapter")
    return f"runs/{name}/adapter"


def evaluate(env: Environment, adapter: str, reward: str) -> dict[str, float]:
    """Base and adapter by a reward, on a named set from the Hub's stand-in."""
    options = ["--pretrained_model", env.work / "pipeline", "--dtype", "float32", "--prompts", "parti"]
    env.trl_tafs("evaluate", "none", adapter, *options, "--reward", reward, "--size", "8x8")
    with (env.work / "evaluation" / "results.csv").open() as file:
        found = {row["model"]: float(row[reward]) for row in csv.DictReader(file)}
    check(len(found) == 2, f"the table has no two models: {found}")
    return found


def sample(env: Environment, adapter: str) -> str:
    """Two images side by side."""
    model = ["--pretrained_model", env.work / "pipeline", "--dtype", "float32"]
    env.trl_tafs("sample", adapter, *model, "--prompt", "one", "two", "--output", "two.png")
    check((env.work / "two.png").read_bytes().startswith(b"\x89PNG"), "no picture")
    return "two.png"


def serve(env: Environment, wheel: Path) -> tuple[subprocess.Popen, str]:
    """A reward server, which needs [server], once it answers; and its address."""
    env.install(f"{wheel}[server]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(env.bin / "trl-tafs"), "serve-reward", "jpeg_compressibility", "--port", str(port)]
    process = subprocess.Popen(command, cwd=env.work, env=env.environ, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"http://127.0.0.1:{port}"
        time.sleep(0.2)
    raise Failed(f"serve-reward ended with {process.returncode}")


def steps(folder: Path, hub: HubStub, mirror: str, dist: Path | None) -> None:
    """Each step in turn, with what it found and its seconds."""
    start = time.monotonic()

    def told(step: str, found: Any) -> Any:
        nonlocal start
        print(f"ok  {step} ({time.monotonic() - start:.0f} s): {found}", flush=True)
        start = time.monotonic()
        return found

    if dist is None:
        dist = told("build", build(folder))
    wheel, sdist, counted = contents(dist)
    told("contents", counted)
    settings = hub.environment(folder / "home") | {"TRL_TAFS_PROMPT_SETS": mirror}
    env = Environment(folder / "of-wheel", settings)
    shutil.copytree(ROOT / "examples" / "digits" / "pipeline", env.work / "pipeline")
    told("install and env", installed(env, wheel))
    told("quickstart", quickstart(env))
    adapter = told("train on the prompt set geneval", train(env, "jpeg_compressibility", "own"))
    told("evaluate on the prompt set parti", evaluate(env, adapter, "jpeg_compressibility"))
    told("sample", sample(env, adapter))
    server, url = serve(env, wheel)
    try:
        told("serve-reward, with [server]", url)
        told("train by the remote reward", train(env, url, "remote"))
    finally:
        server.terminate()
        server.wait()
    logs = [(env.work / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in ("own", "remote")]
    curves = [[v for line in map(json.loads, log) for k, v in line.items() if k == "reward"] for log in logs]
    check(curves[0] == curves[1] != [], f"rewards here and from the server differ: {curves}")
    told("the same rewards", curves[0])
    other = Environment(folder / "of-sdist", settings)
    told("install the sdist, and env", installed(other, sdist))
    told("quickstart of the sdist", quickstart(other))


def main() -> int:
    """Run the steps; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a new folder for all of it, kept; by default one that is removed")
    parser.add_argument("--dist", type=Path, help="a folder with a wheel and an sdist; by default they are built")
    args = parser.parse_args()
    keep = args.keep
    folder = Path(tempfile.mkdtemp(prefix="wheel-")) if keep is None else keep.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mirror" / GENEVAL).parent.mkdir(parents=True)
    (folder / "mirror" / GENEVAL).write_text('{"prompt": "a photo of a seven", "tag": "single_object"}\n')

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder / "mirror"))

        def log_message(self, *args: Any) -> None:
            pass

    try:
        with HubStub({}) as hub, ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as mirror:
            hub.commit("nateraw/parti-prompts", "main", {"PartiPrompts.tsv": PARTI})
            threading.Thread(target=mirror.serve_forever, daemon=True).start()
            try:
                steps(folder, hub, f"http://127.0.0.1:{mirror.server_port}", args.dist and args.dist.resolve())
            finally:
                mirror.shutdown()
    except Failed as fault:
        print(f"FAILED: {fault}", flush=True)
        return 1
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print("wheel and sdist work on their own", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
