"""Kernels, objectives and credit rules from outside the package, trained as docs/extending.md shows."""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch

from trl_tafs.method.credit import CREDITS, CreditRule
from trl_tafs.method.kernels import KERNELS, Annealed, Sde, Transition
from trl_tafs.method.objectives import OBJECTIVES, ClippedObjective


@dataclass(frozen=True)
class Tempered(Annealed):
    """Annealing with less noise."""

    strength: float = 1.0

    def transition(self, x, v, s, s_next):
        plain = super().transition(x, v, s, s_next)
        return Transition(plain.mean, self.strength * plain.std)


@dataclass(frozen=True)
class Tapered(Sde):
    eta: float = 0.6
    power: float = 1.0
    description: ClassVar[str] = "are drawn by an SDE whose noise falls with the level"

    def diffusion(self, s, s_next):
        return self.eta * s**self.power


@pytest.mark.parametrize(
    ("kernel", "options", "anneals", "drawn"),
    [
        (Tempered, {"strength": 0.9}, True, "are noised again between steps"),
        (Tapered, {"power": 2.0}, False, "are drawn by an SDE whose noise falls with the level"),
    ],
)
def test_a_kernel_is_trained_published_and_described_as_what_it_is(
    pipeline, tmp_path, monkeypatch, kernel, options, anneals, drawn
):
    monkeypatch.setitem(KERNELS, "mine", kernel)
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1, sample_kernel="mine", sampler_kwargs=options)
    assert trainer.algorithm.kernel == kernel(**options)
    trainer.train()
    scheduler = json.loads((tmp_path / "adapter" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["stochastic_sampling"] is anneals
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"4-step samples {drawn}, every step's" in card and "each step answers for its own image" in card
    assert ("scheduler anneals" in card, "solves the ODE" in card) == (anneals, not anneals)


class Twice(ClippedObjective):
    """Each step of an image is two items."""

    description: ClassVar[str] = "each step counts twice"
    seen: ClassVar[Counter] = Counter()

    @classmethod
    def rows_per_image(cls, options):
        return 2 * super().rows_per_image(options)

    def items(self, rollout, advantages, noise=None):
        return super().items(rollout, advantages, noise).repeat_interleave(2)

    def __call__(self, velocity, items, conditioning, reference=None):
        self.seen.update(items.sample.tolist())
        return super().__call__(velocity, items, conditioning, reference)


class Liar(Twice):
    @classmethod
    def rows_per_image(cls, options):
        return options.num_trained_steps


def test_an_objective_with_six_items_an_image_trains_on_all_of_them(pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "twice", Twice)
    monkeypatch.setattr(Twice, "seen", Counter())
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1, objective="twice")
    trainer.train()
    assert trainer.config.rows_per_image == 6 and Twice.seen == Counter(dict.fromkeys(range(16), 6))
    assert "and each step counts twice" in (tmp_path / "adapter" / "README.md").read_text()


def test_an_objective_whose_items_are_not_as_many_as_it_says_is_an_error(pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "liar", Liar)
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1, objective="liar")
    with pytest.raises(ValueError, match="96 minibatch items of 16 images, and says that it makes 3 an image"):
        trainer.train()


def test_an_objective_brings_options_and_reads_those_that_it_says(monkeypatch):
    @dataclass(frozen=True)
    class Soft(ClippedObjective):
        temperature: float = 1.0

    monkeypatch.setitem(OBJECTIVES, "soft", Soft)
    own = {"objective": "soft", "objective_kwargs": '{"temperature": 0.5}'}
    made = Soft.from_options(tiny.config("x", train_clip_range=0.1, beta=0.3, **own), Annealed(), 0.1)
    assert made == Soft(Annealed(), 0.1, "sqrt", "balanced", 0.3, temperature=0.5)
    with pytest.raises(ValueError, match="objective_kwargs has 'clip_range', which Soft doesn't take: .* temperature"):
        tiny.config("x", objective="soft", objective_kwargs={"clip_range": 0.2})


@dataclass(frozen=True)
class Mixed(CreditRule):
    """The own step's value with a share of the last one's; every step is scored, the first too."""

    share: float = 0.0
    description: ClassVar[str] = "each step answers for itself and a little for the last"

    def scored_steps(self, used, num_steps):
        return range(used.start - 1, used.stop)

    def values(self, rewards, levels):
        return rewards[:, 1:] + self.share * rewards[:, -1:]


def test_a_credit_rule_is_trained_with_its_option_and_described(pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(CREDITS, "mixed", Mixed)
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1, step_credit="mixed", credit_kwargs={"share": 0.5})
    credit = trainer.algorithm.advantages.credit
    assert credit.rule == Mixed(0.5) and list(trainer.algorithm.scored_steps_at(0)) == [0, 1, 2, 3]
    got = credit(torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1), 3, lambda values: values)
    assert got.flatten().tolist() == [4.0, 5.0, 6.0]
    trainer.train()
    assert Mixed.description in (tmp_path / "adapter" / "README.md").read_text()


def test_a_plain_function_is_a_credit_rule_and_its_keywords_are_options(monkeypatch):
    def faded(per_step, gamma=0.5):
        return gamma * per_step

    monkeypatch.setitem(CREDITS, "faded", faded)
    rule = tiny.config("x", step_credit="faded", credit_kwargs={"gamma": 0.25}).credit_rule
    assert rule(torch.ones(1, 3, 1)).flatten().tolist() == [0.25] * 3 and "`faded`" in rule.description
    with pytest.raises(ValueError, match="credit_kwargs has 'beta', which faded doesn't take: .* are gamma"):
        tiny.config("x", step_credit="faded", credit_kwargs={"beta": 1})


def test_every_part_of_the_package_names_options_that_there_are_and_is_set_by_them():
    fields = {field.name for field in dataclasses.fields(tiny.TAFSGRPOConfig)}
    for part in (*KERNELS.values(), *CREDITS.values(), *OBJECTIVES.values()):
        assert set(part.reads.values()) <= fields, part
        own = {field.name for field in dataclasses.fields(part)} - set(part.reads) - {"kernel"}
        assert not own, f"{part}: {own} can be set by no option"
