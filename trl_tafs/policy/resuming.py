"""Whether a checkpoint's weights are of the run that resumes it, said before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_tafs.policy.adapter_file import WEIGHT_NAME, ranks_and_strengths, read_adapter
from trl_tafs.policy.carried import lora_layers
from trl_tafs.policy.policy import Policy


def check_resumes(policy: Policy, folder: Path, settings: Mapping[str, Any]) -> None:
    """Compare what a checkpoint's weights act on, and how strongly, with the policy; nothing is loaded.

    Args:
        policy: the resuming run's.
        folder: of the checkpoint.
        settings: those that it was made with.

    Raises:
        ValueError: another kind of training, layers, rank or strength, or other frozen adapters beneath.
    """
    is_lora, trains_lora = (folder / WEIGHT_NAME).is_file(), not policy.config.full_finetuning
    if is_lora != trains_lora:
        found, asked = ("a LoRA", "the whole denoiser") if is_lora else ("a whole denoiser", "a LoRA")
        raise ValueError(
            f"checkpoint {folder} holds {found}, and this run trains {asked}; resume with full_finetuning={not is_lora}"
        )
    if not trains_lora:
        return
    _check_frozen(policy, folder, json.loads(settings.get("frozen_adapters", "[]")))
    saved = ranks_and_strengths(*read_adapter(folder, denoiser=policy.pipeline.denoiser_name))
    name = policy.adapter_name
    layers = {path: layer for path, layer in lora_layers(policy.pipeline.denoiser) if name in layer.scaling}
    instead = f"or begin a new run from it with adapter_name_or_path={str(folder)!r}"
    if other := sorted(saved.keys() ^ layers.keys()):
        has = "the checkpoint's alone" if other[0] in saved else "this run's alone"
        raise ValueError(
            f"checkpoint {folder} has a LoRA on {len(saved)} layers, and this run on {len(layers)} ({other[0]!r} is on "
            f"{has}); resume with its lora_target_modules, {settings.get('lora_target_modules')}, {instead}"
        )
    for path, (rank, strength) in saved.items():
        own_rank, own = layers[path].r[name], layers[path].scaling[name]
        if rank != own_rank:
            raise ValueError(
                f"checkpoint {folder} has a LoRA of rank {rank} on {path!r}, and this run's is of {own_rank}; resume "
                f"with the lora_rank that it has, {instead}"
            )
        if abs(strength - own) > 1e-6 * abs(strength):
            raise ValueError(
                f"checkpoint {folder} has a LoRA of strength {strength:g} on {path!r}, alpha {strength * rank:g} at "
                f"rank {rank} (without rslora), and this run's is {own:g}: it would act {own / strength:g} times as "
                f"strongly at once; resume with the lora_alpha that it has, {instead}"
            )


def _check_frozen(policy: Policy, folder: Path, before: list[dict[str, Any]]) -> None:
    now = [{"name": adapter.name, "weight": adapter.weight, "digest": adapter.digest} for adapter in policy.frozen]
    if before != now:
        raise ValueError(
            f"checkpoint {folder} was trained above the frozen adapters {_told(before)}, and this run's pipeline has "
            f"{_told(now)}; load the same adapters with the same weights, in the same order"
        )


def _told(adapters: list[dict[str, Any]]) -> str:
    shown = [f"{a['name']} (weight {a['weight']}, digest {a['digest']})" for a in adapters]
    return ", ".join(shown) or "none"
