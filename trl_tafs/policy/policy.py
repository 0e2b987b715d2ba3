"""`Policy`: what is trained, with its optimizer, its reference and its copies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trl_tafs.method.types import Conditioning
from trl_tafs.pipelines.base import TAFSPipelineMixin
from trl_tafs.pipelines.finite import is_finite
from trl_tafs.policy.adapter_file import check_adapter_fits, read_adapter, save_adapter
from trl_tafs.policy.base import compiled, normal_mode, prepare_base, take_off_autocast
from trl_tafs.policy.carried import FrozenAdapter, TrainedAdapter, adapter_layers, frozen_adapter
from trl_tafs.policy.copies import AdapterAverage, HeldWeights, OldPolicy
from trl_tafs.policy.denoiser_file import load_denoiser, save_denoiser
from trl_tafs.policy.fake import FakeScore
from trl_tafs.policy.lora import attach_lora, free_denoiser, trainable_parameters, without_trained
from trl_tafs.policy.lora_sum import prepare_layers
from trl_tafs.policy.offload import DeviceSharing
from trl_tafs.policy.optimizer import apply_settings, make_lr_scheduler, make_optimizer
from trl_tafs.policy.options import PolicyOptions
from trl_tafs.policy.sharding import averaged, prepare, shard_count

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the policy."""

    state: Tensor  # (T, *) storage dtype
    level: Tensor  # (T,)
    velocity: Tensor  # (T, *) with gradient


