"""Copies of the trained parameters that the denoiser can carry for a while: an average, the base, the old policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class AdapterAverage:
    """An exponential moving average of the trained parameters, by diffusers' EMAModel."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self.parameters = parameters
        self.ema = EMAModel(parameters, decay=decay)

    @property
    def weights(self) -> list[torch.Tensor]:
        """The average of each parameter."""
        return self.ema.shadow_params

    def update(self) -> None:
        """After an optimizer step."""
        self.ema.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the denoiser carries the average."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.ema.load_state_dict(state)
        self.ema.to(self.parameters[0].device)


class HeldWeights:
    """A copy of the trained parameters at one moment, which the denoiser can carry for a while."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.weights = [parameter.detach().clone() for parameter in parameters]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the denoiser carries these weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data, self.weights[i] = self.weights[i], parameter.data


class OldPolicy(HeldWeights):
    """The lagging policy that draws the rollouts (DiffusionNFT, arXiv 2509.16117).

    After each epoch it becomes `d old + (1 - d) present`, `d = min(ramp * epochs, decay)`.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float, ramp: float) -> None:
        super().__init__(parameters)
        self.decay, self.ramp, self.epochs = decay, ramp, 0

    @torch.no_grad()
    def update(self) -> None:
        """After an epoch."""
        self.epochs += 1
        share = 1.0 - min(self.ramp * self.epochs, self.decay)
        torch._foreach_lerp_(self.weights, [parameter.detach() for parameter in self.parameters], share)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"weights": self.weights, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.epochs = state["epochs"]
        for weight, value in zip(self.weights, state["weights"], strict=True):
            weight.copy_(value)
