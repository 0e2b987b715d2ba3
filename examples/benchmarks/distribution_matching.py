"""Distribution matching beside the reward, on digits: from the base, and from a start that is few-step already.

    python examples/benchmarks/distribution_matching.py settings   # one seed of each setting, by noise of its own
    python examples/benchmarks/distribution_matching.py            # three seeds of what won, and docs/

From the base: 16 CPU seconds of one thread, in epochs by what an epoch takes, measured before. The few-step start is
built here, by distribution matching alone (a reward that is the same for every image); then 20 CPU seconds with the
reward, judged on the way. Judged at 4 annealed steps, one evaluation each.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_run import make_trainer, train_epoch
from tasks import Digits
from torch import Tensor

from trl_tafs.evaluation.drawing import Drawer, DrawSpec
from trl_tafs.prompts.encoder import PromptEncoder

ROOT = Path(__file__).resolve().parents[2]
SECONDS, START_SECONDS, AFTER_SECONDS, POINTS = 16.0, 40.0, 20.0, 5
CHOOSING, REPORTING = 2000, 1000  # seeds of the noise that settings are chosen by, and that is reported
COLUMNS = ("reward", "held_out", "ocr", "fidelity", "diversity", "saturated")


def judged(task: Digits, pipeline: Any, seed: int, steps: int = 4, guidance: float = 1.0) -> dict[str, float]:
    """All judges on 300 images of annealed sampling, and the share of pixels that are black or white to the end."""
    device, length = torch.device("cpu"), task.options["max_sequence_length"]
    encode = PromptEncoder(pipeline, device, guidance_scale=guidance, max_sequence_length=length)
    drawer = Drawer(pipeline, encode, pipeline.velocity, 100, seed, device, torch.float32)
    spec = DrawSpec("annealed", steps, task.height, task.width, guidance)
    images = drawer.images(spec, task.prompts, range(len(task.prompts)))
    values = task.judge(images) | {"saturated": ((images <= 0.005) | (images >= 0.995)).float().mean().item()}
    return {name: round(values[name], 4) for name in COLUMNS}


def nothing(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """A reward that is the same for every image: no advantage, so that distribution matching is alone."""
    return torch.zeros(len(images))


class Alone(Digits):
    """Digits without a reward."""

    def rewards(self) -> dict[str, Any]:
        """One that teaches nothing."""
        return {"nothing": nothing}


class Fused(Digits):
    """Digits on a base that is few-step already: a LoRA is fused into it, and nothing else of it is known."""

    folder: str

    def pipeline(self) -> Any:
        """The base with the start's LoRA in its weights."""
        pipeline = super().pipeline()
        pipeline.load_lora_weights(self.folder)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        return pipeline


def method(preset: str, rate: float, **options: Any) -> dict[str, Any]:
    """One method, as `bench_run` takes it."""
    return {"preset": preset, "rate": rate, "options": options}


def seconds_an_epoch(task: Digits, method: dict[str, Any], epochs: int = 5) -> float:
    """CPU seconds of one thread: the least of a few epochs, after one that warms up."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, times = make_trainer(task, method, 0, folder), []
        for _ in range(epochs + 1):
            start = time.process_time()
            train_epoch(trainer)
            times.append(time.process_time() - start)
    return min(times[1:])


def train(
    task: Digits,
    method: dict[str, Any],
    seed: int,
    seconds: float,
    points: int,
    noise: int,
    keep: Callable[[Any], None] = lambda trainer: None,
    epochs: int = 0,
) -> dict[str, Any]:
    """Train for as many epochs as `seconds` are, and judge at so many points on the way, before the first too."""
    each = 0.0 if epochs else seconds_an_epoch(task, method)
    epochs = epochs or max(points, round(seconds / each))
    with tempfile.TemporaryDirectory() as folder:
        trainer, start = make_trainer(task, method, seed, folder), time.process_time()
        curve = [{"epochs": 0} | judged(task, trainer.sd_pipeline, noise)]
        looks = {round(epochs * k / points) for k in range(1, points + 1)}
        for epoch in range(1, epochs + 1):
            train_epoch(trainer)
            if epoch in looks:
                curve.append({"epochs": epoch} | judged(task, trainer.sd_pipeline, noise))
        keep(trainer)
    facts = {"seconds_an_epoch": round(each, 3), "seconds": round(time.process_time() - start, 1)}
    return {"method": method, "seed": seed, "epochs": epochs, **facts, "curve": curve}


DM = {"dm_rows": "final", "dm_guidance_scale": 3.0}
# From the base: what distribution matching joins, and what it joins it for.
METHODS: dict[str, dict[str, Any]] = {
    "tafs": method("tafs", 3e-3),
    "tafs_dm": method("tafs_dm", 3e-3),
}
# Of one seed, by noise of their own: each differs from the first in what its name says.
SETTINGS: dict[str, dict[str, Any]] = {
    "preset tafs_dm": method("tafs_dm", 3e-3),
    "guidance 1": method("tafs_dm", 3e-3, dm_guidance_scale=1.0),
    "guidance 2": method("tafs_dm", 3e-3, dm_guidance_scale=2.0),
    "guidance 4": method("tafs_dm", 3e-3, dm_guidance_scale=4.0),
    "weight .25": method("tafs_dm", 3e-3, dm_weight=0.25),
    "weight .5": method("tafs_dm", 3e-3, dm_weight=0.5),
    "weight 2": method("tafs_dm", 3e-3, dm_weight=2.0),
    "2 fake updates": method("tafs_dm", 3e-3, dm_fake_updates=2),
    "5 fake updates": method("tafs_dm", 3e-3, dm_fake_updates=5),
    "fake rate 1e-2": method("tafs_dm", 3e-3, dm_fake_learning_rate=1e-2),
    "trained rows": method("tafs_dm", 3e-3, dm_rows="trained"),
    "levels shifted by 3": method("tafs_dm", 3e-3, dm_level_shift=3.0),
    "no KL": method("tafs_dm", 3e-3, beta=0.0),
    "two optimizer steps an epoch": method("tafs_dm", 3e-3, train_batch_size=96, train_gradient_accumulation_steps=1),
    "on the annealed action (tafs)": method("tafs", 3e-3, dm_weight=1.0, **DM),
    "on DiffusionNFT's objective (tafs_nft)": method("tafs_nft", 3e-3, dm_weight=1.0, **DM),
    "rate 1e-3": method("tafs_dm", 1e-3),
    "rate 1e-2": method("tafs_dm", 1e-2),
}
START = method("tafs_dm", 3e-3, beta=0.0)


def few_step_start(seed: int, folder: Path, noise: int, epochs: int = 0) -> dict[str, Any]:
    """Distil the base by distribution matching alone, and save the LoRA into `folder`."""

    def keep(trainer: Any) -> None:
        trainer.policy.publish(folder)

    return train(Alone(), START, seed, START_SECONDS, 1, noise, keep, epochs)


def after_a_start(
    kind: str, method: dict[str, Any], seed: int, folder: Path, noise: int, epochs: int = 0
) -> dict[str, Any]:
    """Train on from a few-step start: "continued", its LoRA on the base; or "fused", a base that is few-step already."""
    task = Digits() if kind == "continued" else Fused()
    if kind == "continued":
        method = method | {"options": method["options"] | {"adapter_name_or_path": str(folder)}}
    else:
        task.folder = str(folder)
    return train(task, method, seed, AFTER_SECONDS, POINTS, noise, epochs=epochs)
