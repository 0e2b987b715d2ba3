"""What a run will need of a GPU's memory, said before it needs it.

The weights, gradients and optimizer states are counted. Activations are measured on the model itself at two small
sizes, one row each, and extrapolated: with fused attention they grow linearly with an image's tokens. What the rewards
and the CUDA context hold isn't counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trl_tafs.method.guidance import is_guided
from trl_tafs.method.types import Conditioning
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.policy.carried import fake_parameters
from trl_tafs.policy.policy import Policy
from trl_tafs.training.options import TrainingOptions

GIB = 2**30


OPTIMIZER_BYTES = {False: 8, True: 2}  # of a trained parameter: two float32 moments, or two of 8 bits


@dataclass(frozen=True)
class Activations:
    """Bytes of one row (a state and its conditioning) in the denoiser."""

    saved: int  # kept for the backward pass, without gradient checkpointing
    block_inputs: int  # kept with it
    num_blocks: int

    @property
    def block(self) -> int:
        """Of one block alone: what a forward pass without gradient and a recomputed block hold."""
        return self.saved // self.num_blocks


@dataclass(frozen=True)
class Footprint:
    """What the parts of a run weigh, in bytes."""

    denoiser: int  # frozen weights
    text_encoders: int
    vae: int
    trained_parameters: int  # their number; float32
    activations: Activations  # at the training size
    decoded_image: int  # working memory of the VAE's decoder for one image
    latent_elements: int  # D
    storage_bytes: int  # of an element of states and actions
    fake_parameters: int = 0  # of distribution matching's fake score; float32, and not counted in `denoiser`


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, by phase and by what holds them."""

    phases: dict[str, dict[str, int]]

    def peak(self, phase: str | None = None) -> int:
        """Return the peak of a phase, or of the run."""
        if phase is None:
            return max(self.peak(name) for name in self.phases)
        return sum(self.phases[phase].values())

    def report(self, capacity: int | None = None) -> str:
        """Return a table in GiB, a column a phase; `capacity` is the device's."""
        names = list(dict.fromkeys(name for parts in self.phases.values() for name in parts))
        rows = [(name, [parts.get(name, 0) for parts in self.phases.values()]) for name in names]
        rows.append(("together", [self.peak(phase) for phase in self.phases]))
        lines = [f"{'memory plan, GiB':22}" + "".join(f"{phase:>10}" for phase in self.phases)]
        lines += [f"{name:22}" + "".join(f"{value / GIB:10.2f}" for value in values) for name, values in rows]
        lines.append(f"peak {self.peak() / GIB:.2f} GiB, rewards and CUDA context not counted")
        if capacity is not None and self.peak() > capacity:
            lines[-1] += (
                f"; the device has {capacity / GIB:.2f}: lower train_batch_size or sample_batch_size, or see "
                "docs/memory.md"
            )
        return "\n".join(lines)


def plan_memory(footprint: Footprint, options: TrainingOptions, local_images: int) -> MemoryPlan:
    """Add up what each phase of a run holds at once.

    Args:
        footprint: of the parts.
        options: batch sizes, checkpointing, offloading, optimizer, averages.
        local_images: of one process in an epoch; their rollouts are kept until the update is done.
    """
    guided = 2 if is_guided(options.sample_guidance_scale) else 1
    # a guided teacher is evaluated beside the policy's graph; the fake score learns when that is gone
    teacher = options.matches_distribution and is_guided(options.teacher_guidance(False))
    trained, rows = 4 * footprint.trained_parameters, footprint.activations
    fake, moments = 4 * footprint.fake_parameters, OPTIMIZER_BYTES[options.train_use_8bit_adam]
    always = {
        "trained weights": trained,
        "optimizer": moments * footprint.trained_parameters,
        "fake score": fake + moments * footprint.fake_parameters,
        "averages": trained * (options.train_use_ema + bool(options.old_policy_decay) + options.full_finetuning),
    }
    offload, offload_text = options.model_cpu_offload, options.model_cpu_offload or options.offload_text_encoders
    denoiser = {"denoiser": footprint.denoiser}
    vae = {"vae": footprint.vae}
    text = {} if offload_text else {"text encoders": footprint.text_encoders}
    resident = always | text | ({} if offload else vae)
    kept = footprint.latent_elements * rollout_bytes(options, footprint.storage_bytes)
    items = footprint.latent_elements * item_bytes(options, footprint.storage_bytes)
    experience = {"rollouts": kept * local_images}
    waiting = local_images if offload else options.sample_batch_size  # taking turns, all are drawn before one is scored
    scored = {
        "scored latents": 4
        * footprint.latent_elements
        * options.num_trained_steps
        * options.num_perturbations
        * waiting
    }
    if options.train_gradient_checkpointing:
        activations = rows.block_inputs + 2 * rows.block
    else:
        activations = rows.saved + rows.block
    phases = {
        "encode": always | ({} if offload else denoiser | vae) | {"text encoders": footprint.text_encoders},
        "rollout": resident
        | denoiser
        | experience
        | scored
        | {"activations": guided * options.sample_batch_size * rows.block},
        "decode": resident
        | vae
        | ({} if offload else denoiser)
        | experience
        | scored
        | {"activations": options.decode_size * footprint.decoded_image},
        "update": resident
        | denoiser
        | {"rollouts": (kept + items) * local_images, "gradients": trained + fake}
        | {"activations": options.train_batch_size * (guided * activations + teacher * rows.block)},
    }
    return MemoryPlan({phase: {k: v for k, v in parts.items() if v} for phase, parts in phases.items()})


