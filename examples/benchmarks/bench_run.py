"""One run of the benchmark: a method, a task, a seed, a learning rate; told as a plain dictionary."""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState
from tasks import CHOICE_NOISE, TASKS, Task

from trl_tafs import TAFSGRPOConfig, TAFSGRPOTrainer
from trl_tafs.method.kernels import Annealed
from trl_tafs.method.noise import SampleNoise
from trl_tafs.method.rollout import sample_steps
from trl_tafs.presets import preset
from trl_tafs.prompts.encoder import PromptEncoder

SAMPLERS = ("annealed", "ode")
EVALUATED = {f"{sampler} {steps}": (sampler, steps) for steps in (2, 4, 8) for sampler in SAMPLERS}
STEP_COUNTS = (1, 2, 3, 4, 5, 6, 8)


class Evaluations:
    """Counts what training asks for, in images: of the denoiser by phase (`rollout`, `policy` with gradient, `other`).

    And `decodes`, images that the VAE decodes.
    """

    def __init__(self, trainer: TAFSGRPOTrainer) -> None:
        """Listen to the trainer's denoiser; nothing is counted outside of `training`."""
        self.counts: Counter[str] = Counter()
        self.phase: str | None = None
        trainer.sd_pipeline.denoiser.register_forward_pre_hook(self._count, with_kwargs=True)
        collect = trainer.collector.collect

        def collecting(*args: Any, **kwargs: Any) -> Any:
            self.phase = "rollout"
            try:
                return collect(*args, **kwargs)
            finally:
                self.phase = "other"

        trainer.collector.collect = collecting
        trainer.sd_pipeline.vae.decoder.register_forward_pre_hook(self._decode)

    def _decode(self, module: torch.nn.Module, args: tuple) -> None:
        if self.phase is not None:
            self.counts["decodes"] += len(args[0])

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.phase is not None:
            self.counts["policy" if torch.is_grad_enabled() else self.phase] += len(kwargs["hidden_states"])

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count inside."""
        self.phase = "other"
        yield
        self.phase = None

    @property
    def total(self) -> int:
        """Of the denoiser, all phases."""
        return sum(self.counts.values()) - self.counts["decodes"]


def make_trainer(task: Task, method: dict[str, Any], seed: int, folder: str) -> TAFSGRPOTrainer:
    """A trainer of one method, without guidance and in groups of the task's size, as all methods here."""
    settings = preset(method["preset"]) | {"sample_guidance_scale": 1.0, "train_cfg": False} | task.options
    settings |= {"train_learning_rate": method["rate"]} | method["options"]
    if updates := settings.get("train_updates_per_epoch"):
        settings["train_batch_size"] //= updates  # a task's minibatch is an epoch
    gc.collect()  # an earlier trainer: its parts know each other
    AcceleratorState._reset_state(reset_partial_state=True)
    config = TAFSGRPOConfig(
        exp_name="bench",
        seed=seed,
        project_kwargs={"project_dir": folder},
        mixed_precision="no",
        height=task.height,
        width=task.width,
        disable_tqdm=True,
        sample_grid_freq=0,
        picture_freq=0,
        **settings,
    )
    return TAFSGRPOTrainer(config, task.rewards(), task.train_prompts, task.pipeline())


