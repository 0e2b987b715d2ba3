"""Train one tiny run a case with one tree of this project, and compare two such records bit for bit.

    PYTHONPATH=TREE:TREE/tests python bit_equal.py write OUT.pt [CASE ...]
    python bit_equal.py compare A.pt B.pt

Every case is trained for an epoch, resumed for a second one, and evaluated after each. What is compared: the trained
weights, the log, pictures and adapters, the states of the optimizer and of everything else in the last checkpoint, the
settings, and the global generator. `make gauge BASE=COMMIT` does both for a commit and the present tree.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

CASES: dict[str, dict[str, Any]] = {
    "default": {"objective": "forward"},
    "paper": {"beta": 0.0, "train_level_weighting": "gaussian"},
    "clean-group-to-go": {"sample_kernel": "clean", "clean_baseline": "group", "step_credit": "reward_to_go"},
    "clean-M": {"sample_kernel": "clean", "num_perturbations": 3},
    "branches": {
        "num_perturbations": 4,
        "antithetic_perturbations": True,
        "train_level_weighting": "balanced",
        "old_policy_decay": 0.5,
    },
    "sde-kl-guided": {
        "sample_kernel": "flow_sde",
        "beta": 0.1,
        "sample_guidance_scale": 2.5,
        "train_cfg": True,
        "negative_prompts": "two",
        "train_log_prob_reduction": "sum",
    },
    "sde-branches": {"sample_kernel": "flow_sde", "num_perturbations": 2, "sample_eta": 0.7},
    "dance-gain": {"sample_kernel": "dance_sde", "step_credit": "gain"},
    "window": {
        "sample_kernel": "cps",
        "sample_num_steps": 6,
        "sample_window_size": 2,
        "sample_window_order": "random",
    },
    "awm": {
        "objective": "awm",
        "forward_levels": "random",
        "forward_images": "every",
        "train_gradient_accumulation_steps": 1,
    },
    "awm-ode-bf16": {
        "objective": "awm",
        "sample_kernel": "ode",
        "forward_levels": "random",
        "mixed_precision": "bf16",
    },
    "forward-every-gain": {
        "objective": "forward",
        "forward_images": "every",
        "step_credit": "gain",
        "train_timestep_fraction": 0.4,
        "train_num_inner_epochs": 2,
        "beta": 0.1,
    },
    "nft-old": {
        "objective": "forward",
        "sample_kernel": "ode",
        "forward_levels": "sampler",
        "old_policy_decay": 0.9,
        "old_policy_ramp": 0.2,
    },
    "variance": {
        "group_allocation": "variance",
        "step_credit": "trace",
        "credit_trace": 1.0,
        "credit_discount": 0.5,
    },
    "streaming-async": {
        "group_allocation": "streaming",
        "objective": "forward",
        "async_reward_computation": True,
    },
    "ddpo-stats-ema": {
        "per_prompt_stat_tracking": True,
        "per_prompt_stat_tracking_min_count": 4,
        "train_use_ema": True,
        "train_num_inner_epochs": 2,
    },
    "sum-each-normalized": {
        "step_credit": "sum",
        "num_advantage_steps": 2,
        "multi_objective_aggregation": "normalize_then_sum",
        "train_level_weighting": "uniform",
    },
    "reward-to-go": {"step_credit": "reward_to_go", "num_advantage_steps": 2, "scale_rewards": "batch"},
    "terminal-fraction": {
        "step_credit": "terminal",
        "train_log_prob_reduction": "mean",
        "train_timestep_fraction": 0.7,
        "share_initial_noise": True,
        "train_lr_scheduler_type": "cosine",
        "train_lr_warmup_steps": 1,
        "train_gradient_checkpointing": True,
    },
    "full": {"full_finetuning": True, "train_learning_rate": 1e-3, "beta": 0.1},
    "offload-bf16": {"model_cpu_offload": True, "mixed_precision": "bf16", "objective": "forward"},
    "async-encoders-bf16": {
        "async_reward_computation": True,
        "offload_text_encoders": True,
        "mixed_precision": "bf16",
    },
}
TIMED = ("time", "images_per_second")  # of the log, what depends on the machine
# Settings of where a run lies, and the order in which trees before named states registered what a checkpoint holds.
NOT_COMPARED = ("project_kwargs", "exp_name", "run_name")
REGISTERED = (
    ("lr_scheduler", lambda config: True),
    ("average", lambda config: config.train_use_ema),
    ("old_policy", lambda config: config.old_policy_decay > 0),
    ("stat_tracker", lambda config: config.per_prompt_stat_tracking),
    ("prompt_tracker", lambda config: config.group_allocation != "fixed"),
)


def rewards() -> dict[str, Any]:
    """Two cheap ones with weights, the first of which depends on the prompt."""

    def bright(images: Any, prompts: Any, metadata: Any) -> Any:
        return images.mean((1, 2, 3)) + 0.01 * torch.tensor([len(p) for p in prompts])

    def red(images: Any, prompts: Any, metadata: Any) -> Any:
        return images[:, 0].mean((1, 2))

    return {"bright": (bright, 1.0), "red": (red, 0.3)}


def states(checkpoint: Path, config: Any) -> dict[str, Any]:
    """What a checkpoint holds besides weights, by name."""
    named = checkpoint / "states"
    if named.is_dir():
        return {path.stem: torch.load(path, weights_only=True) for path in sorted(named.glob("*.pt"))}
    found = {"optimizer": torch.load(checkpoint / "optimizer.bin", weights_only=True)}
    names = [name for name, there in REGISTERED if there(config)]
    for i, name in enumerate(names):
        found[name] = torch.load(checkpoint / f"custom_checkpoint_{i}.pkl", weights_only=False)
    return found


def run(case: str, changes: dict[str, Any], base: Path, folder: Path) -> dict[str, Any]:
    """One case: an epoch, a resume, a second epoch; everything that it computed."""
    import tiny
    from accelerate.state import AcceleratorState

    def made(**more: Any) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        return tiny.trainer(
            tiny.load(base),
            folder,
            rewards(),
            ["one", "two", "three", "four"],
            num_generations=4,
            sample_grid_freq=1,
            eval_prompts=["five"],
            eval_freq=1,
            **(changes | more),
        )

    torch.manual_seed(0)
    made(num_epochs=1).train()
    trainer = made(num_epochs=2, resume_from="latest")
    trainer.train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".safetensors")]
    settings = json.loads((folder / "adapter" / "training_settings.json").read_text())
    weights = {n: p.detach().clone() for n, p in trainer.sd_pipeline.denoiser.named_parameters() if p.requires_grad}
    return {
        "weights": weights,
        "states": states(sorted((folder / "checkpoints").iterdir())[-1], trainer.config),
        "log": [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines],
        "files": {str(path.relative_to(folder)): path.read_bytes() for path in files if "earlier" not in str(path)},
        "settings": {name: value for name, value in settings.items() if name not in NOT_COMPARED},
        "generator": torch.get_rng_state(),
    }


def record(names: Iterable[str]) -> dict[str, Any]:
    """Run these cases; their records."""
    import tiny

    with tempfile.TemporaryDirectory() as folder:
        root, records = Path(folder), {}
        tiny.build_pipeline(0).save_pretrained(root / "base")
        for case in names:
            start = time.process_time()
            records[case] = run(case, CASES[case], root / "base", root / case)
            print(f"{case}: {time.process_time() - start:.1f} s", flush=True)
    return records


def write(out: str, names: list[str]) -> None:
    """Run the cases, all by default, and save their records."""
    torch.save(record(names or CASES), out)


def equal(x: Any, y: Any) -> bool:
    """Whether two records are the same to the bit; NaN is NaN."""
    if isinstance(x, torch.Tensor):
        if not isinstance(y, torch.Tensor) or (x.dtype, x.shape) != (y.dtype, y.shape):
            return False
        return bool(((x == y) | ((x != x) & (y != y))).all())
    if isinstance(x, dict):
        return isinstance(y, dict) and x.keys() == y.keys() and all(equal(v, y[k]) for k, v in x.items())
    if isinstance(x, (list, tuple)):
        return type(x) is type(y) and len(x) == len(y) and all(map(equal, x, y))
    return bool(x == y or (x != x and y != y))


def content(name: str, data: bytes) -> Any:
    """A picture's bytes; a safetensors file's, its header sorted: the library writes that in no fixed order."""
    if not name.endswith(".safetensors"):
        return data
    size = int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True), data[8 + size :]


def differences(a: dict[str, Any], b: dict[str, Any], removed: tuple[str, ...] = ()) -> list[str]:
    """`case/part: names` of what differs; settings in `removed` may be missing from either."""
    found = [f"{case}: only in one" for case in sorted(a.keys() ^ b.keys())]
    for case in [case for case in a if case in b]:
        found += [f"{case}/{part}: only in one" for part in sorted(a[case].keys() ^ b[case].keys())]
        for part, x in a[case].items():
            if part not in b[case]:
                continue
            y = b[case][part]
            if part == "files":
                x, y = ({name: content(name, data) for name, data in side.items()} for side in (x, y))
            if part == "settings":
                x, y = ({name: value for name, value in side.items() if name not in removed} for side in (x, y))
            if equal(x, y):
                continue
            names = []
            if isinstance(x, dict):
                names = sorted(n for n in x.keys() | y.keys() if n not in x or n not in y or not equal(x[n], y[n]))
            found.append(f"{case}/{part}" + (f": {', '.join(names[:4])}" if names else ""))
    return found


def compare(a: str, b: str, removed: list[str]) -> int:
    """Print whether two records are bit-equal; the exit status."""
    records = [torch.load(path, weights_only=False) for path in (a, b)]  # this script's own
    found = differences(*records, tuple(removed))
    lines = [*found, f"DIFFERENT in {len(found)} places"] if found else ["bit-equal"]
    print("\n".join(lines), f"({len(records[0])} cases)")
    return int(bool(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.argv[1] == "write":
        write(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(compare(sys.argv[2], sys.argv[3], sys.argv[4:]))
