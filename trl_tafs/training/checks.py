"""What a few images tell of a run: each check turns what was measured into facts and findings. No model is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trl_tafs.method.advantages import group_mean_std, group_sums
from trl_tafs.method.types import RewardTable
from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.rewards.scoring import RewardError
from trl_tafs.training.findings import Drift, Finding, Gradients, RewardFacts
from trl_tafs.training.plan import EpochPlan

SHOWN_NAMES = 4
NOISE = (0.1, 0.5)  # of a reward's variance within groups: worth a warning, an error
DRIFT = (0.05, 0.5)  # of the clip range, or of a prediction's size


def picture_findings(images: Tensor, dtype: torch.dtype) -> list[Finding]:
    """Check finite images (B, 3, H, W); `dtype` is the VAE's."""
    if bool((images.flatten(2).amax(2) > images.flatten(2).amin(2)).any()):
        return []
    return [
        Finding(
            "error",
            f"every picture is one flat colour (the VAE computes in {dtype})",
            "load the VAE in float32 (pipeline.vae.to(torch.float32)), and look at what the base model draws",
        )
    ]


def plan_findings(plan: EpochPlan) -> list[Finding]:
    """Check the arithmetic of an epoch for what is allowed, and hardly meant."""
    if plan.num_groups > 1:
        return []
    return [
        Finding(
            "warning",
            f"an epoch is a single prompt, with {plan.total_images} images",
            "raise sample_num_batches_per_epoch, or lower num_generations, for several prompts an optimizer step",
        )
    ]


# Rewards ------------------------------------------------------------------------------------------------------


def noise_shares(first: Tensor, second: Tensor, group_ids: Tensor) -> list[float | None]:
    """Compare two scorings (B, R) of the same images: the share of the variance within groups that is noise, R of them.

    None where a reward has no variance within groups, or no scores.
    """
    shares: list[float | None] = []
    for a, b in zip(first.double().unbind(1), second.double().unbind(1), strict=True):
        valid = ~(a.isnan() | b.isnan())
        a, b, ids = a[valid], b[valid], group_ids[valid]
        noise = (a - b).square().sum() / 2
        within, freedom = 0.0, 0.0
        for values in (a, b) if len(a) else ():
            total, count = group_sums(values, ids)
            within += (values - total / count).square().sum().item() / 2
            freedom = float(len(values) - len(ids.unique()))
        known = freedom > 0 and within > 0
        shares.append(min(1.0, noise.item() / len(a) / (within / freedom)) if known else None)
    return shares


def reward_facts(table: RewardTable, group_ids: Tensor, noise: Sequence[float | None]) -> tuple[RewardFacts, ...]:
    """Describe each reward on the images of the last scored step, (B, K) of them; `noise` has R shares."""
    facts = []
    for name, values, share in zip(table.names, table.values[:, -1].unbind(-1), noise, strict=True):
        std = group_mean_std(values.double(), group_ids)[1]
        first = [int((group_ids == group).nonzero()[0]) for group in group_ids.unique()]
        known = values[~values.isnan()]
        numbers = (known.mean(), known.min(), known.max()) if len(known) else (torch.tensor(torch.nan),) * 3
        facts.append(
            RewardFacts(
                name,
                *(number.item() for number in numbers),
                group_std=std[first].mean().item(),
                still_groups=(std[first] == 0).all(1).double().mean().item(),
                no_score=values.isnan().double().mean().item(),
                noise=share,
            )
        )
    return tuple(facts)


def reward_findings(facts: Sequence[RewardFacts], weights: Tensor) -> list[Finding]:
    """Name rewards without a score, without variance within groups, or whose variance is noise."""
    counted = [fact for fact, weight in zip(facts, weights.tolist(), strict=True) if weight]
    nothing = all(fact.constant for fact in counted)  # to learn from
    findings = []
    for fact in counted:
        severity = "error" if nothing else "warning"
        if fact.no_score == 1.0:
            what = f"reward {fact.name} gave no score (None or NaN) for any image"
            findings.append(Finding(severity, what, f"call {fact.name} on one image, and look at what it returns"))
        elif fact.constant:
            findings.append(
                Finding(
                    severity,
                    f"reward {fact.name} is the same for all images of a prompt ({fact.least:.4g} to {fact.most:.4g} "
                    "over all), so that it teaches nothing",
                    f"call {fact.name} on two different pictures; if it tells them apart, these prompts are all too "
                    "easy or too hard for it: take others, or a reward that says by how much",
                )
            )
        elif fact.noise is not None and fact.noise >= NOISE[0]:
            findings.append(
                Finding(
                    "error" if fact.noise >= NOISE[1] else "warning",
                    f"reward {fact.name} scores the same images otherwise the second time: {fact.noise:.0%} of its "
                    "variance within a prompt's images is noise",
                    f"make {fact.name} deterministic (seed it, temperature 0, its model in eval mode), or let it "
                    "return the mean of several calls",
                )
            )
    return findings


