"""The main job on the embedded default: train a 4-step generator of handwritten digits, and show what it gained.

    python examples/digits/quickstart.py            # or: make quickstart, or from the wheel: trl-tafs quickstart

The policy is a LoRA on the pipeline in `pipeline/`, sampled in 4 annealed steps without guidance; the reward is a
classifier, no gradient of which is used. Judged by it, by a classifier trained on other data, and by an OCR engine
that nobody here trained. Writes `runs/quickstart/`: summary.json, grids, curve, report, the adapter. What the extra
`trl_tafs[quickstart]` brings and isn't there (scikit-learn's digits, the OCR engine, matplotlib) is left out, and said.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import diffusers
import torch
import transformers
from digits_data import DIGIT_WORDS, prompt_for
from digits_judges import DigitReward, HeldOutJudge, OCRJudge, diversity, fidelity
from pretrain import train_flow

from trl_tafs import TAFSGRPOConfig, TAFSGRPOTrainer, TAFSStableDiffusion3Pipeline
from trl_tafs.evaluation.drawing import Drawer, DrawSpec
from trl_tafs.hub.card import usage_code
from trl_tafs.method.kernels import Annealed
from trl_tafs.method.noise import SampleNoise
from trl_tafs.method.rollout import sample_steps
from trl_tafs.output.pictures import sample_grid, save_png
from trl_tafs.prompts.encoder import PromptEncoder

PIPELINE = Path(__file__).resolve().parent / "pipeline"
PROMPTS = [prompt_for(digit) for digit in range(10)]
STEP_COUNTS = (2, 4, 8)
COLUMNS = ("reward", "held_out", "ocr", "fidelity", "diversity")
GUIDANCE = 3.0
NEEDS = {
    "ocr": ("rapidocr", "onnxruntime"),
    "fidelity": ("sklearn",),
    "diversity": ("sklearn",),
    "curve": ("matplotlib",),
}


def missing() -> dict[str, list[str]]:
    """What can't be had here, each with the packages that it needs."""
    absent = {what: [name for name in names if find_spec(name) is None] for what, names in NEEDS.items()}
    return {what: names for what, names in absent.items() if names}


class Panel:
    """All judges on one fixed set of prompts and noise."""

    def __init__(self, images_per_digit: int, seed: int) -> None:
        """Judge `images_per_digit` images of each digit, their noise keyed by `seed`."""
        self.labels = torch.arange(10).repeat_interleave(images_per_digit)
        self.prompts = [PROMPTS[label] for label in self.labels]
        without = missing()
        self.judges = {"reward": DigitReward(), "held_out": HeldOutJudge()}
        self.judges |= {} if "ocr" in without else {"ocr": OCRJudge()}
        self.columns = [name for name in COLUMNS if name not in without]
        self.seed = seed

    def row(self, pipeline, sampler: str, num_steps: int, guidance: float = 1.0) -> dict[str, float]:
        """Accuracy by each judge, Frechet distance and diversity of one sampler's images."""
        encode, device = PromptEncoder(pipeline, torch.device("cpu"), guidance_scale=guidance), torch.device("cpu")
        count, velocity = len(self.labels), pipeline.velocity
        drawer = Drawer(pipeline, encode, velocity, count, self.seed, device, storage_dtype=torch.float32)
        images = drawer.images(DrawSpec(sampler, num_steps, 8, 8, guidance), self.prompts, range(count))
        values = {name: judge.accuracy(images, self.prompts) for name, judge in self.judges.items()}
        if "fidelity" in self.columns:
            values |= {"fidelity": fidelity(images, self.labels), "diversity": diversity(images, self.labels)}
        return {name: round(values[name], 4) for name in self.columns}

    def table(self, pipeline) -> dict[str, dict[str, dict[str, float]]]:
        """Both samplers at every step count."""
        return {s: {str(n): self.row(pipeline, s, n) for n in STEP_COUNTS} for s in ("annealed", "ode")}


@torch.no_grad()
def save_grid(pipeline, path: Path, title: str, samples: int = 6) -> None:
    """A row a digit: the clean estimate at each of 4 steps, then the results from other noise."""
    encode = PromptEncoder(pipeline, torch.device("cpu"))
    noise = SampleNoise(1, -2, tuple(range(10 * (samples + 1))))
    prompts = [prompt for prompt in PROMPTS for _ in range(samples + 1)]
    levels = pipeline.rollout_levels(4, 8, 8)
    x = noise("initial", 0, pipeline.latent_shape(8, 8))
    steps = [s.clean for s in sample_steps(pipeline.velocity, Annealed(), encode(prompts), levels, x, noise)]
    estimates = torch.stack([pipeline.decode_latents(clean) for clean in steps], 1).unflatten(0, (10, samples + 1))
    images = torch.cat([estimates[:, 0], estimates[:, 1:, -1]], 1)
    columns = [f"step {n + 1}" for n in range(4)] + ["result"] * samples
    save_png(sample_grid(images, DIGIT_WORDS, columns, title), path)