def rollout_bytes(options: TrainingOptions, storage_bytes: int) -> int:
    """Return the bytes that are kept of one image's rollout until the update, for each latent element."""
    kernel, needs = options.kernel_class, options.objective_class.rollout_needs(options)
    steps, actions = options.num_trained_steps, options.num_perturbations
    states, branches = (steps if "states" in needs else 0), 0
    if "actions" in needs:
        on_path = kernel.action_is_state and actions == 1
        states, branches = (steps + 1, 0) if on_path else (states, steps * actions)
    clean = options.sample_num_steps if "clean" in needs else 0  # what only a sample grid shows is on the CPU
    return storage_bytes * (states + branches + options.matches_final_state) + 4 * (clean + 1)


def item_bytes(options: TrainingOptions, storage_bytes: int) -> int:
    """Return the bytes of one image's minibatch items, for each latent element.

    An objective of your own is taken to make items like the package's. Estimates wait for the fake score's steps.
    """
    matched = (1 if options.matches_final_state else options.num_replayed_rows) * options.matches_distribution
    if options.from_actions:
        return options.rows_per_image * storage_bytes * (1 + options.num_perturbations) + 4 * matched
    # state, clean image, velocity of the old policy
    return options.rows_per_image * (storage_bytes + 4 + 4) + 4 * matched


def announce_plan(policy: Policy, conditioning: Conditioning, local_images: int, size: tuple[int, int]) -> MemoryPlan:
    """Print what the run will hold, before it does, and return it.

    Without progress bars nothing is printed, unless the device is too small.

    Args:
        policy: what is trained, with its pipeline and options.
        conditioning: of one prompt.
        local_images: of one process in an epoch.
        size: height and width, pixels.
    """
    options = policy.config
    footprint = measure_footprint(policy.pipeline, conditioning, *size, policy.devices.decoding)
    plan = plan_memory(footprint, options, local_images)
    device = conditioning.positive.text.device
    capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    if not options.disable_tqdm or (capacity is not None and plan.peak() > capacity):
        print(plan.report(capacity))
    return plan


# Measuring ----------------------------------------------------------------------------------------------------


def tensor_bytes(tensor: Tensor) -> int:
    """Return what a tensor holds; of a quantized one, its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def weight_bytes(modules: Iterable[nn.Module | None], trained: bool | None = None) -> int:
    """Parameters and buffers of all modules, each once; `trained` picks those that are, or aren't."""
    tensors = {}
    for module in (module for module in modules if module is not None):
        if not trained:
            tensors |= {id(buffer): buffer for buffer in module.buffers()}
        tensors |= {id(p): p for p in module.parameters() if trained is None or p.requires_grad == trained}
    return sum(tensor_bytes(tensor) for tensor in tensors.values())


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: the items of the denoiser's own module lists that are more than one layer."""
    lists = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
    found = [item for child in lists for item in child]
    return [item for item in found if sum(isinstance(m, nn.Linear) for m in item.modules()) > 1] or [denoiser]


def extrapolate(small: tuple[int, int], large: tuple[int, int], tokens: int) -> int:
    """Return the line through two (tokens, bytes), at `tokens`."""
    if small[0] == large[0]:
        return large[1] * tokens // large[0]
    slope = (large[1] - small[1]) / (large[0] - small[0])
    return round(large[1] + slope * (tokens - large[0]))


