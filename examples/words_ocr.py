"""The second embedded default: teach a model that writes words to be read, at 4 steps, by the reward of an OCR engine.

    python examples/words_ocr.py                                  # or: make words
    python examples/words_ocr.py --size large --setting clipped --seed 1

The policy is a LoRA on the pipeline in `words/pipeline_<size>/` (D = 1,536 or 4,320), sampled in 4 annealed steps
without guidance. The reward is rapidocr's recogniser, 1 - the normalised edit distance to the asked word. Judged on
words that neither pre-training nor training saw, by it, by an older recogniser and by pixel statistics. Writes
`runs/words_<size>_<setting>_<seed>/`: summary.json, grids, the adapter.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "words"))

import diffusers
import torch
import transformers
from timed_training import train
from words_components import MAX_LENGTH, load
from words_data import COLOURS, HELD_OUT_WORDS, LAYOUTS, TRAIN_WORDS, prompt_for, random_strings
from words_judges import ColourJudge, OCRJudge, OCRReward, PrintJudge

from trl_tafs import TAFSGRPOConfig, TAFSGRPOTrainer, TAFSStableDiffusion3Pipeline
from trl_tafs.evaluation.drawing import Drawer, DrawSpec
from trl_tafs.output.pictures import sample_grid, save_png
from trl_tafs.presets import PRESETS
from trl_tafs.prompts.encoder import PromptEncoder

NAMES = list(COLOURS)
# words alone teach those words: strings teach the letters (docs/learning.md)
TRAIN_PROMPTS = [(prompt_for(word, colour), {}) for word in (*TRAIN_WORDS, *random_strings(1000)) for colour in NAMES]
HELD_OUT_PROMPTS = [prompt_for(word, NAMES[i % len(NAMES)]) for i, word in enumerate(HELD_OUT_WORDS)]
# words of which nothing is reported: learning rates are chosen by them
CHOICE_PROMPTS = [prompt_for(word, NAMES[i % len(NAMES)]) for i, word in enumerate(TRAIN_WORDS[::4])]
ROWS = {  # sampler, steps, guidance
    "4 annealed steps": ("annealed", 4, 1.0),
    "8 annealed steps": ("annealed", 8, 1.0),
    "4 ODE steps": ("ode", 4, 1.0),
    "32 ODE steps": ("ode", 32, 1.0),
    "32 ODE steps, guidance 3": ("ode", 32, 3.0),
}
TRAINED_ROW = "4 annealed steps"


class Panel:
    """All judges on the held-out words, with fixed noise."""

    def __init__(self, size: str, images_per_word: int, seed: int, words: int = len(HELD_OUT_WORDS)) -> None:
        """Judge `images_per_word` images of each of the first held-out words, their noise keyed by `seed`."""
        self.layout, self.seed = LAYOUTS[size], seed
        self.prompts = [prompt for prompt in HELD_OUT_PROMPTS[:words] for _ in range(images_per_word)]
        self.images_per_word = images_per_word
        self.judges = {judge.__name__: judge for judge in (OCRReward(), OCRJudge(), ColourJudge(), PrintJudge())}

    def images(self, pipeline, sampler: str, num_steps: int, guidance: float = 1.0) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1]."""
        device, dtype = torch.device("cpu"), torch.float32
        encode = PromptEncoder(pipeline, device, guidance_scale=guidance, max_sequence_length=MAX_LENGTH)
        velocity, seed = pipeline.velocity, self.seed
        drawer = Drawer(pipeline, encode, velocity, batch_size=46, seed=seed, device=device, storage_dtype=dtype)
        spec = DrawSpec(sampler, num_steps, self.layout.height, self.layout.width, guidance)
        return drawer.images(spec, self.prompts, range(len(self.prompts)))

    def row(self, pipeline, sampler: str, num_steps: int, guidance: float = 1.0) -> dict[str, float]:
        """Each judge's mean, and the standard error of the reward's, whose units are words."""
        images = self.images(pipeline, sampler, num_steps, guidance)
        values = {name: torch.as_tensor(judge(images, self.prompts)) for name, judge in self.judges.items()}
        words = values["ocr"].reshape(-1, self.images_per_word).mean(1)
        row = {name: value.mean().item() for name, value in values.items()}
        row |= {"stderr": words.std().item() / math.sqrt(len(words))}
        return {name: round(value, 4) for name, value in row.items()}


def save_grid(panel: Panel, pipeline, path: Path, title: str, columns: int = 6, rows: int = 6) -> None:
    """Held-out words, one image each."""
    images = panel.images(pipeline, "annealed", 4)[:: panel.images_per_word][: rows * columns]
    words = [prompt.split()[0] for prompt in HELD_OUT_PROMPTS[: rows * columns]]
    labels = [" ".join(words[r * columns : (r + 1) * columns]) for r in range(rows)]
    save_png(sample_grid(images.unflatten(0, (rows, columns)), labels, [""] * columns, title), path)


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """A markdown table of named rows."""
    columns, width = list(next(iter(rows.values()))), max(map(len, rows))
    print(f"| {'':{width}} | " + " | ".join(f"{name:>10}" for name in columns) + " |")
    print(f"|{'-' * (width + 2)}|" + "|".join("-" * 11 + ":" for _ in columns) + "|")
    for name, row in rows.items():
        print(f"| {name:{width}} | " + " | ".join(f"{row[column]:10.3f}" for column in columns) + " |")


