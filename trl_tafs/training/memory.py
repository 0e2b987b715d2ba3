"""What a run will need of a GPU's memory, of the host's and of the disk, said before anything is moved.

Weights, gradients and optimizer states are counted from the models' shapes, working memory is simulated on tensors
without values (`training.simulation`). Nothing is computed, so that a plan needs no weights and no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trl_tafs.method.guidance import is_guided
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.components import is_text_encoder, unwrapped
from trl_tafs.pipelines.quantized import is_quantized
from trl_tafs.policy.base import DTYPES, cast_bytes
from trl_tafs.policy.carried import choose_adapter
from trl_tafs.policy.sharding import block_names
from trl_tafs.training.options import TrainingOptions
from trl_tafs.training.plan import EpochPlan
from trl_tafs.training.simulation import Simulation

GIB = 2**30
OPTIMIZER_BYTES = {False: 8, True: 2}  # of a trained parameter: two float32 moments, or two of 8 bits
CONTEXT = int(0.75 * GIB)  # CUDA's own, with cuBLAS's and cuDNN's workspaces
FRAGMENTATION = 0.05  # of what is allocated, lost between the allocator's blocks


@dataclass(frozen=True)
class Footprint:
    """What the parts of a run weigh and hold, in bytes."""

    weights: Mapping[str, int]  # of each component, as it is cast; the denoiser's frozen ones alone
    denoiser_name: str
    trained_parameters: int  # their number; float32
    evaluation: int  # in the denoiser, of a rollout's batch
    update: int  # in the denoiser, of a micro-batch forward and backward
    decoding: int  # in the VAE, of the images that are decoded at once
    latent_elements: int  # D
    storage_bytes: int  # of an element of states and actions
    conditioning: int  # of one encoded prompt
    fake_parameters: int = 0  # of distribution matching's fake score; float32
    rewards: int = 0  # weights of the rewards' own models on this device
    loaded: int = 0  # of all components on the host, as a process loads them
    gathered: int = 0  # of the denoiser's frozen weights, what shards bring together at once
    notes: tuple[str, ...] = ()

    def named(self, *, text: bool) -> int:
        """Return the weight of the text encoders, or of all that is neither they nor the denoiser."""
        return sum(
            size for name, size in self.weights.items() if name != self.denoiser_name and is_text_encoder(name) == text
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, by phase and by what holds them; and beside it."""

    phases: dict[str, dict[str, int]]
    host: int = 0  # of one process, at its most
    prompt: int = 0  # of one encoded prompt, in memory or in `prompt_cache_dir`
    notes: tuple[str, ...] = ()
    advice: tuple[str, ...] = field(default=())  # settings under which it fits, where it doesn't

    def allocated(self, phase: str | None = None) -> int:
        """Return what the tensors of a phase take, or of the run's largest."""
        if phase is None:
            return max(self.allocated(name) for name in self.phases)
        return sum(self.phases[phase].values())

    def peak(self, phase: str | None = None) -> int:
        """Return what a device must have: the tensors, the allocator's loss, CUDA's context."""
        return round(self.allocated(phase) * (1 + FRAGMENTATION)) + CONTEXT

    def line(self, capacity: int | None = None) -> str:
        """Return the plan in a line: what a device needs, when, and what it has."""
        phase = max(self.phases, key=self.allocated)
        has = "" if capacity is None else f" of {capacity / GIB:.1f}"
        return f"memory: {self.peak() / GIB:.2f} GiB{has} planned at the peak ({phase}); `trl-tafs plan` has the table"

    def report(self, capacity: int | None = None, processes: int = 1) -> str:
        """Return a table in GiB, a column a phase; `capacity` is the device's, `processes` share the host."""
        names = list(dict.fromkeys(name for parts in self.phases.values() for name in parts))
        rows = [(name, [parts.get(name, 0) for parts in self.phases.values()]) for name in names]
        rows.append(("together", [self.allocated(phase) for phase in self.phases]))
        rows.append(("with a margin", [self.peak(phase) for phase in self.phases]))
        lines = [f"{'memory plan, GiB':22}" + "".join(f"{phase:>10}" for phase in self.phases)]
        lines += [f"{name:22}" + "".join(f"{value / GIB:10.2f}" for value in values) for name, values in rows]
        each = f" ({processes} x {self.host / GIB:.2f})" if processes > 1 else ""
        lines.append(f"host memory {processes * self.host / GIB:.2f} GiB{each}")
        lines.append(f"an encoded prompt {self.prompt / 2**20:.2f} MiB")
        lines += self.notes
        lines.append(f"peak {self.peak() / GIB:.2f} GiB")
        if capacity is not None:
            lines[-1] += f"; the device has {capacity / GIB:.2f}"
            if self.peak() > capacity:
                lines[-1] += self._remedy()
        return "\n".join(lines)

    def _remedy(self) -> str:
        if self.advice:
            return f": it fits with {', '.join(self.advice)}"
        return ": no setting makes it fit; use a quantized base, smaller images or shards (docs/memory.md)"


