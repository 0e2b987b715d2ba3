"""What a pipeline's models hold while they work, counted on tensors without values: no weights, no device.

A twin of the denoiser, made from its configuration with a few blocks of each kind, runs on fake tensors at the size of
training, and every storage is counted from its birth to its end. What one more block of a kind adds is multiplied.
Fake tensors live on the CPU here, and compute as on a GPU: attention is fused, and autocast widens what it does there.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from trl_tafs.method.guidance import is_guided
from trl_tafs.method.types import Conditioning, Embeddings
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.components import base_dtype, unwrapped
from trl_tafs.policy.adapter_file import read_adapter
from trl_tafs.policy.base import DTYPES, cast
from trl_tafs.policy.carried import adapter_layers, carried_config, choose_adapter
from trl_tafs.policy.lora import default_lora_config
from trl_tafs.policy.lora_sum import prepare_layers
from trl_tafs.policy.options import PolicyOptions

KEPT_BLOCKS = 2  # of each kind in the smallest twin
# Functions that CUDA's autocast computes in float32 and the CPU's doesn't.
WIDENED = (functional.layer_norm, functional.group_norm, functional.softmax, torch.softmax, Tensor.softmax)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside, as long as they live.

    Attributes:
        live: bytes now.
        peak: the most at once, above what lived when it was set to `live`.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}  # weights: counted elsewhere
        self.live = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for item in tree_leaves(made):
            if isinstance(item, Tensor):
                self._count(item.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes and key not in self.known:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class WidenedAsOnGPU(TorchFunctionMode):
    """Within the CPU's autocast, compute in float32 what CUDA's autocast does."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in WIDENED and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (args, kwargs))
        return function(*args, **kwargs)


def _widened(item: Any) -> Any:
    return item.float() if isinstance(item, Tensor) and item.is_floating_point() else item


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, new tensors have no values, and functions compute as on a GPU."""
    with FakeTensorMode(), WidenedAsOnGPU(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def give_fake_weights(module: nn.Module) -> list[Tensor]:
    """Replace a module's meta tensors, inside `without_values`, by fake ones on the CPU; return them."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                new = made.setdefault(id(parameter), nn.Parameter(empty, parameter.requires_grad))
                part._parameters[name] = new
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = made.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))
        for name, value in list(vars(part).items()):  # constants that are no buffers
            if isinstance(value, Tensor):
                vars(part)[name] = made.setdefault(id(value), torch.empty(value.shape, dtype=value.dtype))
            elif isinstance(value, list) and value and all(isinstance(item, Tensor) for item in value):
                vars(part)[name] = [made.setdefault(id(v), torch.empty(v.shape, dtype=v.dtype)) for v in value]
    return list(made.values())


