"""Pre-train the words pipeline of one size: `python examples/words/words_pretrain.py --size small`.

First the VAE, then the transformer together with the text encoders, by flow matching on letters drawn on the fly. After
the first steps, in which it learns to spell, a stated share of the captions names another word, as captions on the web
do; a tenth is left empty so that guidance works. Held-out words are never drawn. Bit-equal when run again at the same
number of threads.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from words_components import build_pipeline, pipeline_folder
from words_data import COLOURS, HELD_OUT_WORDS, LAYOUTS, LETTERS, prompt_for, random_ground, render, training_letters
from words_judges import OCRReward
from words_sampling import encode_images, encode_prompts, layout_of, sample, shifted, velocity

WRONG_CAPTIONS = 0.6
EMPTY_CAPTIONS = 0.1
SPELLING_STEPS = 1500  # all captions are right so long: letters are learned in a third of the time
Rng = torch.Generator


def draw(count: int, size: str, wrong: float, rng: Rng) -> tuple[Tensor, list[str]]:
    """Images (B, 3, H, W) with their captions, some of which name another word or nothing."""
    letters, colours = training_letters(count, rng), torch.randint(len(COLOURS), (count,), generator=rng)
    images = render(letters, colours, random_ground(count, rng), size)
    named = torch.where(torch.rand((count, 1), generator=rng) < wrong, training_letters(count, rng), letters)
    empty = (torch.rand(count, generator=rng) < EMPTY_CAPTIONS).tolist()
    names = list(COLOURS)
    words = ["".join(LETTERS[i] for i in row) for row in named.tolist()]
    prompts = [prompt_for(word, names[c]) for word, c in zip(words, colours.tolist(), strict=True)]
    return images, ["" if gone else prompt for gone, prompt in zip(empty, prompts, strict=True)]


def noise_levels(count: int, rng: Rng) -> Tensor:
    """Half uniform, half logit-normal: few-step samplers need the ends, the middle is the hardest."""
    uniform = torch.rand(count, generator=rng)
    middle = torch.randn(count, generator=rng).sigmoid()
    return torch.where(torch.rand(count, generator=rng) < 0.5, uniform, middle)


def train_vae(
    vae: nn.Module,
    images: Callable[[int], Tensor],
    *,
    steps: int,
    rng: Rng,
    batch: int = 32,
    learning_rate: float = 5e-3,
) -> float:
    """Fit the VAE to images (B, 3, H, W) under noise, the latent tied to the pixels; returns the RMSE in [0, 1].

    At this size there is nothing to compress: the latent is the picture up to scale, and the VAE costs no fidelity.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    vae.train()
    for _ in range(steps):
        x = 2 * images(batch) - 1
        x = x + 0.3 * torch.rand((batch, 1, 1, 1), generator=rng) * torch.randn(x.shape, generator=rng)
        posterior = vae.encode(x).latent_dist
        spread = (posterior.logvar + 8).square().mean()
        loss = F.mse_loss(vae.decode(posterior.mean).sample, x) + F.mse_loss(posterior.mean, x) + 1e-4 * spread
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    vae.eval().requires_grad_(False)
    x = 2 * images(256) - 1
    latents = vae.encode(x).latent_dist.mode()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return (vae.decode(latents).sample - x).square().mean().sqrt().item() / 2


def flow_loss(pipeline: StableDiffusion3Pipeline, images: Tensor, prompts: list[str], rng: Rng) -> Tensor:
    """Mean squared error of v = eps - x_0 at x_s = (1 - s) x_0 + s eps."""
    with torch.no_grad():
        x0 = encode_images(pipeline, images)
    s, eps = shifted(pipeline, noise_levels(len(x0), rng)), torch.randn(x0.shape, generator=rng)
    level = s.view(-1, 1, 1, 1)
    v = velocity(pipeline.transformer, (1 - level) * x0 + level * eps, s, encode_prompts(pipeline, prompts))
    return F.mse_loss(v, eps - x0)


