"""Named sets of options: what a method sets apart from the defaults, with its source."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # TAFS-GRPO as its paper has it (arXiv 2602.01591); steps, LoRA and AdamW are the defaults already
    "paper": {
        "objective": "clipped",  # Eq. 10
        "step_credit": "step",  # Eq. 10 credits step n with A^n
        "train_level_weighting": "gaussian",  # the density's own
        "num_perturbations": 1,  # one action a state
        "beta": 0.0,  # no KL
    },
}


def preset(name: str) -> dict[str, Any]:
    """The options of a preset.

    Raises:
        ValueError: there is none of that name; says which there are.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; use one of {', '.join(PRESETS)}")
    return dict(PRESETS[name])
