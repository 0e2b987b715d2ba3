"""LoRA files in the format that plain diffusers loads: write, read, check.

A folder holds `pytorch_lora_weights.safetensors` with the LoRA's configuration in its header, and
`scheduler/scheduler_config.json`, the sampler. A file is written beside its place and renamed into it: an interrupted
save leaves the old one or the new, whole.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trl_tafs.output.errors import first_line
from trl_tafs.output.files import write_whole
from trl_tafs.pipelines.components import denoiser_name, denoiser_of, is_text_encoder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from peft import LoraConfig


logger = logging.getLogger(__name__)


WEIGHT_NAME = "pytorch_lora_weights.safetensors"


SCHEDULER_FILE = "scheduler/scheduler_config.json"


# How and where the adapter was trained, which loading it doesn't need. A dropout in the metadata would even act
# at inference, since diffusers leaves the layers that it injects in training mode.
_NOT_PUBLISHED = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "runtime_config"),
    *("base_model_name_or_path", "revision", "init_lora_weights", "lora_dropout"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}


# Diffusers before 0.38 reads the two patterns without asking whether they are there.
_ALWAYS_PUBLISHED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


# These change the base's weights, so that the LoRA alone is not the difference to the published base.
_BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")


# These train weights that diffusers' LoRA loader refuses or ignores.
_NOT_IN_THE_FORMAT = (
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
)


def lora_metadata(config: LoraConfig) -> dict[str, Any]:
    """Return a `LoraConfig` as the header of an adapter's file has it: all that loading at the right strength needs.

    `r`, `lora_alpha`, `target_modules` and the rank and alpha patterns, and beyond them every field that departs from
    PEFT's default (rslora, DoRA, ...), so that a plain LoRA also loads in an older PEFT.

    Raises:
        ValueError: a LoRA that diffusers' format cannot hold (biases, whole modules), or whose initialisation
            changes the base's weights (PiSSA, OLoRA, LoftQ, CorDA).
    """
    from peft import LoraConfig

    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise ValueError(
            f"init_lora_weights={init!r} changes the base model's weights, so the adapter would be wrong on "
            "the published ones; use init_lora_weights=True or 'gaussian'"
        )
    for name in _NOT_IN_THE_FORMAT:
        if (value := getattr(config, name, None)) not in (None, "none", []):
            raise ValueError(f"diffusers' LoRA format cannot hold {name}={value!r}; leave it out")
    usual = LoraConfig().to_dict()
    metadata = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name not in _NOT_PUBLISHED and (name in _ALWAYS_PUBLISHED or value != usual.get(name))
    }
    if not metadata.get("target_modules"):
        raise ValueError("the LoraConfig names no target_modules; give the one the adapter was attached with")
    return metadata


def save_adapter(
    pipeline: DiffusionPipeline,
    folder: str | os.PathLike,
    *,
    lora_config: LoraConfig,
    state_dict: dict[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    scheduler_config: dict[str, Any] | None = None,
    annealed: bool = True,
    fold_alpha: bool = False,
) -> Path:
    """Write the LoRA of the pipeline's denoiser, in float32, and the scheduler that samples it.

    Args:
        pipeline: whose `transformer` (or what `pipeline.denoiser_name` names) carries the adapter.
        folder: made if missing; its other files are left alone.
        lora_config: the configuration that the adapter was attached with.
        state_dict: weights to write instead of the attached ones (an EMA of them), as PEFT names them.
        adapter_name: which of the attached adapters.
        scheduler_config: instead of the pipeline's; `stochastic_sampling` is set to `annealed` in either case.
        annealed: whether the adapter is to be sampled by annealing, or by the ODE.
        fold_alpha: multiply the strength into the weights, for tools that ignore the metadata; see `folded_alpha`.

    Raises:
        ValueError: no such adapter, weights of other names, or a LoRA that the format cannot hold.
    """
    denoiser = denoiser_name(pipeline)
    layers = _adapter_layers(denoiser_of(pipeline), adapter_name, state_dict)
    if fold_alpha:
        layers, lora_config = folded_alpha(layers, lora_config)
    metadata = lora_metadata(lora_config)
    given = {f"{denoiser}_lora_layers": layers, f"{denoiser}_lora_adapter_metadata": metadata}

    def write_weights(path: Path) -> None:
        type(pipeline).save_lora_weights(path.parent, weight_name=path.name, **given)

    write_scheduler(pipeline, folder, scheduler_config, annealed)
    write_whole(Path(folder, WEIGHT_NAME), write_weights)  # last: where the weights are, everything is
    return Path(folder)


def _adapter_layers(
    denoiser: torch.nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    from peft.utils import get_peft_model_state_dict

    attached = list(getattr(denoiser, "peft_config", {}))
    if adapter_name not in attached:
        raise ValueError(f"no adapter {adapter_name!r} on {type(denoiser).__name__}; attached are {attached}")
    layers = get_peft_model_state_dict(denoiser, adapter_name=adapter_name)
    if state_dict is not None:
        if wrong := sorted(layers.keys() ^ state_dict.keys()):
            where = "state_dict" if wrong[0] in state_dict else "the adapter"
            raise ValueError(f"{len(wrong)} names are not in both, the first {wrong[0]!r}, only in {where}")
        layers = state_dict
    return {name: layers[name].detach().to("cpu", torch.float32).contiguous() for name in sorted(layers)}


def ranks_and_strengths(layers: Mapping[str, torch.Tensor], config: LoraConfig) -> dict[str, tuple[int, float]]:
    """Return each module's rank and strength, alpha / r (rslora: alpha / sqrt(r)), by the header's rules."""
    from peft.utils.other import get_pattern_key

    found, patterns = {}, config.alpha_pattern
    for key, weight in layers.items():
        if key.endswith(".lora_B.weight") and weight.ndim > 1:
            module, rank = key.removesuffix(".lora_B.weight"), weight.shape[1]
            alpha = patterns.get(get_pattern_key(patterns, module), config.lora_alpha)
            found[module] = rank, alpha / (rank**0.5 if config.use_rslora else rank)
    return found


def folded_alpha(layers: dict[str, torch.Tensor], config: LoraConfig) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Return the LoRA with its strength in the weights: B times alpha / r (rslora: alpha / sqrt(r)), and alpha = r.

    Tools that ignore the file's metadata (ComfyUI, `load_lora_weights` of a dict) then apply it at the right strength.
    A power of two, such as the default 64 / 32, changes no bit of what diffusers computes; others round.
    """
    strengths = ranks_and_strengths(layers, config)
    folded = {
        key: weight * strengths[key.partition(".lora_B")[0]][1] if ".lora_B." in key else weight
        for key, weight in layers.items()
    }
    settings = {"lora_alpha": config.r, "use_rslora": False, "alpha_pattern": dict(config.rank_pattern)}
    return folded, type(config)(**(lora_metadata(config) | settings))


