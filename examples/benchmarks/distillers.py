"""The two gradient-based distillers of the paper's Table 2, one small baseline each, to place a row.

Both need what TAFS-GRPO doesn't: a reward with a gradient. Here it is the digits' classifier, differentiated through
the VAE. They train the same LoRA from the same weights as the trainer does.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from bench_run import EVALUATED, SAMPLERS, choice_value, judged
from tasks import Digits
from torch import Tensor

from trl_tafs import TAFSGRPOConfig
from trl_tafs.method.kernels import Annealed, Ode, clean_estimate
from trl_tafs.method.rollout import sample_steps
from trl_tafs.policy.base import prepare_base
from trl_tafs.policy.carried import TrainedAdapter
from trl_tafs.policy.lora import attach_lora, trainable_parameters, without_trained
from trl_tafs.policy.optimizer import make_optimizer
from trl_tafs.prompts.encoder import PromptEncoder

ALONE = TrainedAdapter("default", True)  # nothing lies beneath it

BATCH, NUM_STEPS = 64, 4
Loss = Callable[[Any, Digits, PromptEncoder, torch.Generator], Tensor]


def reward_of(task: Digits, pipeline: Any, latents: Tensor, prompts: list[str]) -> Tensor:
    """The classifier's log-probability of the asked digit, with gradient through the VAE, ()."""
    from digits_data import digit_of

    latents = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    images = (pipeline.vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    logits = task.judges["reward"].model(images.mean(1, keepdim=True))
    asked = torch.tensor([digit_of(prompt) for prompt in prompts])
    return -F.cross_entropy(logits, asked)


def draw_prompts(task: Digits, rng: torch.Generator) -> list[str]:
    """A batch of training prompts."""
    return [task.train_prompts[i][0] for i in torch.randint(10, (BATCH,), generator=rng).tolist()]


def reward_instruct(pipeline: Any, task: Digits, encode: PromptEncoder, rng: torch.Generator) -> Tensor:
    """Reward-Instruct (arXiv 2503.13070): ascend the reward of few-step samples, held by a distance to the base.

    The sampler runs without gradient to a random one of its four steps, whose clean estimate is scored.
    """
    prompts, levels = draw_prompts(task, rng), pipeline.rollout_levels(NUM_STEPS, 8, 8)
    condition, last = encode(prompts), int(torch.randint(NUM_STEPS, (1,), generator=rng))
    x = torch.randn((BATCH, *pipeline.latent_shape(8, 8)), generator=rng)

    def noise(stream: str, step: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn((BATCH, *shape), generator=rng)

    with torch.no_grad():
        for step in sample_steps(pipeline.velocity, Annealed(), condition, levels, x, noise):
            if step.index == last:
                x = step.state
                break
    level = levels[last].expand(BATCH)
    v = pipeline.velocity(x, level, condition)
    with torch.no_grad(), without_trained(pipeline.denoiser, ALONE):
        base = pipeline.velocity(x, level, condition)
    return 0.2 * (v - base).square().mean() - reward_of(task, pipeline, clean_estimate(x, v, level), prompts)


def rg_lcd(pipeline: Any, task: Digits, encode: PromptEncoder, rng: torch.Generator) -> Tensor:
    """Reward-guided latent consistency distillation (arXiv 2403.11027): consistency along the base's ODE, plus reward.

    A state of the base's 20-step ODE is sampled, one more step of the base taken, and the clean estimates at both made
    equal; the teacher's costs are part of the method's.
    """
    prompts, count = draw_prompts(task, rng), 20
    condition, levels = encode(prompts), pipeline.rollout_levels(count, 8, 8)
    at = int(torch.randint(count - 1, (1,), generator=rng))
    x = torch.randn((BATCH, *pipeline.latent_shape(8, 8)), generator=rng)
    with torch.no_grad(), without_trained(pipeline.denoiser, ALONE):
        for step in sample_steps(pipeline.velocity, Ode(), condition, levels, x, lambda *_: x):
            if step.index == at:
                state, following = step.state, step.next_state
                break
    level, next_level = levels[at].expand(BATCH), levels[at + 1].expand(BATCH)
    with torch.no_grad():
        target = clean_estimate(following, pipeline.velocity(following, next_level, condition), next_level)
    estimate = clean_estimate(state, pipeline.velocity(state, level, condition), level)
    consistency = (estimate - target).square().mean()
    return consistency - 0.1 * reward_of(task, pipeline, estimate, prompts)


DISTILLERS: dict[str, Loss] = {"reward_instruct": reward_instruct, "rg_lcd": rg_lcd}


def updates(pipeline: Any, task: Digits, loss: Loss, rate: float, seed: int) -> Iterator[None]:
    """Optimizer steps, one a turn."""
    config = TAFSGRPOConfig(seed=seed, train_learning_rate=rate, mixed_precision="no")
    prepare_base(pipeline, config, torch.device("cpu"))
    attach_lora(pipeline, config, None)
    parameters = trainable_parameters(pipeline.denoiser)
    optimizer = make_optimizer(parameters, config)
    encode = PromptEncoder(pipeline, torch.device("cpu"), max_sequence_length=task.options["max_sequence_length"])
    rng = torch.Generator().manual_seed(seed)
    while True:
        loss(pipeline, task, encode, rng).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def step_seconds(name: str, steps: int = 20) -> dict[str, Any]:
    """What an optimizer step of one baseline takes, in CPU seconds of one thread: `seconds`, the least of `steps`."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task, times = Digits(), []
    for _ in updates(task.pipeline(), task, DISTILLERS[name], 1e-5, 0):
        times.append(time.process_time())
        if len(times) > steps:
            break
    return {"seconds": min(after - before for before, after in pairwise(times))}


def trained(name: str, rate: float, seed: int, steps: int) -> tuple[Digits, Any]:
    """The task, and its pipeline after `steps` optimizer steps of one baseline."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task = Digits()
    pipeline = task.pipeline()
    for _ in islice(updates(pipeline, task, DISTILLERS[name], rate, seed), steps):
        pass
    return task, pipeline


def chosen_distiller(name: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """What a baseline's learning rate is chosen by, as the methods' are: `best`."""
    task, pipeline = trained(name, rate, seed, steps)
    return {"best": max(choice_value(task, pipeline, sampler, 4) for sampler in SAMPLERS)}


def run_distiller(name: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One baseline for `steps` optimizer steps, judged as the methods are."""
    task, pipeline = trained(name, rate, seed, steps)
    rows = {how: judged(task, pipeline, *EVALUATED[how]) for how in EVALUATED}
    best = max(rows["annealed 4"]["reward"], rows["ode 4"]["reward"])
    facts = {"updates": steps, "rows": rows, "best": best}
    return {"method": {"preset": name, "rate": rate}, "seed": seed, "at_time": facts}