def train_flow(
    pipeline: StableDiffusion3Pipeline,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    spelling_steps: int = 0,
    rng: Rng,
    learning_rate: float = 1e-3,
    batch: int = 64,
    ema: float = 0.999,
    warmup: int = 100,
    log_every: int = 0,
    log: Callable[[dict], None] = print,
) -> list[dict]:
    """Train transformer and text encoders in place by flow matching, for `steps` or `seconds`; their EMA remains.

    AdamW, warm-up, cosine decay over the given length. Returns the logged rows (EMA weights).
    """
    if (seconds is None) == (steps is None):
        raise ValueError("give train_flow either seconds or steps")
    size = next(name for name, layout in LAYOUTS.items() if layout == layout_of(pipeline))
    modules = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    parameters = [p for module in modules for p in module.train().requires_grad_(True).parameters()]
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    rows, start, step, running = [], time.perf_counter(), 0, 0.0
    while True:
        done = step / steps if steps else (time.perf_counter() - start) / seconds
        if done >= 1:
            break
        decay = 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / warmup) * decay
        wrong = WRONG_CAPTIONS if step >= spelling_steps else 0.0
        loss = flow_loss(pipeline, *draw(batch, size, wrong, rng), rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        weight = 1 - min(ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], weight)
        running += loss.item()
        if log_every and step % log_every == 0:
            row = {"step": step, "seconds": round(time.perf_counter() - start, 1)}
            rows.append(row | {"train_loss": round(running / log_every, 4)} | _measure(pipeline, parameters, averages))
            running = 0.0
            log(rows[-1])
    _swap(parameters, averages)
    for module in modules:
        module.eval().requires_grad_(False)
    return rows


def _swap(parameters: list[Tensor], averages: list[Tensor]) -> None:
    for i, parameter in enumerate(parameters):
        parameter.data, averages[i] = averages[i], parameter.data


def _measure(pipeline: StableDiffusion3Pipeline, parameters: list[Tensor], averages: list[Tensor]) -> dict[str, float]:
    """The reward on held-out words with the averaged weights; the weights in training come back after."""
    _swap(parameters, averages)
    figures = quick_figures(pipeline)
    _swap(parameters, averages)
    return figures


def quick_figures(pipeline: StableDiffusion3Pipeline) -> dict[str, float]:
    """The reward on each held-out word once, at 4 annealed and 32 ODE steps, the latter also with guidance 3."""
    names, judge = list(COLOURS), OCRReward()
    prompts = [prompt_for(word, names[i % len(names)]) for i, word in enumerate(HELD_OUT_WORDS)]
    settings = {"annealed_4": (4, "annealed", 1.0), "ode_32": (32, "ode", 1.0), "ode_32_guided": (32, "ode", 3.0)}
    figures = {}
    for name, (steps, sampler, guidance) in settings.items():
        images = sample(pipeline, prompts, steps=steps, sampler=sampler, guidance=guidance)
        figures[name] = round(sum(judge(images, prompts)) / len(prompts), 3)
    return figures


def main() -> None:
    """Train and save the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(LAYOUTS), required=True)
    parser.add_argument("--vae_steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--log_every", type=int, default=500)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="by default where the examples load it from")
    args = parser.parse_args()
    folder = args.output or pipeline_folder(args.size)
    rng, start, rows = Rng().manual_seed(args.seed), time.perf_counter(), []

    def log(row: dict) -> None:
        rows.append(json.dumps(row))
        print(rows[-1], flush=True)

    pipeline = build_pipeline(args.size, args.seed)
    error = train_vae(pipeline.vae, lambda n: draw(n, args.size, 0.0, rng)[0], steps=args.vae_steps, rng=rng)
    log({"vae_rmse": round(error, 4), "seconds": round(time.perf_counter() - start, 1)})
    train_flow(
        pipeline,
        steps=args.steps,
        spelling_steps=SPELLING_STEPS,
        rng=rng,
        learning_rate=args.learning_rate,
        log_every=args.log_every,
        log=log,
    )
    pipeline.to(torch.float16).save_pretrained(folder)  # half the size; loaded as float32
    (folder / "pretraining.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
