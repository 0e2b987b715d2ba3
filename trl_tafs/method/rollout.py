"""Rollout and replay over any velocity function. Torch alone: no diffusers, no model.

A velocity function is `velocity(x, level, conditioning) -> v`: x (B, *) in the storage dtype, level (B,) float32,
v (B, *) float32. It must give the same result for the same entry in rollout and in replay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_tafs.method.kernels import Kernel, Transition, clean_estimate
from trl_tafs.method.noise import Noise
from trl_tafs.method.types import Conditioning, Rollout, Transitions

Velocity = Callable[[Tensor, Tensor, Conditioning], Tensor]

KEPT = frozenset({"states", "actions", "log_probs", "clean"})  # what a rollout keeps unless it is told otherwise
LAST = "last"  # what it keeps if it is asked: the state of the last evaluation


@dataclass(frozen=True)
class Step:
    """One step of the sampler, as it was taken."""

    index: int  # n, 0-based
    state: Tensor  # (B, *) storage dtype
    clean: Tensor  # (B, *) float32
    transition: Transition | None  # at trained steps of a kernel with a density
    actions: Tensor | None  # (B, M, *) storage dtype, at trained steps of a kernel with a density
    next_state: Tensor  # (B, *) storage dtype
    siblings: Tensor  # (B, M - 1, *) float32, clean estimates of the other actions that led here; M - 1 = 0 without


def _draw_actions(kernel: Kernel, noise: Noise, step: int, shape: tuple[int, ...]) -> Tensor:
    """The noise of a state's actions, (B, M, *shape)."""
    if not kernel.antithetic:
        return noise("action", step, (kernel.num_actions, *shape))
    half = noise("action", step, (kernel.num_actions // 2, *shape))
    return torch.cat([half, -half], dim=1)


def sample_steps(
    velocity: Velocity,
    kernel: Kernel,
    conditioning: Conditioning,
    levels: Tensor,
    x: Tensor,
    noise: Noise,
    storage_dtype: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Walk the sampler from `x` (B, *) at `levels[0]` down to 0, a `Step` at a time.

    An action is rounded to `storage_dtype` first and scored second, so that replay sees what was scored.
    """
    num_steps = len(levels) - 1
    trained = kernel.trained_steps(num_steps)
    x = x.to(storage_dtype)
    branches = no_branches = x[:, None][:, :0]
    for n in range(num_steps):
        s, s_next = levels[n], levels[n + 1]
        state, v = x.float(), velocity(x, s.expand(len(x)), conditioning).float()
        estimates = [
            clean_estimate(branch.float(), velocity(branch, s.expand(len(x)), conditioning).float(), s)
            for branch in branches.unbind(1)
        ]
        transition, actions = None, None
        if n in trained and kernel.has_density:
            transition = kernel.transition(state, v, s, s_next)
            actions = transition.sample(_draw_actions(kernel, noise, n, tuple(x.shape[1:]))).to(storage_dtype)
        chosen = None if actions is None else actions[:, 0].float()
        renoise = kernel.renoises and n + 1 < num_steps
        fresh = noise("state", n, tuple(x.shape[1:])) if renoise else torch.zeros_like(state)
        following = kernel.next_state(state, v, s, s_next, chosen, fresh).to(storage_dtype)
        clean = clean_estimate(state, v, s)
        siblings = torch.stack(estimates, dim=1) if estimates else no_branches.float()
        yield Step(n, x, clean, transition, actions, following, siblings)
        x = following
        branches = actions[:, 1:] if actions is not None and kernel.reward_lag else no_branches


@torch.no_grad()
def sample(
    velocity: Velocity,
    kernel: Kernel,
    conditioning: Conditioning,
    levels: Tensor,
    x: Tensor,
    noise: Noise,
    storage_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sample from initial noise `x` (B, *), keep nothing on the way, and return the result in the storage dtype."""
    for step in sample_steps(velocity, kernel, conditioning, levels, x, noise, storage_dtype):
        x = step.next_state
    return x


@torch.no_grad()
def rollout(
    velocity: Velocity,
    kernel: Kernel,
    conditioning: Conditioning,
    levels: Tensor,
    x: Tensor,
    noise: Noise,
    *,
    storage_dtype: torch.dtype = torch.float32,
    reduction: str = "sum",
    scored_steps: range | None = None,
    on_scored: Callable[[Tensor], None] | None = None,
    keep: Collection[str] = KEPT,
) -> Rollout:
    """Sample B trajectories and keep what training needs (Algorithm 1, lines 5 to 17).

    Args:
        velocity: the policy, with its guidance.
        kernel: what an action is.
        conditioning: of B images.
        levels: (N + 1,), from `levels.with_zero`, on the device of `x`.
        x: (B, *) initial noise.
        noise: `noise(stream, step, shape) -> (B, *shape)`.
        storage_dtype: in which states and actions are kept, that of the denoiser.
        reduction: of the log-probabilities.
        scored_steps: the steps, 0-based, whose clean images will be scored; by default those that the kernel's
            actions answer for (n = 2..N of the paper).
        on_scored: given each scored step's clean latents, (B, K, *), as soon as they are there.
        keep: which of `KEPT` and `LAST` the rollout keeps; the others are empty there.

    Raises:
        ValueError: no step trains, or a scored step isn't explored where the others are.
    """
    trained = kernel.trained_steps(len(levels) - 1)
    if not trained:
        raise ValueError(f"{kernel} trains none of {len(levels) - 1} steps; take more, or `sample` without a density")
    scored_steps = default_scored_steps(kernel, len(levels) - 1) if scored_steps is None else scored_steps
    on_path = kernel.num_actions == 1 and kernel.action_is_state
    path, branches, log_probs, clean, scored = [], [], [], [], []
    for step in sample_steps(velocity, kernel, conditioning, levels, x, noise, storage_dtype):
        if "clean" in keep:
            clean.append(step.clean)
        if step.index in trained and ("states" in keep or ("actions" in keep and on_path)):
            path.append(step.state)
        if step.index in trained and "actions" in keep:
            if not on_path:
                branches.append(step.next_state.unsqueeze(1) if step.actions is None else step.actions)
            elif step.index == trained[-1]:
                path.append(step.next_state)
        if step.index in trained and "log_probs" in keep:
            log_probs.append(
                torch.zeros(len(x), 1, device=x.device)  # deterministic: nothing was chosen
                if step.transition is None or step.actions is None
                else step.transition.log_prob(step.actions, reduction)
            )
        if step.index in scored_steps:
            scored.append(_scored_images(kernel, step))
            if scored[-1].shape != scored[0].shape:
                raise ValueError(
                    f"step {scored_steps[0]} isn't explored, and has no baseline of its own: don't score it"
                )
            if on_scored is not None:
                on_scored(scored[-1])
    stored = x.new_empty(len(x), 0, *x.shape[1:], dtype=storage_dtype)
    return Rollout(
        levels=levels,
        steps=torch.tensor(list(trained), dtype=torch.int64),
        path=torch.stack(path, dim=1) if path else stored,
        branches=torch.stack(branches, dim=1) if branches else stored.unsqueeze(2),
        log_probs=torch.stack(log_probs, dim=1) if log_probs else x.new_empty(len(x), 0, 1, dtype=torch.float32),
        clean=torch.stack(clean, dim=1) if clean else stored.float(),
        scored=torch.stack(scored, dim=1),
        final=step.next_state.float(),
        last=step.state.unsqueeze(1) if LAST in keep else stored,
    )


def _scored_images(kernel: Kernel, step: Step) -> Tensor:
    """Return a step's clean latents that are scored, (B, K, *): what its actions answer for, and their baseline."""
    if kernel.reward_lag or step.actions is None:
        return torch.cat([step.clean.unsqueeze(1), step.siblings], dim=1)
    images = [step.actions.float()]
    if kernel.scores_mean:
        images.append(step.clean.unsqueeze(1))
    return torch.cat(images, dim=1)


def default_scored_steps(kernel: Kernel, num_steps: int) -> range:
    """Return the steps whose clean images the kernel's actions answer for, 0-based."""
    trained = kernel.trained_steps(num_steps)
    return range(trained.start + kernel.reward_lag, trained.stop + kernel.reward_lag)


def replay(velocity: Velocity, kernel: Kernel, items: Transitions, conditioning: Conditioning) -> Transition:
    """Return the distribution that the present policy gives to the actions of T items, with gradient."""
    v = velocity(items.state, items.level, conditioning).float()
    return kernel.transition(items.state.float(), v, items.level, items.next_level)