COMMON = {
    "mixed_precision": "no",
    "max_sequence_length": MAX_LENGTH,
    "save_freq": 100,
    "num_checkpoint_limit": 1,
    "sample_batch_size": 48,
    "sample_num_batches_per_epoch": 2,
    "num_generations": 12,
    "train_batch_size": 48,
    "train_learning_rate": 1e-3,
    "train_use_ema": True,
    "train_ema_decay": 0.9,
    "sample_grid_freq": 50,
}
SETTINGS = {  # each objective as docs/learning.md found it best; epochs for two to three minutes of one core
    "tafs": {"train_learning_rate": 3e-3, "num_epochs": 38},
    "forward": {
        "objective": "forward",
        "forward_levels": "trajectory",
        "beta": 0.2,
        "train_learning_rate": 5e-4,
        "num_epochs": 60,
    },
    "clipped": {
        "objective": "clipped",
        "train_level_weighting": "balanced",
        "step_credit": "reward_to_go",
        "num_epochs": 38,
    },
    "paper": {**PRESETS["paper"], "beta": 0.0, "num_epochs": 38},
}


def make_config(args: argparse.Namespace, folder: Path) -> TAFSGRPOConfig:
    """Eight prompts of 12 images an epoch, one optimizer step each, and the setting's own options."""
    layout = LAYOUTS[args.size]
    options = COMMON | SETTINGS[args.setting] | args.options
    return TAFSGRPOConfig(
        exp_name="words",
        seed=args.seed,
        project_kwargs={"project_dir": str(folder)},
        height=layout.height,
        width=layout.width,
        **options | ({} if args.epochs is None else {"num_epochs": args.epochs}),
    )


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(LAYOUTS), default="small")
    parser.add_argument("--setting", choices=list(SETTINGS), default="tafs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="by default the setting's")
    parser.add_argument("--seconds", type=float, help="of CPU time to train for, instead of a number of epochs")
    parser.add_argument("--options", type=json.loads, default={}, help="more of TAFSGRPOConfig's, as JSON")
    parser.add_argument("--reward", choices=["edit", "ctc"], default="edit", help="trained on; judged is edit always")
    parser.add_argument("--after", nargs="+", choices=list(ROWS), default=list(ROWS)[:4], help="rows judged after it")
    parser.add_argument("--images_per_word", type=int, default=2, help="images of each held-out word that are judged")
    parser.add_argument("--words", type=int, default=len(HELD_OUT_WORDS), help="held-out words that are judged")
    parser.add_argument("--output_dir", type=Path, help="by default runs/words_<size>_<setting>_<seed>")
    parser.add_argument("--base", type=Path, help="the base's figures, read where the file is there, else written")
    return parser.parse_args()


def judged_base(panel: Panel, pipeline, path: Path | None) -> dict[str, dict[str, float]]:
    """The base by all rows of `ROWS`; its noise is fixed, so that a file of an earlier run serves as well."""
    if path is not None and path.exists():
        return json.loads(path.read_text())
    rows = {name: panel.row(pipeline, *row) for name, row in ROWS.items()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1))
    return rows


def main() -> None:
    """Judge the base, train, judge again."""
    args = parse_args()
    folder = args.output_dir or Path("runs") / f"words_{args.size}_{args.setting}_{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    pipeline = load(args.size, TAFSStableDiffusion3Pipeline)
    panel = Panel(args.size, args.images_per_word, seed=1000, words=args.words)
    dimension = math.prod(pipeline.latent_shape(panel.layout.height, panel.layout.width))
    print(f"D = {dimension:,}; judging the base on {args.words} held-out words ...", flush=True)
    before = judged_base(panel, pipeline, args.base)
    save_grid(panel, pipeline, folder / "grid_before.png", "before: 4 annealed steps, no guidance")

    trainer = TAFSGRPOTrainer(make_config(args, folder), {"ocr": OCRReward(args.reward)}, TRAIN_PROMPTS, pipeline)
    seconds, cpu_seconds = train(trainer, args.seconds)
    print(
        f"trained {trainer.progress.epoch} epochs in {seconds:.0f} s ({cpu_seconds:.0f} s of CPU); judging ...",
        flush=True,
    )
    with trainer.policy.averaged():  # what was saved
        after = {name: panel.row(pipeline, *ROWS[name]) for name in args.after}
        save_grid(panel, pipeline, folder / "grid_after.png", "after: 4 annealed steps, no guidance")
    print_table({f"before, {k}": v for k, v in before.items()} | {f"after, {k}": v for k, v in after.items()})
    summary = {"D": dimension, "size": args.size, "setting": args.setting, "seed": args.seed}
    summary |= {"options": args.options, "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
    summary |= {"epochs": trainer.progress.epoch, "before": before, "after": after}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