# Update -------------------------------------------------------------------------------------------------------


def drift_findings(drift: Drift, dtype: torch.dtype, sizes: tuple[int, int]) -> list[Finding]:
    """Name a replay that isn't the rollout; `dtype` is the denoiser's, `sizes` are sample and train batch size."""
    if drift.share < DRIFT[0]:
        return []
    remedy = "use mixed_precision=no to see whether it is rounding; if it stays, the denoiser isn't the same in both"
    if sizes[0] != sizes[1]:
        remedy = f"use batches of one size, sample_batch_size={sizes[0]} and train_batch_size={sizes[1]} are two; or "
        remedy += "mixed_precision=no"
    return [
        Finding(
            "error" if drift.share >= DRIFT[1] else "warning",
            f"the update doesn't see the policy that sampled, before it has moved: {drift.line()} (in {dtype})",
            remedy,
        )
    ]


def gradient_facts(peaks: Mapping[str, float], dead_modules: Sequence[str]) -> Gradients:
    """Count which parameters had a gradient; `peaks` has the largest absolute value of each, by name."""
    dead = [name for name in peaks if any(f".{part}." in f".{name}" for part in dead_modules)]
    expected = [name for name in peaks if name not in dead]
    kinds = {name: next((kind for kind in ("lora_A", "lora_B") if kind in name), "weights") for name in expected}
    count = {kind: sum(found == kind for found in kinds.values()) for kind in sorted(set(kinds.values()))}
    missing = tuple(name for name in expected if peaks[name] == 0)
    reached = {kind: total - sum(kinds[name] == kind for name in missing) for kind, total in count.items()}
    return Gradients(reached, count, missing, len(dead))


def gradient_findings(gradients: Gradients, frozen: Sequence[str], full: bool) -> list[Finding]:
    """Name trained parameters without a gradient; `full`: all weights are trained, of which a few may have none."""
    findings = []
    if frozen:
        findings.append(
            Finding(
                "error",
                f"{len(frozen)} trained weights are frozen (requires_grad is False): {_shown(frozen)}",
                "call requires_grad_(True) on them, or leave their modules out of the LoRA's target_modules",
            )
        )
    missing = [name for name in gradients.missing if name not in set(frozen)]
    if missing:
        findings.append(
            Finding(
                "warning" if full and len(missing) < sum(gradients.expected.values()) else "error",
                f"no gradient reaches {len(missing)} trained weights: {_shown(missing)}",
                "what these modules return isn't used, or is detached on the way: leave them out of the LoRA's "
                "target_modules (lora_target_modules), or see what cuts them off",
            )
        )
    return findings


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def overflow_findings(names: Sequence[str], what: str, moved: bool, rate: float, dtype: torch.dtype) -> list[Finding]:
    """Name gradients or weights that aren't finite; `moved`: after an update has moved the weights."""
    if not names:
        return []
    remedy = f"lower train_learning_rate, which is {rate:g}" if moved else "use mixed_precision=bf16, or no"
    where = " after an optimizer step" if moved else ""
    text = f"{len(names)} {what} aren't finite{where}: {_shown(names)} (in {dtype})"
    return [Finding("error", text, remedy)]


def error_finding(error: Exception, stage: str) -> Finding:
    """Make a finding of what a stage raised."""
    if isinstance(error, torch.OutOfMemoryError):
        remedy = "lower sample_batch_size, decode_batch_size or train_batch_size, or see docs/memory.md"
        return Finding("error", f"the {stage} doesn't fit into memory: {str(error).splitlines()[0]}", remedy)
    if isinstance(error, NonFiniteError):
        what, _, remedy = str(error).rpartition(": ")
        return Finding("error", what or str(error), remedy)
    if isinstance(error, RewardError):
        return Finding("error", str(error), "call the reward on these prompts by itself, and see that it answers")
    return Finding(
        "error", f"the {stage} raised {type(error).__name__}: {error}", f"training would end there: repair the {stage}"
    )
