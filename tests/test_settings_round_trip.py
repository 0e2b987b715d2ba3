"""What a run writes of its settings is a configuration, with which a run resolves the same settings."""

import json
from dataclasses import dataclass
from unittest import mock

import pytest

from trl_tafs import TAFSGRPOConfig
from trl_tafs.algorithm import build_algorithm
from trl_tafs.cli.arguments import parse_arguments
from trl_tafs.hub.card import write_model_card
from trl_tafs.hub.facts import CardFacts
from trl_tafs.method.credit import CREDITS
from trl_tafs.method.kernels import KERNELS, Sde
from trl_tafs.method.levels import uniform_levels, with_zero
from trl_tafs.method.objectives import OBJECTIVES, ClippedObjective
from trl_tafs.presets import PRESETS
from trl_tafs.training.plan import plan_epoch
from trl_tafs.training.settings import FACTS, resolved_settings
from trl_tafs.training.trackers import LocalTracker


@dataclass(frozen=True)
class Tapered(Sde):
    eta: float = 0.6
    power: float = 1.0

    def diffusion(self, s, s_next):
        return self.eta * s**self.power


@dataclass(frozen=True)
class Soft(ClippedObjective):
    temperature: float = 1.0


def faded(per_step, gamma=0.5):
    return gamma * per_step


@pytest.fixture(autouse=True)
def parts():
    with mock.patch.dict(KERNELS, {"tapered": Tapered}), mock.patch.dict(OBJECTIVES, {"soft": Soft}):
        with mock.patch.dict(CREDITS, {"faded": faded}):
            yield


def resolved(config):
    """The settings as the trainer resolves them, at 8 x 8 pixels."""
    levels = with_zero(uniform_levels(config.sample_num_steps))
    plan = plan_epoch(config, 2)
    algorithm = build_algorithm(config, plan.group_bounds, levels, (4, 8, 8))
    return resolved_settings(config, plan, algorithm, config.height or 8, config.width or 8)


OWN = {
    "objective": "soft",
    "sample_kernel": "tapered",
    "step_credit": "faded",
    "sampler_kwargs": {"power": 2.0},
    "credit_kwargs": {"gamma": 0.25},
    "objective_kwargs": {"temperature": 0.5},
}
GIVEN = {
    "lora_target_modules": ["attn.to_q", "attn.to_k"],
    "reward_weights": [0.5, 2],
    "negative_prompts": None,
    "tracker_kwargs": {"tensorboard": {"flush_secs": 7}},
    "accelerator_kwargs": {"dispatch_batches": None},
    "eval_num_steps": [2],
    "early_stopping_patience": 2,
    "metric_for_best_model": "eval/annealed_2/a",
    "eval_freq": 1,
    "hub_private_repo": True,
    "resume_from": "latest",
    "run_name": "first",
}
CONFIGS = {name: {"preset": name} for name in PRESETS} | {"own": OWN, "given": GIVEN, "default": {}}
CONFIGS["limit"] = {"preset": "paper", "train_kl_limit": 0.1, "train_num_inner_epochs": 2}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_read_back_to_the_same_settings(name, tmp_path):
    options = dict(CONFIGS[name])
    config = TAFSGRPOConfig.from_preset(options.pop("preset", "tafs_nft"), **options)
    settings = resolved(config)
    levels = [1.0] * config.sample_num_steps
    drawn = {"num_steps": len(levels), "levels": levels, "levels_unshifted": levels, "height": 8, "width": 8}
    write_model_card(CardFacts(pipeline_class="StableDiffusion3Pipeline", training=settings, **drawn), tmp_path)
    LocalTracker(tmp_path).store_init_configuration(settings)
    for file in ("training_settings.json", "config.json"):
        again = TAFSGRPOConfig.from_settings(tmp_path / file)
        assert resolved(again) == settings | {"resume_from": ""}, file
        assert resolved(parse_arguments(["--config", str(tmp_path / file)])[1]) == settings | {"resume_from": ""}
        assert TAFSGRPOConfig.from_settings(tmp_path / file, seed=7).seed == 7


def test_what_was_removed_is_named_and_left_out(tmp_path):
    path = tmp_path / "training_settings.json"
    path.write_text(json.dumps(dict.fromkeys(FACTS) | {"seed": 3, "run_name": "[removed]-3"}))
    with pytest.warns(UserWarning, match="run_name can't be read, since secrets or names were removed"):
        assert TAFSGRPOConfig.from_settings(path).seed == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("{", "can't be read as settings: Expecting property name"),
        ("[1]", "holds a list, not settings"),
        ('{"sede": 1}', "no option 'sede'; did you mean 'seed'"),
        ('{"seed": 1.5}', "seed is 1.5"),
        ('{"eval_num_steps": "[1"}', "eval_num_steps is '.1'; it must be a list"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(text, told, tmp_path):
    path = tmp_path / "settings.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=told):
        TAFSGRPOConfig.from_settings(path)


def test_only_what_an_objective_reads_is_resolved():
    assert resolved(TAFSGRPOConfig(objective="clipped"))["train_clip_range"] == 0.025
    assert resolved(TAFSGRPOConfig(objective="forward"))["train_clip_range"] == "null"