def epoch_seconds(task_name: str, methods: dict[str, dict], rounds: int = 3, epochs: int = 1) -> dict[str, Any]:
    """What an epoch of each method takes, in CPU seconds of one thread: `seconds`.

    The least of `rounds` times `epochs`; each round goes through all methods, so that a slow minute of the machine
    isn't one method's. An epoch before those warms up.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task, least = TASKS[task_name](), dict.fromkeys(methods, float("inf"))
    for name in [*methods] * rounds:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(task, {"rate": 1e-5} | methods[name], 0, folder)
            train_epoch(trainer)
            for _ in range(epochs):
                start = time.process_time()
                train_epoch(trainer)
                least[name] = min(least[name], time.process_time() - start)
    return {"seconds": {name: round(value, 3) for name, value in least.items()}}


def train_epoch(trainer: TAFSGRPOTrainer) -> None:
    """One epoch, without evaluation, files or logs."""
    trainer.progress.global_step = trainer.step(trainer.progress.epoch, trainer.progress.global_step)
    trainer.progress.epoch += 1


def train(
    trainer: TAFSGRPOTrainer,
    epochs: int,
    evaluations: int | None,
    look: Callable[[], dict[str, float]],
    judge: Callable[[bool], dict[str, Any]],
    points: int,
) -> dict[str, Any]:
    """Train for `epochs`, and on until `evaluations` are spent, at most half as long again; judge where either is.

    `judge(True)` is by all judges, `judge(False)` by the reward. The result has `at_time`, `at_evaluations` (where that
    budget wasn't reached, the end) and a `curve` of (epochs, evaluations, value).
    """
    counter, curve = Evaluations(trainer), [{"epochs": 0, "evaluations": 0} | look()]
    looks = {round(epochs * k / points) for k in range(1, points + 1)}
    result: dict[str, Any] = {}

    def short_of_evaluations() -> bool:
        return bool(evaluations) and "at_evaluations" not in result and trainer.progress.epoch < 1.5 * epochs

    while "at_time" not in result or short_of_evaluations():
        with counter.training():
            train_epoch(trainer)
        updates = trainer.progress.global_step
        facts = {"evaluations": counter.total, "epochs": trainer.progress.epoch, "updates": updates}
        if trainer.progress.epoch in looks:
            curve.append(facts | look())
        if trainer.progress.epoch == epochs:
            result["at_time"] = facts | judge(True)
        if "at_evaluations" not in result and evaluations and counter.total >= evaluations:
            result["at_evaluations"] = facts | judge(False)
    if "at_evaluations" not in result:
        result["at_evaluations"] = facts | judge(False) if evaluations else result["at_time"]
    images = trainer.plan.total_images * trainer.progress.epoch
    result["nfe"] = {phase: round(count / images, 2) for phase, count in counter.counts.items()}
    return result | {"curve": curve}


@torch.no_grad()
def correlations(task: Task, pipeline: Any, num_steps: int = 4) -> dict[str, float]:
    """Table 7: Pearson's r of each step's reward with the final one's, over the judged prompts."""
    encode = PromptEncoder(pipeline, torch.device("cpu"), max_sequence_length=task.options["max_sequence_length"])
    noise = SampleNoise(7, -3, tuple(range(len(task.prompts))))
    x = noise("initial", 0, pipeline.latent_shape(task.height, task.width))
    levels = pipeline.rollout_levels(num_steps, task.height, task.width)
    steps = sample_steps(pipeline.velocity, Annealed(), encode(task.prompts), levels, x, noise)
    ((_, reward),) = task.rewards().items()
    told = [dict(task.metadata.get(prompt, {})) for prompt in task.prompts]
    scored = [reward(pipeline.decode_latents(step.clean), task.prompts, told) for step in steps]
    rewards = torch.stack([torch.as_tensor(item[0] if isinstance(item, tuple) else item) for item in scored]).double()
    r = torch.corrcoef(rewards)[-1].nan_to_num(0.0).tolist()
    return {f"R^{n + 1} with R^{num_steps}": round(r[n], 3) for n in range(num_steps - 1)}


def chosen(task_name: str, method: dict[str, Any], seed: int, epochs: int) -> dict[str, Any]:
    """What a learning rate is chosen by: `best` of both samplers at 4 steps, on prompts and noise of its own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task = TASKS[task_name]()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task, method, seed, folder)
        while trainer.progress.epoch < epochs:
            train_epoch(trainer)
        best = max(choice_value(task, trainer.sd_pipeline, sampler, 4) for sampler in SAMPLERS)
    return {"task": task_name, "method": method, "seed": seed, "best": best}


def choice_value(task: Task, pipeline: Any, sampler: str, steps: int, guidance: float = 1.0) -> float:
    """The rewarding metric on prompts and noise that nothing is reported of."""
    prompts = task.choice_prompts
    images = task.images(pipeline, sampler, steps, guidance, prompts=prompts, seed=CHOICE_NOISE)
    return round(task.quick(images, prompts), 4)


def judged(task: Task, pipeline: Any, sampler: str, steps: int, guidance: float = 1.0) -> dict[str, Any]:
    """All judges, and the rewarding metric of each image."""
    images = task.images(pipeline, sampler, steps, guidance)
    row = {name: round(value, 4) for name, value in task.judge(images).items()}
    return row | {"values": [round(value, 3) for value in task.values(images, task.prompts).tolist()]}


def guided(task_name: str) -> dict[str, Any]:
    """The untrained base with guidance at 4 and 32 steps: sampler and scale by prompts and noise of their own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task = TASKS[task_name]()
    pipeline, rows = task.pipeline(), {}
    for steps, samplers in ((4, SAMPLERS), (32, ("ode",))):
        tried = {
            (sampler, scale): choice_value(task, pipeline, sampler, steps, scale)
            for sampler in samplers
            for scale in task.guidance
        }
        sampler, scale = max(tried, key=lambda way: tried[way])
        row = judged(task, pipeline, sampler, steps, scale)
        rows[str(steps)] = row | {"sampler": sampler, "guidance": scale, "evaluations": 2 * steps}
    return {"task": task_name, "rows": rows, "seconds": 0.0}


def run(task_name: str, method: dict[str, Any], seed: int, epochs: int, evaluations: int | None) -> dict[str, Any]:
    """One run, judged by all at 2, 4 and 8 steps of both samplers; seed 0 has step counts and correlations, too."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task = TASKS[task_name]()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task, method, seed, folder)
        pipeline = trainer.sd_pipeline

        def value(sampler: str, steps: int) -> float:
            return round(task.quick(task.images(pipeline, sampler, steps)), 4)

        def look() -> dict[str, float]:
            return {"value": value("annealed", 4)}

        def judge(by_all: bool) -> dict[str, Any]:
            if not by_all:
                return {"best": max(value(sampler, 4) for sampler in SAMPLERS)}
            rows = {name: judged(task, pipeline, *how) for name, how in EVALUATED.items()}
            return {"rows": rows, "best": max(rows[f"{sampler} 4"]["reward"] for sampler in SAMPLERS)}

        before = correlations(task, pipeline) if seed == 0 else None
        result = train(trainer, epochs, evaluations, look, judge, task.points)
        if seed == 0:
            pairs = [(sampler, n) for sampler in SAMPLERS for n in STEP_COUNTS]
            result["steps"] = {f"{sampler} {n}": value(sampler, n) for sampler, n in pairs}
            result["correlations"] = {"before": before, "after": correlations(task, pipeline)}
    return {"task": task_name, "method": method, "seed": seed} | result