def plan_memory(
    footprint: Footprint, options: TrainingOptions, plan: EpochPlan, *, sharded: bool = False
) -> MemoryPlan:
    """Add up what each phase of a run holds at once.

    Args:
        footprint: of the parts, under these options.
        options: batch sizes, checkpointing, offloading, optimizer, averages.
        plan: an epoch's; a process's rollouts are kept until the update is done.
        sharded: whether the frozen denoiser lies in shards on the plan's processes.
    """
    local, trained, elements = plan.local_images, 4 * footprint.trained_parameters, footprint.latent_elements
    fake, moments = 4 * footprint.fake_parameters, OPTIMIZER_BYTES[options.train_use_8bit_adam]
    always = {
        "rewards": footprint.rewards,
        "trained weights": trained,
        "optimizer": moments * footprint.trained_parameters,
        "fake score": fake + moments * footprint.fake_parameters,
        "averages": trained * (options.train_use_ema + bool(options.old_policy_decay) + options.full_finetuning),
        "buckets of DDP": trained if plan.world_size > 1 and not sharded else 0,
    }
    offload, offload_text = options.model_cpu_offload, options.model_cpu_offload or options.offload_text_encoders
    denoiser = {"denoiser": footprint.weights.get(footprint.denoiser_name, 0)}
    if sharded:
        denoiser = {"denoiser": -(-denoiser["denoiser"] // plan.world_size), "gathered blocks": footprint.gathered}
    text, vae = {"text encoders": footprint.named(text=True)}, {"vae": footprint.named(text=False)}
    resident = always | ({} if offload_text else text) | ({} if offload else vae)
    experience = {"rollouts": elements * rollout_bytes(options, footprint.storage_bytes) * local}
    waiting = local if offload else options.sample_batch_size  # taking turns, all are drawn before one is scored
    scored = {"scored latents": 4 * elements * options.num_trained_steps * options.num_perturbations * waiting}
    items = elements * item_bytes(options, footprint.storage_bytes) * local
    kept = {"rollouts": experience["rollouts"] + items}
    gradients = {"gradients": trained + fake}
    phases = {
        "encode": always | ({} if offload else denoiser | vae) | text,
        "rollout": resident | denoiser | experience | scored | {"activations": footprint.evaluation},
        "decode": resident
        | vae
        | ({} if offload else denoiser)
        | experience
        | scored
        | {"activations": footprint.decoding},
        "update": resident | denoiser | kept | gradients | {"activations": footprint.update},
        "step": resident | denoiser | kept | gradients | {"activations": step_bytes(trained, options, sharded)},
    }
    return MemoryPlan(
        {phase: {k: v for k, v in parts.items() if v} for phase, parts in phases.items()},
        host=footprint.loaded,
        prompt=footprint.conditioning,
        notes=footprint.notes,
    )


def step_bytes(trained: int, options: TrainingOptions, sharded: bool) -> int:
    """Return what an optimizer step holds besides: AdamW's square root of all second moments, before it the mean.

    Beside shards the gradients are averaged in one message, which is a copy of them, and the sum another.
    """
    return max(2 * trained if sharded else 0, 0 if options.train_use_8bit_adam else trained)


def gathered_bytes(denoiser: nn.Module, whole: int) -> int:
    """Return what a sharded denoiser of `whole` bytes gathers at once: two blocks, and what is outside of blocks.

    While a block computes, the next one's weights arrive.
    """
    names = block_names(denoiser)
    blocks = [cast_bytes(module, None) for module in denoiser.modules() if type(module).__name__ in names]
    share = whole / max(cast_bytes(denoiser, None), 1)
    return round(share * (cast_bytes(denoiser, None) - sum(blocks) + sum(sorted(blocks)[-2:])))


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


# Weights ------------------------------------------------------------------------------------------------------


def tensor_bytes(tensor: Tensor) -> int:
    """Return what a tensor holds; of a quantized one, its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def weight_bytes(modules: Iterable[nn.Module | None]) -> int:
    """Return the bytes of the parameters and buffers of all modules, each once."""
    tensors: dict[int, Tensor] = {}
    for module in (module for module in modules if module is not None):
        tensors |= {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor_bytes(tensor) for tensor in tensors.values())


def component_bytes(
    pipeline: TAFSPipelineMixin, options: TrainingOptions, quantized: Mapping[str, float]
) -> dict[str, int]:
    """Return the bytes of each component as the trainer will cast it; with full fine-tuning the denoiser's are 0.

    Args:
        pipeline: its components may lie on the meta device.
        options: precision, full fine-tuning.
        quantized: bytes of a linear layer's weight in components that will be loaded quantized.
    """
    found = {}
    for name, component in pipeline.components.items():
        module = unwrapped(component)
        if not isinstance(module, nn.Module):
            continue
        if module is pipeline.denoiser and options.full_finetuning:
            found[name] = 0
        elif is_quantized(module):
            found[name] = weight_bytes([module])
        else:
            dtype = None if name == "vae" else DTYPES[options.mixed_precision]
            linear = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
            width = dtype.itemsize if dtype else next(module.parameters()).element_size()
            saved = linear * (width - quantized[name]) if name in quantized else 0
            found[name] = cast_bytes(module, dtype) - round(saved)
    return found


def measure_footprint(
    simulation: Simulation,
    options: TrainingOptions,
    rewards: int = 0,
    quantized: Mapping[str, float] | None = None,
) -> Footprint:
    """Weigh a pipeline under some options, before anything of it is moved or trained.

    Args:
        simulation: of the pipeline, at the size of training.
        options: of the run.
        rewards: bytes of the rewards' own models.
        quantized: see `component_bytes`.
    """
    pipeline = simulation.pipeline
    # a guided teacher is evaluated beside the policy's graph; the fake score learns when that is gone
    teacher = options.matches_distribution and is_guided(options.teacher_guidance(False))
    update = simulation.denoiser(options, options.train_batch_size, update=True, beside=teacher)
    evaluation = simulation.denoiser(options, options.sample_batch_size, update=False)
    weights = component_bytes(pipeline, options, quantized or {})
    weights[pipeline.denoiser_name] -= carried_bytes(simulation, options)  # counted as trained
    latents = torch.Size(pipeline.latent_shape(simulation.height, simulation.width)).numel()
    dtype = torch.float32 if options.full_finetuning else DTYPES[options.mixed_precision] or pipeline.model_dtype
    modules = [unwrapped(module) for module in pipeline.components.values() if isinstance(module, nn.Module)]
    return Footprint(
        weights=weights,
        denoiser_name=pipeline.denoiser_name,
        trained_parameters=update.trained,
        evaluation=evaluation.evaluation,
        update=update.update,
        decoding=simulation.decoding(options.decode_size, options.vae_tiling),
        latent_elements=latents,
        storage_bytes=(pipeline.latent_dtype or dtype).itemsize,
        conditioning=simulation.conditioning_bytes(options),
        fake_parameters=update.trained if options.matches_distribution else 0,
        rewards=rewards,
        loaded=weight_bytes(modules),
        gathered=gathered_bytes(pipeline.denoiser, weights[pipeline.denoiser_name]),
        notes=tuple(simulation.notes),
    )


def carried_bytes(simulation: Simulation, options: TrainingOptions) -> int:
    """Return what of a LoRA that will be trained is among the denoiser's weights already, as they will be cast."""
    if options.full_finetuning:
        return 0
    denoiser, dtype = simulation.pipeline.denoiser, DTYPES[options.mixed_precision]
    part = f".{choose_adapter(denoiser, options, simulation.lora_config).name}."
    own = (p for name, p in denoiser.named_parameters() if "lora_" in name and part in f"{name}.")
    return sum(parameter.numel() * (dtype.itemsize if dtype else parameter.element_size()) for parameter in own)


def reward_bytes(rewards: Iterable[Any], device: torch.device | str = "cuda") -> int:
    """Return the bytes of the rewards' own modules that are kept on a device of that kind; each module once."""
    found = {}
    for reward in rewards:
        own = getattr(reward, "modules", None)
        for module in own if isinstance(own, list) else ():
            if next(module.parameters()).device.type == torch.device(device).type:
                found[id(module)] = module
    return weight_bytes(found.values())
