"""Pre-train the scenes pipeline: `python examples/scenes/scenes_pretrain.py`; run it again to go on where it stopped.

First the VAE; then the text encoders learn to name what a caption says (`train_text`); then the transformer together
with them, by flow matching on scenes drawn on the fly: a rate
that stays, then falls to zero over the last part; the average of the weights is kept. For the first steps all captions
are whole and right. After them some tell a part and some are another scene's, as captions on the web are
(`scenes_data`); a tenth is empty, so that guidance works. Held-out combinations are never drawn. Once ten
minutes at a constant rate raise the guided score by less than .01, the rate falls early, and training ends.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from scenes_components import FOLDER, build_pipeline
from scenes_data import QUESTIONS, TAGS, answers, draw_scene, training_batch, training_prompts
from scenes_judges import contours, strict_scores
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from words_pretrain import flow_loss, train_vae
from words_sampling import encode_prompts, sample

WHOLE_STEPS = 3000  # of these all captions are whole and right
WARMUP = 200
SAMPLERS = {  # sampler, steps, guidance
    "annealed_4": ("annealed", 4, 1.0),
    "annealed_4_guided": ("annealed", 4, 3.0),
    "ode_4_guided": ("ode", 4, 3.0),
    "ode_32_guided": ("ode", 32, 3.0),
}
QUICK = ("annealed_4", "ode_4_guided")  # on the way
FOLLOWED, PATIENCE, LEAST_GAIN = "ode_4_guided", 600.0, 0.01  # the figure, seconds and gain by which training goes on


@dataclass
class Progress:
    """Where pre-training is."""

    step: int = 0
    seconds: float = 0.0  # of this and earlier runs
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: int | None = None  # where it ends, once its figure has stopped rising


def settled(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the last ten minutes raised the best figure by less than a hundredth."""
    figures = [(row["seconds"], row[FOLLOWED]) for row in rows if FOLLOWED in row]
    before = [figure for seconds, figure in figures if seconds <= figures[-1][0] - PATIENCE]
    return bool(before) and max(figure for _, figure in figures) < max(before) + LEAST_GAIN


def rate_at(step: int, steps: int, rate: float, falling: float) -> float:
    """The learning rate: warm-up, constant, and to zero over the last share."""
    left = (steps - step) / max(1.0, falling * steps)
    return rate * min(1.0, (step + 1) / WARMUP, left)


def trained(pipeline: StableDiffusion3Pipeline) -> list[nn.Parameter]:
    """The parameters of the transformer and of the text encoders."""
    modules = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    return [p for module in modules for p in module.requires_grad_(True).parameters()]


