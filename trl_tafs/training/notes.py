"""What is said once before training: settings that work, and do other than one may think."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.components import vae_tiles
from trl_tafs.pipelines.few_step import few_step_sign
from trl_tafs.pipelines.pictures import check_source_pictures
from trl_tafs.policy.carried import active_adapters
from trl_tafs.prompts.source import PromptSource
from trl_tafs.rewards.scoring import RewardSet
from trl_tafs.training.matching import has_own_guidance
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.plan import EpochPlan

COUNTED = 100_000  # prompts whose tokens are counted: seconds
CHUNK = 1000  # of them at once
SHOWN = 3


def run_notes(
    options: TrainingOptions,
    plan: EpochPlan,
    pipeline: TAFSPipelineMixin,
    size: tuple[int, int],
    drawn: tuple[PromptSource, RewardSet],
    held_out: tuple[PromptSource, RewardSet] | None,
) -> Iterator[str]:
    """Yield all that is worth knowing before a run, and check that its rewards can score its prompts.

    Args:
        options: of the run.
        plan: of its epochs.
        pipeline: that draws.
        size: height and width, pixels.
        drawn: prompts and rewards of training.
        held_out: those of evaluations, if there are any.

    Raises:
        ValueError: a row whose source pictures the family can't edit; or one that a reward can't score, or a reward
            that scores none.
    """
    yield from setting_notes(options, plan, pipeline, size)
    if held_out is not None and held_out[1] is not drawn[1] and any(weight != 1.0 for weight in held_out[1].weights):
        yield "the weights of eval_reward_function have no effect: an evaluation logs each reward by itself"
    for name, (prompts, rewards), epochs in (("prompts", drawn, plan), ("eval_prompts", held_out or drawn, None)):
        if epochs is None and held_out is None:
            return
        if prompts.names_pictures or pipeline.needs_pictures:
            check_source_pictures(pipeline, prompts.scanned(), name)
        yield from rewards.check_rows(prompts.scanned(), name)
        yield from prompt_notes(prompts, epochs, pipeline, options.max_sequence_length, name)


def setting_notes(
    options: TrainingOptions, plan: EpochPlan, pipeline: TAFSPipelineMixin, size: tuple[int, int]
) -> Iterator[str]:
    """Yield what is worth knowing of a run's settings."""
    sampled, trained = options.sample_batch_size, options.train_batch_size
    if options.from_actions and options.mixed_precision != "no" and sampled != trained:
        yield (
            f"sample_batch_size is {sampled} and train_batch_size {trained}: in {options.mixed_precision} a row's "
            "result depends on its batch, so that rounding alone moves the ratios, and takes a part of the clip range; "
            "with equal sizes they are 1 on policy"
        )
    if options.matches_distribution and options.dm_guidance_scale is None and has_own_guidance(options, pipeline):
        embedded = pipeline.embedded_guidance(options.sample_embedded_guidance_scale)
        instead = "as it is, without" if embedded is None else f"given its embedded guidance of {embedded:g}, without"
        yield (
            f"distribution matching: guidance is distilled into this {type(pipeline.denoiser).__name__}, so that the "
            f"teacher is the base {instead} classifier-free guidance"
        )
    sign = few_step_sign(pipeline, active_adapters(pipeline.denoiser))
    if sign is not None and not options.matches_distribution:
        yield (
            f"the model draws in few steps already ({sign}): a reward says nothing of the distribution that it was "
            "distilled to, and images get less real and more alike while it rises; the preset tafs_dm adds "
            "distribution matching, a pull towards what the base draws"
        )
    if options.vae_tiling and not vae_tiles(pipeline.vae, *size):
        yield f"vae_tiling has no effect at {size[0]} x {size[1]}: this VAE decodes that size as one tile"


def prompt_notes(
    prompts: PromptSource, plan: EpochPlan | None, pipeline: TAFSPipelineMixin, limit: int | None, name: str
) -> Iterator[str]:
    """Yield what is worth knowing of a set of prompts.

    Args:
        prompts: a fixed set, or a function's, of which nothing is known.
        plan: of the epochs that draw them; None for held-out ones.
        pipeline: whose tokenizers count.
        limit: `max_sequence_length`; None for the family's default.
        name: what the prompts are called, "prompts" or "eval_prompts".
    """
    known = prompts.known()
    counts = Counter(known)
    if plan is not None and plan.num_groups == 1 and (prompts.function is not None or len(counts) > 1):
        yield (
            f"an epoch is one prompt: its {plan.total_images} images are one group of num_generations="
            f"{plan.group_size}, and every update is of that prompt alone; raise sample_num_batches_per_epoch, or "
            "lower num_generations"
        )
    if repeated := {prompt: count for prompt, count in counts.items() if count > 1}:
        first = next(iter(repeated))
        more = sum(repeated.values()) - len(repeated)
        yield f"{more} of {len(known)} {name} repeat others: {first!r:.80}, for example, is there {counts[first]} times"
    yield from _cut_off(list(counts)[:COUNTED], pipeline, limit or pipeline.default_max_sequence_length(), name)


def _cut_off(prompts: Sequence[str], pipeline: TAFSPipelineMixin, limit: int, name: str) -> Iterator[str]:
    chunks = (prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK))
    tokens = [count for chunk in chunks for count in pipeline.prompt_tokens(chunk)]
    long = [(count, prompt) for count, prompt in zip(tokens, prompts, strict=True) if count > limit]
    if long:
        shown = ", ".join(f"{prompt!r:.60} ({count} tokens)" for count, prompt in long[:SHOWN])
        more = f" and {len(long) - SHOWN} more" if len(long) > SHOWN else ""
        yield (
            f"{len(long)} of {len(prompts)} {name} are longer than max_sequence_length={limit}, and are cut off there: "
            f"{shown}{more}; raise it, or shorten them"
        )
