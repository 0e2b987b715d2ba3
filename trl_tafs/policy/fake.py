"""The fake score of distribution matching: a second LoRA on the policy's base, which learns the policy's own images."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trl_tafs.policy.carried import FAKE_ADAPTER, TrainedAdapter, activate, adapter_layers, fake_parameters
from trl_tafs.policy.lora import seeded
from trl_tafs.policy.optimizer import make_optimizer, set_options
from trl_tafs.policy.options import PolicyOptions

if TYPE_CHECKING:
    from accelerate import Accelerator


class FakeScore:
    """A LoRA like the trained one beside it, that begins as the base, with an AdamW of its own.

    It acts inside `acting` alone, and learns inside `learning` alone: elsewhere it is frozen and switched off, so that
    policy, reference, DDP and what is saved know nothing of it.

    Args:
        denoiser: with the trained LoRA attached and active.
        adapter: the trained one.
        lora_config: the trained one's: layers, rank and strength.
        config: the options of distribution matching and of the optimizer.
    """

    def __init__(self, denoiser: nn.Module, adapter: TrainedAdapter, lora_config: Any, config: PolicyOptions) -> None:
        self.denoiser, self.adapter, self.config = denoiser, adapter, config
        own = copy.deepcopy(lora_config)
        own.init_lora_weights = "gaussian"  # others write into the base
        with seeded(config.seed, FAKE_ADAPTER), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that there are two is meant
            denoiser.add_adapter(own, FAKE_ADAPTER)
        self.layers = adapter_layers(denoiser)
        self.named = fake_parameters(denoiser)
        self.parameters = list(self.named.values())
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        self._activate_policy()
        self.optimizer = make_optimizer(self.parameters, config, config.fake_learning_rate)
        self.skipped = 0  # optimizer steps in a row that were left out

    @contextmanager
    def acting(self, *, learning: bool = False) -> Iterator[None]:
        """Inside, the denoiser is the fake score, with what is frozen beneath; `learning`: with gradients."""
        names = (*self.adapter.beneath, FAKE_ADAPTER)
        activate(self.layers, names, FAKE_ADAPTER if learning else None)
        try:
            yield
        finally:
            self._activate_policy()

    def _activate_policy(self) -> None:
        activate(self.layers, (*self.adapter.beneath, self.adapter.name), self.adapter.name)

    def step(self, accelerator: Accelerator, scale: float = 1.0) -> Tensor:
        """Take an optimizer step with the mean of all processes' gradients; return its norm before it is clipped, ().

        Where the norm isn't finite the step is left out. `scale` is what the loss was multiplied by.
        """
        trained = [parameter for parameter in self.parameters if parameter.grad is not None]
        if accelerator.num_processes > 1:
            flat = torch.cat([parameter.grad.flatten() for parameter in trained])
            flat = accelerator.reduce(flat, reduction="mean")
            for parameter, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
                parameter.grad.copy_(part.view_as(parameter))
        if scale != 1.0:
            torch._foreach_div_([parameter.grad for parameter in trained], scale)
        norm = nn.utils.clip_grad_norm_(trained, self.config.train_max_grad_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
            self.skipped = 0
        else:
            self.skipped += 1
        self.optimizer.zero_grad()
        return norm

    def apply_settings(self) -> None:
        """Make the configuration's optimizer settings hold after a resume, which restores the checkpoint's."""
        set_options(self.optimizer, self.config, self.config.fake_learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        weights = {name: parameter.detach() for name, parameter in self.named.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            ValueError: it is the fake score of another base, or of a LoRA of other layers or another rank.
        """
        saved = {name: tuple(weight.shape) for name, weight in state["weights"].items()}
        here = {name: tuple(parameter.shape) for name, parameter in self.named.items()}
        for name in sorted(saved.keys() | here.keys()):
            if saved.get(name) != here.get(name):
                raise ValueError(
                    f"the fake score's {name} is {saved.get(name, 'not there')}, and this run's is "
                    f"{here.get(name, 'not there')}: it is one of another base model, lora_rank or lora_target_modules"
                )
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(state["weights"][name])
                parameter.grad = None
        self.optimizer.load_state_dict(state["optimizer"])
        self.skipped = state["skipped"]