def train_text(
    pipeline: StableDiffusion3Pipeline, scenes: random.Random, steps: int, batch: int = 64, rate: float = 1e-3
) -> float:
    """Teach the text encoders to tell what a caption says; returns the share of answers right on the last 50 batches.

    Linear heads, thrown away after, answer QUESTIONS from what the transformer will get: CLIP's tokens and T5's, each
    averaged, and the pooled embedding. Flow matching alone teaches encoders of random weights slowly which colour is
    whose, since most of its loss doesn't depend on that.
    """
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    width = pipeline.transformer.config.joint_attention_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scenes.randrange(2**31))
        heads = nn.ModuleList(nn.Linear(width, sum(QUESTIONS)) for _ in range(3))
    parameters = [p for module in (*encoders, heads) for p in module.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    right: list[float] = []
    for step in range(steps):
        drawn = [draw_scene(scenes.choice(TAGS), scenes)[1:] for _ in range(batch)]
        tokens, pooled = encode_prompts(pipeline, [caption for caption, _ in drawn])
        clip, t5 = tokens.chunk(2, dim=1)
        told = [head(x) for head, x in zip(heads, (clip.mean(1), t5.mean(1), pooled), strict=True)]
        asked = torch.tensor([answers(row) for _, row in drawn])
        loss = torch.zeros(())
        for logits in told:
            for part, answer in zip(logits.split(QUESTIONS, dim=1), asked.T, strict=True):
                loss = loss + F.cross_entropy(part, answer)
                right.append((part.argmax(1) == answer).float().mean().item())
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = right[-50 * 3 * len(QUESTIONS) :]
    return sum(last) / len(last)


def measure(pipeline: StableDiffusion3Pipeline, names: Sequence[str] = tuple(SAMPLERS)) -> dict[str, float]:
    """GenEval's score by these ways of sampling, on prompts of which nothing is reported: when to stop goes by it."""
    prompts = training_prompts(16, seed=1)
    texts, rows = [text for text, _ in prompts], [row for _, row in prompts]
    figures = {}
    for name in names:
        sampler, steps, guidance = SAMPLERS[name]
        images = sample(pipeline, texts, steps=steps, sampler=sampler, guidance=guidance)
        scores = strict_scores(images, rows, contours)
        figures[name] = round(sum(scores) / len(scores), 3)
    return figures


class Training:
    """The flow's training, kept in one file between runs."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, state: Path, seed: int, rate: float) -> None:
        """Start, or go on from `state` where it is."""
        self.pipeline, self.state, self.parameters = pipeline, state, trained(pipeline)
        self.averages = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
        self.rng, self.scenes = torch.Generator().manual_seed(seed), random.Random(seed)
        self.progress = Progress()
        if state.is_file():
            kept = torch.load(state, weights_only=False)  # this script's own file
            for mine, values in ((self.parameters, kept["weights"]), (self.averages, kept["averages"])):
                for parameter, value in zip(mine, values, strict=True):
                    parameter.data.copy_(value)
            pipeline.vae.load_state_dict(kept["vae"])
            pipeline.vae.register_to_config(**kept["latents"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.rng.set_state(kept["rng"])
            self.scenes.setstate(kept["scenes"])
            self.progress = Progress(**kept["progress"])

    def save(self) -> None:
        """Write everything that moves, whole or not at all."""
        vae = self.pipeline.vae
        latents = {name: vae.config[name] for name in ("shift_factor", "scaling_factor")}
        kept = {
            "weights": [p.detach() for p in self.parameters],
            "averages": self.averages,
            "vae": vae.state_dict(),
            "latents": latents,
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.get_state(),
            "scenes": self.scenes.getstate(),
            "progress": vars(self.progress),
        }
        self.state.parent.mkdir(parents=True, exist_ok=True)
        written = self.state.with_suffix(".part")
        torch.save(kept, written)
        written.replace(self.state)

    def step(self, rate: float, batch: int, ema: float) -> Tensor:
        """One optimizer step; returns its loss, ()."""
        images, captions = training_batch(batch, self.scenes, flaws=self.progress.step >= WHOLE_STEPS)
        self.optimizer.param_groups[0]["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = flow_loss(self.pipeline, images, captions, self.rng)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.progress.step += 1
        weight = 1 - min(ema, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], weight)
        return loss.detach()

    def swap(self) -> None:
        """Exchange the weights and their averages."""
        for i, parameter in enumerate(self.parameters):
            parameter.data, self.averages[i] = self.averages[i], parameter.data


def go_on(pipeline: StableDiffusion3Pipeline, seconds: float, seed: int, rate: float = 3e-4, batch: int = 64) -> None:
    """Pre-train a trained pipeline further, for so many CPU seconds, the rate falling to zero; averages are kept."""
    training = Training(pipeline, Path(), seed, rate)
    training.progress.step = WHOLE_STEPS  # captions are as they were at the end
    start = time.process_time()
    while (done := (time.process_time() - start) / seconds) < 1:
        training.step(rate * (1 - done), batch, ema=0.99)
    training.swap()
    for parameter in training.parameters:
        parameter.requires_grad_(False)


def main() -> None:
    """Train and save the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae_steps", type=int, default=500)
    parser.add_argument("--text_steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--falling", type=float, default=0.25, help="share of the steps over which the rate falls")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--log_every", type=int, default=500)
    parser.add_argument("--save_every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("runs/scenes_pretrain/state.pt"))
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipeline = build_pipeline(args.seed)
    training = Training(pipeline, args.state, args.seed, args.learning_rate)
    progress = training.progress
    if not progress.rows:
        start = time.process_time()
        images = lambda n: training_batch(n, training.scenes)[0]  # noqa: E731
        error = train_vae(pipeline.vae, images, steps=args.vae_steps, rng=training.rng)
        told = train_text(pipeline, training.scenes, args.text_steps)
        training.averages = [p.detach().clone() for p in training.parameters]
        progress.seconds = time.process_time() - start
        first = {"vae_rmse": round(error, 4), "captions_told": round(told, 4), "seconds": round(progress.seconds, 1)}
        progress.rows.append(first)
        print(progress.rows[-1], flush=True)
    pipeline.vae.eval().requires_grad_(False)
    losses, start = [], time.process_time()
    while progress.step < (steps := min(args.steps, progress.steps or args.steps)):
        rate = rate_at(progress.step, steps, args.learning_rate, args.falling)
        losses.append(training.step(rate, args.batch, args.ema))
        done = progress.step
        if done % args.log_every == 0 or done == steps:
            progress.seconds += time.process_time() - start
            row = {
                "step": done,
                "seconds": round(progress.seconds, 1),
                "loss": round(torch.stack(losses).mean().item(), 4),
            }
            training.swap()
            progress.rows.append(row | measure(pipeline, tuple(SAMPLERS) if done == steps else QUICK))
            training.swap()
            print(progress.rows[-1], flush=True)
            if progress.steps is None and done < (1 - args.falling) * steps and settled(progress.rows):
                progress.steps = math.ceil(done / (1 - args.falling))  # the rate falls from here
            losses, start = [], time.process_time()
        if done % args.save_every == 0 or done == steps:
            progress.seconds += time.process_time() - start
            training.save()
            start = time.process_time()
    training.swap()
    for module in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        module.eval().requires_grad_(False)
    pipeline.to(torch.float16).save_pretrained(args.output)  # half the size; loaded as float32
    (args.output / "pretraining.jsonl").write_text("".join(json.dumps(row) + "\n" for row in progress.rows))


if __name__ == "__main__":
    main()
