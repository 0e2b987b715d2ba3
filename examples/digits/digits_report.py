"""What the shipped pipeline does, by all judges: `python examples/digits/digits_report.py`."""

import argparse
import json
import time

import torch
from diffusers import StableDiffusion3Pipeline
from digits_components import PIPELINE
from digits_data import load_split, prompt_for
from digits_judges import DigitReward, HeldOutJudge, OCRJudge, diversity, fidelity
from digits_sampling import sample
from torch import Tensor

ROWS = [(sampler, steps, 1.0) for sampler in ("annealed", "ode") for steps in (2, 4, 8)]
ROWS += [("ode", 32, guidance) for guidance in (1.0, 1.5, 2.0, 3.0, 5.0)]
ROWS += [("annealed", 4, 2.0), ("annealed", 4, 3.0), ("annealed", 32, 1.0)]


def figures(images: Tensor, labels: Tensor, judges: dict) -> dict[str, float]:
    """Accuracy by each judge, fidelity (Frechet distance, 0 is best), diversity (1 is as diverse as real)."""
    prompts = [prompt_for(int(label)) for label in labels]
    values = {name: judge.accuracy(images, prompts) for name, judge in judges.items()}
    values |= {"fidelity": fidelity(images, labels), "diversity": diversity(images, labels)}
    return {name: round(value, 3) for name, value in values.items()}


def quick_figures(pipeline: StableDiffusion3Pipeline, images_per_digit: int = 30) -> dict[str, float]:
    """Reward and held-out accuracy and fidelity at 4 annealed steps and at 32 ODE steps with guidance 3."""
    labels = torch.arange(10).repeat(images_per_digit)
    judges = {"reward": DigitReward(), "held_out": HeldOutJudge()}
    few = figures(sample(pipeline, labels), labels, judges)
    plain = figures(sample(pipeline, labels, steps=32, sampler="ode"), labels, judges)
    many = figures(sample(pipeline, labels, steps=32, sampler="ode", guidance=3.0), labels, judges)
    rows = {"annealed_4": few, "ode_32": plain, "ode_32_guided": many}
    return {f"{row}/{name}": value for row, found in rows.items() for name, value in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default=str(PIPELINE))
    parser.add_argument("--images_per_digit", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="a JSON object a row")
    args = parser.parse_args()
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.pipeline)
    judges = {"reward": DigitReward(), "held_out": HeldOutJudge(), "ocr": OCRJudge()}
    labels = torch.arange(10).repeat(args.images_per_digit)
    real, real_labels = load_split("all")
    rows = [("real digits", figures(real, real_labels, judges))]
    start = time.perf_counter()
    for sampler, steps, guidance in ROWS:
        images = sample(pipeline, labels, steps=steps, sampler=sampler, guidance=guidance, seed=args.seed)
        rows.append((f"{sampler} {steps} steps, guidance {guidance:g}", figures(images, labels, judges)))
    for name, values in rows:
        if args.json:
            print(json.dumps({"row": name} | values))
        else:
            print(f"| {name:30s} | " + " | ".join(f"{value:6.3f}" for value in values.values()) + " |")
    seconds = time.perf_counter() - start
    print(f"# {args.images_per_digit} images of each digit, {seconds:.0f} s; columns: {', '.join(values)}")


if __name__ == "__main__":
    main()
