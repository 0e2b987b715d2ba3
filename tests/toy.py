"""A linear velocity and its rollouts, for tests of objectives."""

import torch
from torch import nn

from trl_tafs.method.levels import uniform_levels, with_zero
from trl_tafs.method.noise import SampleNoise
from trl_tafs.method.rollout import rollout
from trl_tafs.method.types import Conditioning, Embeddings

LEVELS = with_zero(uniform_levels(4))
SHAPE = (3, 2, 2)


class Linear(nn.Module):
    """A velocity that depends on state, level and prompt."""

    def __init__(self, seed=0):
        super().__init__()
        self.inner = nn.Linear(12 + 2, 12)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x, level, conditioning):
        inputs = torch.cat([x.flatten(1), level[:, None], conditioning.positive.text[:, 0]], dim=1)
        return self.inner(inputs).reshape(x.shape)


def condition(batch):
    return Conditioning(Embeddings(torch.arange(batch, dtype=torch.float32).reshape(batch, 1, 1) / 10))


def rolled_out(kernel, batch=5, velocity=None, reduction="sqrt", **options):
    noise = SampleNoise(0, 0, tuple(range(batch)))
    velocity = Linear() if velocity is None else velocity
    x = noise("initial", 0, SHAPE)
    return rollout(velocity, kernel, condition(batch), LEVELS, x, noise, reduction=reduction, **options)


def no_reference(x, level, conditioning):
    raise AssertionError("the reference was called")


def noise_of(batch=5):
    return SampleNoise(3, 0, tuple(range(batch)))