class Policy:
    """A pipeline's denoiser with what is trained on it: a LoRA, or all of its weights.

    Args:
        pipeline: whose denoiser is trained; its modules are frozen, moved and cast.
        config: the options of the adapter, the optimizer and the copies.
        accelerator: prepares the denoiser (autocast, DDP) and the optimizer.
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
        lora_config: a LoRA of the user's instead of the default one.

    Attributes:
        model: the prepared denoiser, through which every evaluation goes.
        parameters: the trained ones, in order.
        adapter: which LoRA is trained, and which ones act beneath it; None with full_finetuning.
        frozen: those beneath it.
        average: the exponential moving average that is evaluated and saved, if there is one.
        old: the lagging policy that draws the rollouts, if there is one.
        evaluations: images for which the denoiser was evaluated, guidance counted twice.
        fake: the score of what the policy draws, for distribution matching, if there is one.
    """

    @normal_mode()
    def __init__(
        self,
        pipeline: TAFSPipelineMixin,
        config: PolicyOptions,
        accelerator: Accelerator,
        total_updates: int,
        lora_config: Any | None = None,
    ) -> None:
        self.pipeline, self.config, self.accelerator, self.evaluations = pipeline, config, accelerator, 0
        self._seen: list[Evaluation] | None = None
        self.devices: DeviceSharing = prepare_base(pipeline, config, accelerator.device, shard_count(accelerator))
        self.adapter: TrainedAdapter | None = None
        self.lora_config: Any | None = None
        self.frozen: tuple[FrozenAdapter, ...] = ()
        if config.full_finetuning:
            free_denoiser(pipeline, lora_config)
        else:
            self.adapter, self.lora_config = attach_lora(pipeline, config, lora_config)
            self.frozen = tuple(frozen_adapter(pipeline.denoiser, name) for name in self.adapter.beneath)
        self.storage_dtype: torch.dtype = pipeline.storage_dtype
        score = (pipeline.denoiser, self.adapter, self.lora_config, config)
        self.fake = FakeScore(*score) if config.matches_distribution else None
        self.layers = adapter_layers(pipeline.denoiser)  # PEFT's, all of them
        self.parameters = trainable_parameters(pipeline.denoiser)
        optimizer = make_optimizer(self.parameters, config)
        take_off_autocast(pipeline.denoiser)
        self.lr_scheduler = make_lr_scheduler(optimizer, config, total_updates)
        prepared, self.optimizer = prepare(pipeline.denoiser, optimizer, accelerator, self.layers)
        prepare_layers(self.layers, config.mixed_precision)
        self.model, self._base_model = compiled(getattr(pipeline, pipeline.denoiser_name), prepared, config)
        self.base = HeldWeights(self.parameters) if config.full_finetuning else None
        self.average = AdapterAverage(self.parameters, config.train_ema_decay) if config.train_use_ema else None
        decay, ramp = config.old_policy_decay, config.old_policy_ramp
        self.old = OldPolicy(self.parameters, decay, ramp) if decay else None

    @property
    def adapter_name(self) -> str | None:
        """The trained LoRA's name on the denoiser; None with full_finetuning."""
        return None if self.adapter is None else self.adapter.name

    # Evaluate -------------------------------------------------------------------------------------------------

    def velocity(self, x: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the present policy's velocity, (B, *) float32, in rollout and replay alike."""
        v = self.evaluate(x, level, conditioning, self.model)
        if self._seen is not None and torch.is_grad_enabled():
            self._seen.append(Evaluation(x, level, v))
        return v

    def evaluate(self, x: Tensor, level: Tensor, conditioning: Conditioning, model: Any | None = None) -> Tensor:
        """Return the velocity of the denoiser as it is, (B, *) float32, and count how often it is evaluated for it."""
        self.evaluations += len(x) * (1 if conditioning.negative is None else 2)
        return self.pipeline.velocity(x, level, conditioning, model)

    @contextmanager
    def recording(self) -> Iterator[list[Evaluation]]:
        """Inside, evaluations of the present policy with gradient are put into the list that it gives."""
        self._seen = seen = []
        try:
            yield seen
        finally:
            self._seen = None

    def reference(self, x: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity of the base without what is trained, with what is frozen beneath it, (B, *) float32."""
        with self.base.applied() if self.base else without_trained(self.layers, self.adapter):
            return self.evaluate(x, level, conditioning, self._base_model)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the denoiser carries what is evaluated and saved: the average, where there is one."""
        return nullcontext() if self.average is None else self.average.applied()

    def sampling(self) -> AbstractContextManager[None]:
        """Inside, the denoiser carries what draws the rollouts: the old policy, where there is one."""
        return nullcontext() if self.old is None else self.old.applied()

    # Update ---------------------------------------------------------------------------------------------------

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Inside, gradients start at none, and activations are recomputed if `train_gradient_checkpointing` is on.

        Checkpointing is switched off again afterwards, unless it was on before.
        """
        for parameter in self.parameters:
            parameter.grad = None
        denoiser = self.pipeline.denoiser
        switch = self.config.train_gradient_checkpointing and not denoiser.is_gradient_checkpointing
        if switch:
            denoiser.enable_gradient_checkpointing()
        try:
            with torch.enable_grad():
                yield
        finally:
            if switch:
                denoiser.disable_gradient_checkpointing()

    def clip_gradients(self) -> Tensor:
        """Clip the gradients of a complete step and return their norm before it, () float32."""
        most = self.config.train_max_grad_norm
        norm = self.accelerator.clip_grad_norm_(averaged(self.parameters, self.accelerator), most)
        return torch.as_tensor(norm, dtype=torch.float32, device=self.accelerator.device)

    def step(self) -> None:
        """Take an optimizer step where gradients are complete; Accelerate makes it nothing where they are not."""
        self.optimizer.step()
        if self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
            if self.average is not None:
                self.average.update()
        self.optimizer.zero_grad()

    def after_epoch(self) -> None:
        """Let the old policy follow the present one."""
        if self.old is not None:
            self.old.update()

    # Check ----------------------------------------------------------------------------------------------------

    def is_finite(self) -> bool:
        """Return whether all trained weights and their copies are finite, by one host copy."""
        copies = ([] if self.average is None else self.average.weights) + ([] if self.old is None else self.old.weights)
        copies += [] if self.fake is None else [parameter.detach() for parameter in self.fake.parameters]
        largest = torch._foreach_norm([p.detach() for p in self.parameters] + copies, float("inf"))
        return bool(torch.stack(largest).isfinite().all())

    def non_finite_name(self) -> str | None:
        """Return the name of the first trained weight that isn't finite; None if it is one of a copy, or none."""
        named = ((name, p) for name, p in self.pipeline.denoiser.named_parameters() if p.requires_grad)
        fake = {} if self.fake is None else self.fake.named
        return next((name for name, p in (*named, *fake.items()) if not is_finite(p.detach())), None)

    # Save and load --------------------------------------------------------------------------------------------

    def publish(self, folder: str | os.PathLike) -> None:
        """As `save`, with the LoRA's strength in its weights, so that tools that ignore the file's header apply it."""
        self.save(folder, fold_alpha=True)

    def save(self, folder: str | os.PathLike, *, fold_alpha: bool = False) -> None:
        """Write the trained weights in diffusers' format, and the scheduler that samples them; `folder` is made."""
        if self.config.full_finetuning:
            save_denoiser(self.pipeline, folder, annealed=self.config.anneals)
            return
        save_adapter(
            self.pipeline,
            folder,
            lora_config=self.lora_config,
            adapter_name=self.adapter_name,
            annealed=self.config.anneals,
            fold_alpha=fold_alpha,
        )

    def load(self, folder: str | os.PathLike) -> None:
        """Put the weights that `save` wrote into the denoiser.

        Raises:
            ValueError: they are of another model, or of other shapes.
        """
        from peft import set_peft_model_state_dict

        if self.config.full_finetuning:
            load_denoiser(self.pipeline, folder)
            return
        weights, _ = read_adapter(folder, denoiser=self.pipeline.denoiser_name)
        check_adapter_fits(weights, self.pipeline.denoiser)
        set_peft_model_state_dict(self.pipeline.denoiser, weights, adapter_name=self.adapter_name)

    def states(self) -> dict[str, Any]:
        """Return what moves besides the weights, by name: objects with `state_dict` and `load_state_dict`."""
        found = {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler, "average": self.average}
        found |= {"old_policy": self.old, "scaler": self.accelerator.scaler, "fake_score": self.fake}
        return {name: item for name, item in found.items() if item is not None}

    def apply_settings(self) -> None:
        """Make the configuration's optimizer settings hold after a resume, which restores the checkpoint's."""
        apply_settings(self.optimizer, self.lr_scheduler, self.config)
        if self.fake is not None:
            self.fake.apply_settings()
