"""Pre-train the embedded pipeline on real handwritten digits: `python examples/digits/pretrain.py`.

First the VAE, then the transformer together with the text encoders, by flow matching. A stated share of the
captions names a wrong digit, as captions on the web do, and a tenth is left empty so that guidance works.
Bit-equal when run again at the same number of threads.
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
from digits_components import PIPELINE, build_pipeline
from digits_data import TEMPLATES, load_split, prompt_for
from digits_report import quick_figures
from digits_sampling import Text, encode_images, encode_prompts, velocity
from torch import Tensor, nn

WRONG_CAPTIONS = 0.5
EMPTY_CAPTIONS = 0.1
PROMPTS = [prompt_for(digit, t) for t in range(len(TEMPLATES)) for digit in range(10)] + [""]
Rng = torch.Generator


def captions(labels: Tensor, wrong: float, empty: float, rng: Rng) -> Tensor:
    """The row of PROMPTS for each image: a template by chance, the digit wrong or the text empty at times."""
    n = len(labels)
    other = (labels + torch.randint(1, 10, (n,), generator=rng)) % 10
    digit = torch.where(torch.rand(n, generator=rng) < wrong, other, labels)
    row = 10 * torch.randint(len(TEMPLATES), (n,), generator=rng) + digit
    return torch.where(torch.rand(n, generator=rng) < empty, len(PROMPTS) - 1, row)


def noise_levels(n: int, rng: Rng) -> Tensor:
    """Half uniform, half logit-normal, of it: few-step samplers need the ends, the middle is the hardest."""
    uniform = torch.rand(n, generator=rng)
    middle = torch.randn(n, generator=rng).sigmoid()
    return torch.where(torch.rand(n, generator=rng) < 0.5, uniform, middle)


def flow_loss(transformer: nn.Module, x0: Tensor, text: Text, rng: Rng) -> Tensor:
    """Mean squared error of v = eps - x_0 at x_s = (1 - s) x_0 + s eps."""
    s = noise_levels(len(x0), rng)
    eps = torch.randn(x0.shape, generator=rng)
    level = s.view(-1, 1, 1, 1)
    return F.mse_loss(velocity(transformer, (1 - level) * x0 + level * eps, s, text), eps - x0)


@torch.no_grad()
def held_out_loss(pipeline: StableDiffusion3Pipeline, repeats: int = 8) -> float:
    """The flow loss on digits that the generator never saw (split "reward"), captions as noisy."""
    images, labels = load_split("reward")
    x0, labels, rng = encode_images(pipeline, images).repeat(repeats, 1, 1, 1), labels.repeat(repeats), Rng()
    rng.manual_seed(1)
    tokens, pooled = encode_prompts(pipeline, PROMPTS)
    row = captions(labels, WRONG_CAPTIONS, EMPTY_CAPTIONS, rng)
    losses = [
        flow_loss(pipeline.transformer, x, (tokens[r], pooled[r]), rng).item() * len(x)
        for x, r in zip(x0.split(449), row.split(449), strict=True)
    ]
    return sum(losses) / len(x0)


def train_vae(vae: nn.Module, images: Tensor, *, steps: int, seed: int, batch: int = 128) -> float:
    """Fit the VAE to digits and noisy mixtures of them, the latent tied to the gray image; returns the RMSE.

    At 8x8 there is nothing to compress: the latent is the picture up to scale, and the VAE costs no fidelity.
    """
    rng = Rng().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    vae.train()
    for _ in range(steps):
        first, second = (images[torch.randint(len(images), (batch,), generator=rng)] for _ in range(2))
        part = torch.rand((batch, 1, 1, 1), generator=rng).clamp(min=0.5)
        strength = 0.3 * torch.rand((batch, 1, 1, 1), generator=rng)
        noise = torch.randn((batch, 1, 8, 8), generator=rng)
        x = 2 * (part * first + (1 - part) * second) - 1 + strength * noise
        posterior = vae.encode(x).latent_dist
        gray = x.mean(1, keepdim=True)
        spread = (posterior.logvar + 8).square().mean()
        loss = F.mse_loss(vae.decode(posterior.mean).sample, x) + F.mse_loss(posterior.mean, gray)
        loss = loss + 1e-4 * spread
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    vae.eval()
    with torch.no_grad():
        x = 2 * images - 1
        latents = vae.encode(x).latent_dist.mode()
        vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
        return (vae.decode(latents).sample - x).square().mean().sqrt().item() / 2


def train_flow(
    pipeline: StableDiffusion3Pipeline,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    learning_rate: float = 5e-4,
    batch: int = 256,
    ema: float = 0.998,
    warmup: int = 100,
    wrong_captions: float = WRONG_CAPTIONS,
    train_text: bool = False,
    log_every: int = 0,
    log: Callable[[dict], None] = print,
) -> list[dict]:
    """Train the pipeline's transformer in place by flow matching, for `steps` or `seconds`; its EMA remains.

    AdamW, warm-up, cosine decay over the given length. With `train_text` the text encoders learn too. Given a
    loaded pipeline this is pre-training continued on the same data. Returns the logged rows (EMA weights).
    """
    if (seconds is None) == (steps is None):
        raise ValueError("give train_flow either seconds or steps")
    images, labels = load_split("base")
    with torch.no_grad():
        latents = encode_images(pipeline, images)
        tokens, pooled = encode_prompts(pipeline, PROMPTS)
    names = ["transformer", *(["text_encoder", "text_encoder_2", "text_encoder_3"] if train_text else [])]
    modules = [getattr(pipeline, name).train().requires_grad_(True) for name in names]
    parameters = [p for module in modules for p in module.parameters()]
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    rng, rows, start, step, running = Rng().manual_seed(seed), [], time.perf_counter(), 0, 0.0
    while True:
        done = step / steps if steps else (time.perf_counter() - start) / seconds
        if done >= 1:
            break
        decay = 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / warmup) * decay
        if train_text:
            tokens, pooled = encode_prompts(pipeline, PROMPTS)
        index = torch.randint(len(latents), (batch,), generator=rng)
        row = captions(labels[index], wrong_captions, EMPTY_CAPTIONS, rng)
        loss = flow_loss(pipeline.transformer, latents[index], (tokens[row], pooled[row]), rng)
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
            row["train_loss"] = round(running / log_every, 4)
            rows.append(row | _measure(pipeline, parameters, averages))
            running = 0.0
            log(rows[-1])
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    for module in modules:
        module.eval().requires_grad_(False)
    return rows


@torch.no_grad()
def _measure(pipeline: StableDiffusion3Pipeline, parameters: list[Tensor], averages: list[Tensor]) -> dict[str, float]:
    """Held-out flow loss and judges with the averaged weights; the weights in training come back after."""
    kept = [p.clone() for p in parameters]
    for parameter, average in zip(parameters, averages, strict=True):
        parameter.copy_(average)
    row = {"held_out_loss": round(held_out_loss(pipeline), 4)} | quick_figures(pipeline)
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.copy_(value)
    return row


def main() -> None:
    """Train and save the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae_steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--wrong_captions", type=float, default=WRONG_CAPTIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="the shipped weights were made with one")
    parser.add_argument("--log_every", type=int, default=500, help="0 for no curve")
    parser.add_argument("--output", default=str(PIPELINE))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)  # else summing gradients of repeated prompts is not, on threads
    start = time.perf_counter()
    pipeline = build_pipeline(args.seed)
    rmse = train_vae(pipeline.vae, load_split("base")[0], steps=args.vae_steps, seed=args.seed)
    print(f"VAE: RMSE {rmse:.4f} of the range, {time.perf_counter() - start:.0f} s", flush=True)
    rows = train_flow(
        pipeline,
        steps=args.steps,
        seed=args.seed,
        learning_rate=args.learning_rate,
        wrong_captions=args.wrong_captions,
        train_text=True,
        log_every=args.log_every,
        log=lambda row: print(json.dumps(row), flush=True),
    )
    pipeline.save_pretrained(args.output)
    if rows:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path(args.output, "pretraining.jsonl").write_text(lines)
    seconds, threads = time.perf_counter() - start, torch.get_num_threads()
    print(f"{seconds:.0f} s with {threads} threads, saved to {args.output}")


if __name__ == "__main__":
    main()
