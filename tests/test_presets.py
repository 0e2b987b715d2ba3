import dataclasses
import json

import pytest
import tiny

from trl_tafs import TAFSGRPOConfig
from trl_tafs.cli.arguments import parse_arguments
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
    _, config = parse_arguments(["--config", str(file), "--seed", "7"])
    assert (config.objective, config.step_credit, config.seed) == ("clipped", "sum", 7)
    assert config.level_weighting == PRESETS["paper"]["train_level_weighting"]
    arguments, config = parse_arguments(["--preset", "paper", "--train_level_weighting", "uniform"])
    assert (arguments.preset, config.level_weighting) == ("paper", "uniform")
    _, config = parse_arguments(["--preset=paper"])
    assert config.step_credit == "step"
    with pytest.raises(ValueError, match="no preset 'papers'"):
        parse_arguments(["--preset", "papers", "--config", str(file)])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_and_its_first_update_is_on_policy(name, pipeline, tmp_path):
    small = {"num_generations": 8, "num_epochs": 1, "sample_batch_size": 16, "sample_num_batches_per_epoch": 1}
    small |= {"train_batch_size": 4}
    trainer = tiny.trainer(pipeline, tmp_path, prompt_function=["one", "two", "three"], **preset(name) | small)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    update, *others = [line for line in lines if "loss" in line]
    assert len(others) + 1 == preset(name).get("train_updates_per_epoch", 1)
    assert all(line["grad_norm"] > 0 for line in (update, *others))
    if "ratio_deviation" in update:
        assert update["ratio_deviation"] < 1e-5


def test_presets_are_told_apart_by_what_their_papers_tell_them_apart():
    def differs(name, other):
        a, b = (dataclasses.asdict(TAFSGRPOConfig.from_preset(key)) for key in (name, other))
        return {key for key in a if a[key] != b[key]} - {"exp_name", "run_name"}

    assert differs("paper", "tafs_annealed") == {"train_level_weighting"}
    assert differs("tafs", "tafs_without_step_advantage") == {"step_credit"}
    assert differs("tafs", "tafs_without_annealing") == {"sample_kernel", "sample_eta"}
    assert differs("tafs_annealed", "tafs_trace") == {"group_allocation", "step_credit", "credit_trace"}
    assert differs("flow_grpo", "superflow") == {"group_allocation", "train_level_weighting"}
    assert differs("tafs_nft", "tafs_nft_stepwise") == {"forward_images"}
    assert differs("flow_grpo", "flow_grpo_fast") == {
        *("sample_window_size", "sample_window_range", "sample_window_order", "sample_window_interval"),
        *("sample_eta", "beta", "train_kl_weighting", "train_log_prob_reduction", "train_clip_range"),
    }
    assert dataclasses.asdict(TAFSGRPOConfig()) == dataclasses.asdict(TAFSGRPOConfig.from_preset("tafs"))