def save_curve(trainer, path: Path) -> None:
    """Reward by epoch, and the held-out judge at 4 annealed steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*trainer.progress.reward_curve, strict=True), label="reward in training")
    for name, label in (("reward", "reward, fixed noise"), ("held_out", "held-out judge, fixed noise")):
        points = [(e["epoch"], e[f"eval/annealed_4/{name}"]) for e in trainer.progress.evaluations]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="epoch", ylabel="probability of the asked digit", ylim=(0, 1), title="4 annealed steps")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """A markdown table of named rows."""
    width, columns = max(map(len, rows)), list(next(iter(rows.values())))
    print(f"| {'':{width}} | " + " | ".join(f"{name:>9}" for name in columns) + " |")
    print(f"|{'-' * (width + 2)}|" + "|".join("-" * 10 + ":" for _ in columns) + "|")
    for name, row in rows.items():
        print(f"| {name:{width}} | " + " | ".join(f"{value:9.3f}" for value in row.values()) + " |")


def check_adapter(trainer, folder: Path) -> str:
    """Run the lines that load the adapter in plain diffusers; the image must be the trained policy's, bit for bit."""
    near = partial(os.path.relpath, start=Path.cwd())
    code = usage_code(trainer.publisher.facts(folder, None), base=near(PIPELINE), adapter=near(folder))
    code = code.replace('"image.png"', f'"{near(folder.parent / "image.png")}"')
    scope: dict = {}
    torch.manual_seed(0)
    exec(code, scope)
    pipe, prompt = scope["pipe"], trainer.publisher.card_prompts()[0]
    call = {"num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 1.0, "output_type": "pt"}
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    plain = pipe(prompt, height=8, width=8, latents=noise, max_sequence_length=8, **call).images
    torch.manual_seed(1)
    with trainer.policy.averaged():
        policy = trainer.sd_pipeline.annealed_rollout(prompt, latents=noise)
    if not torch.equal(plain, trainer.sd_pipeline.decode_latents(policy.final)):
        raise RuntimeError("the adapter in plain diffusers doesn't draw what the trained policy draws")
    return code


def settings(args: argparse.Namespace) -> TAFSGRPOConfig:
    """Six digits of 32 images an epoch, one optimizer step each."""
    return TAFSGRPOConfig(
        exp_name="quickstart",
        seed=args.seed,
        project_kwargs={"project_dir": str(args.output_dir)},
        mixed_precision="no",
        num_epochs=args.epochs,
        save_freq=16,
        num_checkpoint_limit=2,
        sample_batch_size=192,
        sample_num_batches_per_epoch=1,
        num_generations=32,
        train_batch_size=192,
        train_learning_rate=args.learning_rate,
        train_use_ema=True,  # the noise of the last updates isn't saved
        train_ema_decay=0.9,
        objective=args.objective,
        train_level_weighting=args.level_weighting,
        step_credit=args.step_credit,
        eval_freq=8,
        eval_num_steps=[4],
        eval_samplers=["annealed"],
        eval_images_per_prompt=20,
        sample_grid_freq=16,
        picture_freq=8,
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--objective", default="matched", choices=["matched", "clipped", "forward", "awm"])
    parser.add_argument("--level_weighting", help="see TAFSGRPOConfig.train_level_weighting")
    parser.add_argument("--step_credit", default="step")
    parser.add_argument("--images_per_digit", type=int, default=50, help="images of each digit that are judged")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    return parser.parse_args(argv)


def load() -> TAFSStableDiffusion3Pipeline:
    """The embedded pipeline, quietly."""
    pipeline = TAFSStableDiffusion3Pipeline.from_pretrained(PIPELINE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, train, measure again."""
    args, without = parse_args(argv), missing()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    if without:
        print(f'without {", ".join(without)}, which `pip install "trl_tafs[quickstart]"` brings', flush=True)
    pipeline, panel = load(), Panel(args.images_per_digit, seed=1000)
    base = copy.deepcopy(pipeline.transformer)
    print("judging the base model ...", flush=True)
    before = panel.table(pipeline)
    many = {
        "base, 32 ODE steps": panel.row(pipeline, "ode", 32),
        f"base, 32 ODE steps, guidance {GUIDANCE:g}": panel.row(pipeline, "ode", 32, GUIDANCE),
        f"base, 4 annealed steps, guidance {GUIDANCE:g}": panel.row(pipeline, "annealed", 4, GUIDANCE),
    }
    save_grid(pipeline, args.output_dir / "grid_before.png", "before: 4 annealed steps, no guidance")

    trainer = TAFSGRPOTrainer(
        settings(args),
        {"reward": DigitReward()},
        [(prompt, {}) for prompt in PROMPTS],
        pipeline,
        eval_prompts=PROMPTS,
        eval_reward_function={"reward": panel.judges["reward"], "held_out": panel.judges["held_out"]},
    )
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    print(f"trained {args.epochs} epochs in {seconds:.0f} s; judging ...", flush=True)
    with trainer.policy.averaged():  # the average is what is saved
        after = panel.table(pipeline)
        save_grid(pipeline, args.output_dir / "grid_after.png", "after: 4 annealed steps, no guidance")
    if "curve" not in without:
        save_curve(trainer, args.output_dir / "curve.png")
    if "fidelity" not in without:  # there are digits
        further = load()
        further.transformer = base
        train_flow(further, seconds=seconds, seed=args.seed)
        many[f"base pre-trained {seconds:.0f} s further, 4 annealed steps"] = panel.row(further, "annealed", 4)

    rows = {}
    for sampler in ("annealed", "ode"):
        for n in map(str, STEP_COUNTS):
            rows |= {
                f"before, {n} {sampler} steps": before[sampler][n],
                f"after, {n} {sampler} steps": after[sampler][n],
            }
    print_table(rows | many)
    summary = {"before": before, "after": after, "others": many, "epochs": args.epochs}
    summary |= {"images": len(panel.prompts), "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
    (args.output_dir / "summary.json").write_text(json.dumps(summary | {"seed": args.seed}, indent=1))
    code = check_adapter(trainer, args.output_dir / "adapter")
    print(f"\nThe adapter in plain diffusers, as just run (bit-equal to the trained policy):\n\n{code}")


if __name__ == "__main__":
    main()