def measure_footprint(
    pipeline: TAFSPipelineMixin,
    conditioning: Conditioning,
    height: int,
    width: int,
    decoding: Callable[[], AbstractContextManager] = nullcontext,
) -> Footprint:
    """Weigh a pipeline whose LoRA is attached; `conditioning` is of one prompt, on the denoiser's device."""
    tokens = pipeline.image_tokens(height, width)
    sizes = [_part_of(pipeline, height, width, share) for share in (4, 2)]
    points = [(pipeline.image_tokens(*size), measure_activations(pipeline, conditioning, *size)) for size in sizes]
    (small_count, small_part), (count, part) = points
    saved, inputs = (
        extrapolate((small_count, getattr(small_part, name)), (count, getattr(part, name)), tokens)
        for name in ("saved", "block_inputs")
    )
    encoders = list(pipeline.text_encoders().values())
    trained = [p.numel() for p in pipeline.denoiser.parameters() if p.requires_grad]
    fake = sum(parameter.numel() for parameter in fake_parameters(pipeline.denoiser).values())
    small = _part_of(pipeline, height, width, 4)
    with decoding():  # where the VAE decodes, and tiles if it was asked to
        pixels = min(height * width, tile_pixels(pipeline.vae))
        decoded = measure_decoder(pipeline, *small) * pixels // (small[0] * small[1])
    return Footprint(
        denoiser=weight_bytes([pipeline.denoiser], trained=False) - 4 * fake,
        text_encoders=weight_bytes(encoders),
        vae=weight_bytes([pipeline.vae]),
        trained_parameters=sum(trained),
        activations=Activations(saved, inputs, points[0][1].num_blocks),
        decoded_image=decoded,
        latent_elements=torch.Size(pipeline.latent_shape(height, width)).numel(),
        storage_bytes=pipeline.storage_dtype.itemsize,
        fake_parameters=fake,
    )


def _part_of(pipeline: TAFSPipelineMixin, height: int, width: int, share: int) -> tuple[int, int]:
    multiple = pipeline.size_multiple
    return tuple(max(size // share // multiple * multiple, multiple) for size in (height, width))


def measure_activations(
    pipeline: TAFSPipelineMixin, conditioning: Conditioning, height: int, width: int
) -> Activations:
    """Measure what one row's evaluation keeps for its backward pass, of a conditioning without negatives."""
    weights = {p.data_ptr() for p in pipeline.denoiser.parameters()}
    # The storages themselves: an address that is freed would be another's next.
    saved: dict[int, torch.UntypedStorage] = {}
    inputs: dict[int, torch.UntypedStorage] = {}
    device = conditioning.positive.text.device
    x = torch.zeros(1, *pipeline.latent_shape(height, width), device=device, dtype=pipeline.storage_dtype)

    def keep(tensor: Tensor) -> None:  # nothing is unpacked, and a tensor here would be a cycle that is never freed
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights and storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                inputs[value.untyped_storage().data_ptr()] = value.untyped_storage()

    blocks = blocks_of(pipeline.denoiser)
    with (
        removed(block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks),
        without_checkpointing(pipeline.denoiser),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing),
    ):
        # the network itself: hooks on its blocks are not for a compiled one
        level, alone = torch.full((1,), 0.5, device=device), Conditioning(conditioning.positive)
        pipeline.velocity(x, level, alone, pipeline.denoiser)
    kept, entered = (sum(storage.nbytes() for storage in found.values()) for found in (saved, inputs))
    return Activations(kept, entered, len(blocks))


@contextmanager
def removed(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep the hooks inside, and remove them afterwards, whatever happens."""
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without_checkpointing(denoiser: nn.Module) -> Iterator[None]:
    """Gradient checkpointing is off inside."""
    on = getattr(denoiser, "is_gradient_checkpointing", False)
    if on:
        denoiser.disable_gradient_checkpointing()
    try:
        yield
    finally:
        if on:
            denoiser.enable_gradient_checkpointing()


@torch.no_grad()
def measure_decoder(pipeline: TAFSPipelineMixin, height: int, width: int) -> int:
    """Working memory of decoding one image: three times the largest layer's output, input and residual beside it."""
    largest = 0

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, tensor_bytes(output))

    layers = [module for module in pipeline.vae.modules() if not list(module.children())]
    with removed(layer.register_forward_hook(leave) for layer in layers):
        device = next(pipeline.vae.parameters()).device
        pipeline.decode_latents(torch.zeros(1, *pipeline.latent_shape(height, width), device=device))
    return 3 * largest


def tile_pixels(vae: nn.Module) -> float:
    """Pixels that the VAE decodes at once: a tile's, where it tiles."""
    if not getattr(vae, "use_tiling", False):
        return float("inf")
    square = getattr(vae, "tile_sample_min_size", None)
    return square**2 if square else vae.tile_sample_min_height * vae.tile_sample_min_width