def same_of(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a new module of a component's class and configuration, on the meta device, in its or another dtype."""
    config = module.config
    with torch.device("meta"):
        made = type(module).from_config(config) if hasattr(module, "from_config") else type(module)(config)
    made.requires_grad_(False)
    cast(made, dtype or base_dtype(module))
    return made.eval()


# The blocks -------------------------------------------------------------------------------------------------------


def block_kinds(denoiser: nn.Module) -> dict[tuple[str, Any], list[int]]:
    """Return the transformer blocks by kind, as places in the denoiser's lists; blocks of a kind hold the same.

    They are the items of the denoiser's own module lists that have more than one linear layer, adapters aside.
    """
    found: dict[tuple[str, Any], list[int]] = {}
    for name, child in denoiser.named_children():
        for i, item in enumerate(child) if isinstance(child, nn.ModuleList) else ():
            own = ((path, module) for path, module in item.named_modules() if "lora_" not in path)
            if sum(isinstance(module, nn.Linear) for _, module in own) > 1:
                weights = ((path, p) for path, p in item.named_parameters() if "lora_" not in path)
                shapes = tuple((path.replace(".base_layer.", "."), tuple(p.shape)) for path, p in weights)
                found.setdefault((name, (type(item), shapes)), []).append(i)
    return found


def keep_blocks(denoiser: nn.Module, counts: dict[tuple[str, Any], int]) -> None:
    """Leave so many blocks of each kind, the first ones."""
    kept: dict[str, list[int]] = {}
    for kind, places in block_kinds(denoiser).items():
        kept.setdefault(kind[0], []).extend(places[: counts[kind]])
    for name, places in kept.items():
        blocks = getattr(denoiser, name)
        setattr(denoiser, name, nn.ModuleList(blocks[i] for i in sorted(places)))


# The twin ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Bytes that one piece of work holds, or numbers of parameters; they can be added and multiplied."""

    evaluation: int = 0  # peak of an evaluation without gradient
    update: int = 0  # peak of an evaluation with its backward pass
    trained: int = 0  # parameters

    def plus(self, other: Held, times: int = 1) -> Held:
        """Return `self + times * other`."""
        return Held(
            self.evaluation + times * other.evaluation,
            self.update + times * other.update,
            self.trained + times * other.trained,
        )


@dataclass
class Simulation:
    """The working memory of a pipeline under a configuration, at a size in pixels.

    Args:
        pipeline: its models may lie anywhere, the meta device as well; they aren't touched.
        height: pixels.
        width: pixels.
        lora_config: a LoRA of the user's instead of the default one.
    """

    pipeline: TAFSPipelineMixin
    height: int
    width: int
    lora_config: Any | None = None
    notes: list[str] = field(default_factory=list)
    _cache: dict[Any, Held] = field(default_factory=dict)
    _decoded: dict[Any, int] = field(default_factory=dict)

    def denoiser(self, config: PolicyOptions, rows: int, *, update: bool, beside: bool = False) -> Held:
        """Return what the denoiser holds for `rows` rows, besides its weights and their gradients.

        Args:
            config: precision, guidance, checkpointing, LoRA or full fine-tuning.
            rows: states at once; with guidance each is evaluated twice.
            update: an evaluation with gradient and its backward pass; else without.
            beside: another evaluation without gradient is held beside the graph.
        """
        twin = _TwinKey(
            rows,
            update,
            beside,
            config.train_gradient_checkpointing if update else False,
            is_guided(config.sample_guidance_scale),
            config.mixed_precision,
            config.full_finetuning,
            config.lora_rank,
            config.max_sequence_length,
        )
        if twin not in self._cache:
            self._cache[twin] = self._extrapolated(config, twin)
        return self._cache[twin]

    def _extrapolated(self, config: PolicyOptions, key: _TwinKey) -> Held:
        kinds = block_kinds(self.pipeline.denoiser)
        counts = {kind: min(len(places), KEPT_BLOCKS) for kind, places in kinds.items()}
        least = total = self.measured(config, key, counts)
        for kind, places in kinds.items():
            if key.update and len(places) > counts[kind]:  # without gradient blocks come and go
                more = self.measured(config, key, counts | {kind: counts[kind] + 1})
                total = total.plus(more.plus(least, -1), len(places) - counts[kind])
        return total

    def measured(self, config: PolicyOptions, key: _TwinKey, counts: dict[tuple[str, Any], int] | None = None) -> Held:
        """Return what a twin with so many blocks of each kind (None: all of them) holds."""
        twin = self.twin(config, counts)
        denoiser = twin.denoiser
        trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        if key.checkpointing:
            denoiser.enable_gradient_checkpointing(_checkpointed)
        with without_values():
            weights = give_fake_weights(denoiser)
            for parameter in denoiser.parameters():
                if parameter.requires_grad:  # gradients are counted beside the weights
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
            live = LiveBytes(weights)
            with live:
                work = _work(twin, config, key, (self.height, self.width))
                work()
        number = sum(parameter.numel() for parameter in trained)
        return Held(update=live.peak, trained=number) if key.update else Held(evaluation=live.peak, trained=number)

    def twin(self, config: PolicyOptions, counts: dict[tuple[str, Any], int] | None = None) -> TAFSPipelineMixin:
        """Return a pipeline like this one, whose denoiser lies on the meta device with what is trained on it."""
        pipeline, original = self.pipeline, self.pipeline.denoiser
        dtype = torch.float32 if config.full_finetuning else DTYPES[config.mixed_precision]
        denoiser = same_of(original, dtype)
        if counts is not None:
            keep_blocks(denoiser, counts)
        told = pipeline.stand_in_for_values(denoiser)
        if told is not None and told not in self.notes:
            self.notes.append(told)
        twin = copy.copy(pipeline)
        vars(twin)[pipeline.denoiser_name] = denoiser
        if config.full_finetuning:
            denoiser.requires_grad_(True)
            return twin
        chosen = choose_adapter(original, config, self.lora_config)
        for name in chosen.beneath:
            denoiser.add_adapter(carried_config(original, name), name)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            denoiser.add_adapter(self._lora_of(twin, config, chosen), chosen.name)
        denoiser.requires_grad_(False)
        denoiser.set_adapters([*chosen.beneath, chosen.name])
        for name, parameter in denoiser.named_parameters():
            if f".{chosen.name}." in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        prepare_layers(adapter_layers(denoiser), config.mixed_precision)  # as the policy does: fewer copies are held
        return twin

    def _lora_of(self, twin: TAFSPipelineMixin, config: PolicyOptions, chosen: Any) -> Any:
        if not chosen.is_new:
            return carried_config(self.pipeline.denoiser, chosen.name)
        if self.lora_config is not None:
            return copy.deepcopy(self.lora_config)
        if config.adapter_name_or_path:
            return read_adapter(config.adapter_name_or_path, denoiser=self.pipeline.denoiser_name)[1]
        return default_lora_config(twin, config)

    def decoding(self, images: int, tiling: bool) -> int:
        """Return what the VAE holds while it decodes `images` at once, besides its weights."""
        if (images, tiling) not in self._decoded:
            vae = same_of(unwrapped(self.pipeline.vae), None)
            twin = copy.copy(self.pipeline)
            vars(twin)["vae"] = vae
            if tiling:
                vae.enable_tiling()
            with without_values():
                live = LiveBytes(give_fake_weights(vae))
                with live, torch.no_grad():
                    shape = self.pipeline.latent_shape(self.height, self.width)
                    twin.decode_latents(torch.zeros(images, *shape, dtype=torch.float32))
            self._decoded[images, tiling] = live.peak
        return self._decoded[images, tiling]

    def conditioning_bytes(self, config: PolicyOptions) -> int:
        """Return the bytes of one encoded prompt."""
        with without_values():
            dtype = DTYPES[config.mixed_precision] or base_dtype(self.pipeline.denoiser)
            made = example_conditioning(self.pipeline, config, 1, dtype)
        return sum(conditioned.numel() * conditioned.element_size() for conditioned in tensors_of(made))


@dataclass(frozen=True)
class _TwinKey:
    """What the working memory of the denoiser depends on."""

    rows: int
    update: bool
    beside: bool
    checkpointing: bool
    guided: bool
    precision: str
    full: bool
    rank: int
    length: int | None


def _checkpointed(module: nn.Module, *args: Any) -> Any:
    """Checkpoint as diffusers does; what is computed again in the backward pass is widened, too."""
    contexts = nullcontext(), WidenedAsOnGPU()
    return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=lambda: contexts)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def tensors_of(conditioning: Conditioning) -> list[Tensor]:
    """Return all tensors of a conditioning."""
    halves = (conditioning.positive, conditioning.negative)
    return [value for half in halves if half is not None for value in vars(half).values() if isinstance(value, Tensor)]


