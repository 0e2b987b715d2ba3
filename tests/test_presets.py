import dataclasses

import pytest

from trl_tafs import TAFSGRPOConfig, cli
from trl_tafs.presets import PRESETS, preset

FIELDS = {field.name for field in dataclasses.fields(TAFSGRPOConfig)}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration(name):
    assert set(PRESETS[name]) <= FIELDS
    config = TAFSGRPOConfig.from_preset(name)
    assert all(getattr(config, key) == value for key, value in PRESETS[name].items())


def test_options_count_more_than_a_preset():
    config = TAFSGRPOConfig.from_preset("paper", step_credit="gain", seed=3)
    assert (config.step_credit, config.seed, config.objective) == ("gain", 3, "clipped")
    assert PRESETS["paper"]["step_credit"] == "step", "the preset is left as it is"


def test_the_papers_preset_is_equation_10_to_the_letter():
    config = TAFSGRPOConfig.from_preset("paper")
    assert (config.objective, config.step_credit, config.level_weighting) == ("clipped", "step", "gaussian")
    assert (config.sample_num_steps, config.lora_rank, config.lora_alpha) == (4, 32, 64)
    assert (config.train_learning_rate, config.train_adam_weight_decay, config.beta) == (3e-4, 1e-4, 0.0)


def test_an_unknown_preset_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match="there is no preset 'papers'; use one of paper"):
        preset("papers")


def test_command_line_before_yaml_before_preset_before_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: paper\nstep_credit: sum\nseed: 5\n")
    _, config = cli.parse_arguments(["--config", str(file), "--seed", "7"])
    assert (config.objective, config.step_credit, config.seed) == ("clipped", "sum", 7)
    assert config.level_weighting == PRESETS["paper"]["train_level_weighting"]
    arguments, config = cli.parse_arguments(["--preset", "paper", "--train_level_weighting", "uniform"])
    assert (arguments.preset, config.level_weighting) == ("paper", "uniform")
    _, config = cli.parse_arguments(["--preset=paper"])
    assert config.step_credit == "step"
    with pytest.raises(ValueError, match="no preset 'papers'"):
        cli.parse_arguments(["--preset", "papers", "--config", str(file)])