def write_scheduler(
    pipeline: DiffusionPipeline,
    folder: str | os.PathLike,
    scheduler_config: Mapping[str, Any] | None = None,
    annealed: bool = True,
) -> None:
    """Write `scheduler/scheduler_config.json`, the sampler: of `scheduler_config`, or of the pipeline's own one."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if scheduler_config is None and hasattr(pipeline, "annealed_scheduler"):
        scheduler = pipeline.annealed_scheduler() if annealed else pipeline.euler_scheduler()
    else:
        config = pipeline.scheduler.config if scheduler_config is None else scheduler_config
        config = {name: value for name, value in config.items() if not name.startswith("_")}  # no _name_or_path
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=annealed)
    write_whole(Path(folder, SCHEDULER_FILE), scheduler.to_json_string())


def read_adapter(
    source: str | os.PathLike,
    *,
    weight_name: str = WEIGHT_NAME,
    revision: str | None = None,
    token: str | None = None,
    denoiser: str = "transformer",
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Read an adapter to continue from, of diffusers' format.

    Args:
        source: a file, a folder, or a repository on the Hub.
        weight_name: the file in a folder or repository.
        revision: branch, tag or commit of a repository.
        token: for a private repository; the stored one if None.
        denoiser: the pipeline's component that the adapter belongs to.

    Returns:
        The state dict as PEFT names it on the denoiser, and the `LoraConfig` of the file's metadata. Without
        metadata the ranks are the tensors' and alpha equals the rank, as diffusers has it; a warning says so.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a torn file, one of another format (PEFT's, kohya's, a UNet's), one where a layer lacks its A or B,
            or whose ranks are not the metadata's.
    """
    path, name = _adapter_file(source, weight_name, revision, token)
    weights, header = _read_safetensors(path, name)
    prefix = f"{denoiser}."
    layers = {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
    if len(layers) < len(weights) or not layers or not all(".lora_" in key for key in layers):
        raise AdapterFormatError(_wrong_format(name, weights, prefix))
    _check_pairs(name, layers)
    config = _lora_config(name, layers, header, prefix)
    _check_ranks(name, layers, config)
    return layers, config


def _adapter_file(
    source: str | os.PathLike, weight_name: str, revision: str | None, token: str | None
) -> tuple[str, str]:
    """Return the file on this machine, and what to call it in an error."""
    path = Path(source)
    if path.is_file():
        return str(path), str(path)
    if path.is_dir():
        if (path / weight_name).is_file():
            return str(path / weight_name), str(path / weight_name)
        found = sorted(file.name for file in path.iterdir())[:8]
        peft = " (adapter_model.safetensors is PEFT's format)" if "adapter_model.safetensors" in found else ""
        raise FileNotFoundError(
            f"no {weight_name} in {path}, found {found}{peft}; give the folder that save_pretrained wrote, "
            "or a weight_name"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        file = hf_hub_download(str(source), weight_name, revision=revision, token=token)
    except (OSError, HFValidationError) as error:  # every answer of the Hub but the file is an OSError
        raise FileNotFoundError(
            f"no adapter at {str(source)!r}: it is no file or folder here, and the Hub gave no {weight_name} "
            f"({first_line(error)}); give a folder or a repository that does, and a token if it is private"
        ) from error
    return file, f"{source}/{weight_name}"


def _read_safetensors(path: str, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}
            header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"{name} ({os.path.getsize(path)} bytes) is torn, or no safetensors file: {first_line(error)}; "
            "copy or download it again, or give an earlier checkpoint's"
        ) from error
    return weights, header


class AdapterFormatError(ValueError):
    """A file of another format than diffusers' for a LoRA of the denoiser alone."""


def _wrong_format(name: str, weights: dict[str, torch.Tensor], prefix: str) -> str:
    key = next((key for key in weights if not key.startswith(prefix) or ".lora_" not in key), None)
    expected = f"expected keys such as '{prefix}<module>.lora_A.weight'"
    if key is None:
        return f"{name} holds no weights; {expected}"
    if key.startswith("base_model.model."):
        return (
            f"{name} is in PEFT's format ({key!r}), which diffusers loads as nothing: take "
            "'base_model.model.' off its keys and write it by save_lora_weights(transformer_lora_layers=..., "
            "transformer_lora_adapter_metadata=...), the metadata from its adapter_config.json"
        )
    if is_text_encoder(key):
        return f"{name} also adapts a text encoder ({key!r}), which isn't trained here; save it without"
    return (
        f"{name} holds {key!r}, as {guess_family(weights)} has; {expected}. A LoRA for this model in another "
        "format: load it with the pipeline's load_lora_weights and save it with save_lora_weights"
    )


def _lora_config(name: str, layers: dict[str, torch.Tensor], header: dict[str, Any], prefix: str) -> LoraConfig:
    from peft import LoraConfig

    ranks = {f"^{key}": w.shape[1] for key, w in layers.items() if "lora_B" in key and w.ndim > 1}
    if not ranks:
        raise ValueError(f"{name} holds no lora_B weights, so no rank; it is torn, or no LoRA")
    settings = {key.removeprefix(prefix): header[key] for key in header if key.startswith(prefix)}
    if not settings:
        from diffusers.utils import get_peft_kwargs

        settings = get_peft_kwargs(ranks, network_alpha_dict=None, peft_state_dict=layers)
        logger.warning("%s has no metadata: alpha is taken as the rank, %d, as diffusers does", name, settings["r"])
    rank = settings.get("r")
    if rank not in ranks.values() and not settings.get("rank_pattern"):
        raise ValueError(f"{name}: r={rank} in its metadata, {sorted(set(ranks.values()))} in its weights")
    try:
        return LoraConfig(**settings)
    except TypeError as error:  # a field of a newer PEFT
        raise ValueError(f"{name}: this PEFT cannot read its LoraConfig ({error}); upgrade peft") from error


def _check_pairs(name: str, layers: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError if a layer has A without B, or B without A: its LoRA would act as nothing, or as noise."""
    down, up = ({key.partition(half)[0] for key in layers if half in key} for half in (".lora_A", ".lora_B"))
    if lonely := sorted(down ^ up):
        has, lacks = ("lora_A", "lora_B") if lonely[0] in down else ("lora_B", "lora_A")
        raise ValueError(
            f"{name}: {len(lonely)} of {len(down | up)} layers are halves, the first {lonely[0]!r}, which has {has} "
            f"and lacks {lacks}; the file was cut, give the whole one"
        )


def _check_ranks(name: str, layers: Mapping[str, torch.Tensor], config: LoraConfig) -> None:
    """Raise ValueError if a layer has another rank than the configuration gives it."""
    from peft.utils.other import get_pattern_key

    for module, (rank, _) in ranks_and_strengths(layers, config).items():
        expected = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
        down = layers.get(f"{module}.lora_A.weight")
        if rank != expected or (down is not None and down.shape[0] != rank):
            found = f"{rank}" if down is None or down.shape[0] == rank else f"{down.shape[0]} in A and {rank} in B"
            raise ValueError(
                f"{name}: the rank of {module!r} is {found}, and the metadata's is {expected}: mixed ranks need "
                "a rank_pattern there; give the file as it was saved"
            )


def missing_layers(names: Iterable[str], config: LoraConfig, denoiser: torch.nn.Module) -> list[str]:
    """Return the layers that a LoRA's configuration targets and its weights, `names`, leave out."""
    from peft.tuners.tuners_utils import check_target_module_exists

    there = {name.partition(".lora_")[0] for name in names}
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    linear = [n for n, m in denoiser.named_modules() if isinstance(getattr(m, "base_layer", m), kinds)]
    targets = [] if config.target_modules == "all-linear" else linear
    return [name for name in targets if name not in there and check_target_module_exists(config, name)]


def incomplete(names: Iterable[str], config: LoraConfig, denoiser: torch.nn.Module) -> str | None:
    """Say which of the layers that its metadata targets an adapter lacks; None if it is whole."""
    names = list(names)
    if not (missing := missing_layers(names, config, denoiser)):
        return None
    whole = len({name.partition(".lora_")[0] for name in names}) + len(missing)
    return (
        f"the adapter lacks {len(missing)} of the {whole} layers that its metadata targets, the first {missing[0]!r}: "
        "it is a part of one"
    )


# Parts of keys that no family of the package has.
_FOREIGN = {
    "lora_unet_": "a UNet in kohya's format (SD 1.5 or SDXL)",
    "unet.": "a UNet (SD 1.5 or SDXL)",
}


def guess_family(keys: Iterable[str]) -> str:
    """Return the model family that a LoRA's keys look like, in words."""
    from trl_tafs.pipelines import auto

    text = "\n".join(keys)
    foreign = next((family for part, family in _FOREIGN.items() if part in text), None)
    other = "a diffusers transformer" if "transformer_blocks." in text else "an unknown family"
    return foreign or auto.guess_family([text]) or other


def check_adapter_fits(
    state_dict: dict[str, torch.Tensor], transformer: torch.nn.Module, config: LoraConfig | None = None
) -> None:
    """Check that every LoRA weight has its layer in `transformer`, of the right shape: A (r, in), B (out, r).

    Raises:
        ValueError: names the first weight that does not fit, and the family that the adapter looks like; or the layers
            that `config` targets and the weights leave out.
    """
    modules = dict(transformer.named_modules())
    model = type(transformer).__name__
    for key, weight in state_dict.items():
        path, _, part = key.partition(".lora_")
        layer = getattr(modules.get(path), "base_layer", modules.get(path))
        if layer is None:
            raise ValueError(
                f"the adapter has {key!r} {tuple(weight.shape)}, and {model} no layer {path!r}: it looks "
                f"like one for {guess_family(state_dict)}; give one trained on this base model"
            )
        if weight.ndim < 2 or part[0] not in "AB":
            continue
        of = "features" if hasattr(layer, "in_features") else "channels"
        size_in, size_out = getattr(layer, f"in_{of}"), getattr(layer, f"out_{of}")
        dim, size = (1, size_in) if part[0] == "A" else (0, size_out)
        if weight.shape[dim] != size:
            raise ValueError(
                f"the adapter's {key} is {tuple(weight.shape)}, and {model} maps {size_in} to {size_out} "
                f"{of} there: it looks like one for {guess_family(state_dict)} of another size; give one "
                "trained on this base model"
            )
    if config is not None and (fault := incomplete(state_dict, config, transformer)):
        raise ValueError(f"{fault}; give the whole file")