def example_conditioning(
    pipeline: TAFSPipelineMixin, config: PolicyOptions, rows: int, dtype: torch.dtype
) -> Conditioning:
    """Return a conditioning of the shapes that encoded prompts have at their full length."""
    length = config.max_sequence_length or pipeline.default_max_sequence_length()
    if pipeline.text_multiple is not None:
        length = -(-length // pipeline.text_multiple) * pipeline.text_multiple
    shapes = pipeline.embedding_shapes(length)
    made = {name: torch.zeros(rows, *shape, dtype=dtype) for name, shape in shapes.items() if name != "mask"}
    if "mask" in shapes:
        made["mask"] = torch.ones(rows, *shapes["mask"], dtype=torch.int64)
    scale = pipeline.embedded_guidance(config.sample_embedded_guidance_scale)
    if scale is not None:
        made["guidance"] = torch.full((rows,), scale)
    half, guidance = Embeddings(**made), config.sample_guidance_scale
    return Conditioning(half, half if is_guided(guidance) else None, float(guidance))


def _work(twin: TAFSPipelineMixin, config: PolicyOptions, key: _TwinKey, size: tuple[int, int]) -> Callable[[], None]:
    """Return one evaluation of the twin, as the trainer makes it, with its backward pass if there is one."""
    dtype = DTYPES[config.mixed_precision]
    frozen_dtype = dtype or base_dtype(twin.denoiser)

    def evaluate(x: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        return twin.velocity(x, level, conditioning, model)

    def model(*args: Any, **kwargs: Any) -> Any:
        with nullcontext() if dtype is None else torch.autocast("cpu", torch.bfloat16):
            return tree_map(_widened, twin.denoiser(*args, **kwargs)) if dtype else twin.denoiser(*args, **kwargs)

    model.modules, model.config = twin.denoiser.modules, twin.denoiser.config

    def work() -> None:
        conditioning = example_conditioning(twin, config, key.rows, frozen_dtype)
        storage = twin.latent_dtype or frozen_dtype
        x, level = torch.zeros(key.rows, *twin.latent_shape(*size), dtype=storage), torch.full((key.rows,), 0.5)
        if not key.update:
            with torch.no_grad():
                evaluate(x, level, conditioning)
            return
        with torch.enable_grad():
            velocity = evaluate(x, level, conditioning)
            if key.beside:
                with torch.no_grad():
                    evaluate(x, level, conditioning)
            velocity.square().mean().backward()

    return work
