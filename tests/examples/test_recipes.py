"""The recipes say what the evidence supports, parse to options that can work, and have the memory that is planned."""

import importlib.util
import re
import sys

import pytest
import tiny
import torch
import yaml
from diffusers import ConfigMixin

from trl_tafs.prompts.sets import load_prompts
from trl_tafs.rewards.loading import reward_label
from trl_tafs.training.plan import plan_epoch

CONFIGS = tiny.ROOT / "examples" / "configs"
OTHERS = {"digits", "scenes"}  # embedded pipelines, with READMEs of their own
QUICK = ("sana_24gb",)


@pytest.fixture(scope="module")
def recipes():
    sys.path.insert(0, str(CONFIGS))
    spec = importlib.util.spec_from_file_location("make_recipes", CONFIGS / "make_recipes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(CONFIGS))
        del sys.modules[spec.name]


NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in OTHERS)


def text(name):
    return (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")


def head(name):
    """What stands above the options."""
    return "".join(line for line in text(name).partition("\n\n")[0].splitlines(keepends=True) if line[0] == "#")


def test_every_recipe_has_its_file_and_every_file_its_recipe(recipes):
    assert NAMES == sorted(recipes.RECIPES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_one_that_the_evidence_supports(name, recipes, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    arguments, config = recipes.parsed(text(name))
    trained, held = ([reward_label(item) for item in items] for items in (arguments.reward, arguments.eval_reward))
    assert len(trained) > 1 and held and not set(trained) & set(held)
    assert config.multi_objective_aggregation == "normalize_then_sum"
    sampler, steps = config.eval_samplers[0], config.sample_num_steps
    assert config.metric_for_best_model == f"eval/{sampler}_{steps}/{held[0]}" and config.eval_freq > 0
    assert steps in config.eval_num_steps and config.eval_images_per_prompt > 1  # diversity needs two
    assert arguments.eval_prompts != arguments.prompts and len(load_prompts(arguments.eval_prompts)) >= 64
    assert config.train_batch_size == config.sample_batch_size and config.mixed_precision == "bf16"
    assert 3e-4 <= config.train_learning_rate <= 3e-3  # what docs/learning.md measured
    assert set(arguments.reward_options) == {*trained, *held}
    capacity, processes = recipes.CARDS[recipes.RECIPES[name].card]
    epoch = plan_epoch(config, processes)
    assert epoch.num_groups >= 4 and epoch.local_images == recipes.IMAGES[processes]
    assert f"An epoch: {epoch.line(1)}." in head(name)
    assert peak_of(head(name)) <= capacity and f"of {capacity}." in head(name)


def test_held_out_prompts_are_distinct():
    prompts = load_prompts(str(CONFIGS / "held_out.txt"))
    assert len(set(prompts)) == len(prompts) == 64


SMALL = ("sd35_medium_24gb", "sana_24gb", "flux2_klein_24gb")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SMALL else [pytest.mark.slow]) for n in NAMES])
def test_an_architecture_has_as_many_weights_as_its_model(name, recipes, tmp_path):
    model = recipes.RECIPES[name].model
    folder = recipes.recipe_models.write(model, tmp_path)
    _, kind, _ = recipes.recipe_models.MODELS[model]["parts"]["transformer"]
    made: type[ConfigMixin] = getattr(__import__("diffusers"), kind)
    with torch.device("meta"):
        denoiser = made.from_config(made.load_config(folder, subfolder="transformer"))
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    billions = recipes.recipe_models.MODELS[model]["billions"]
    assert sum(tensor.numel() for tensor in tensors) / 1e9 == pytest.approx(billions, rel=0.075)


def test_the_document_has_the_table_of_the_files(recipes):
    assert recipes.table() in (tiny.ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def peak_of(which):
    return float(re.search(r"peak ([\d.]+) of", which)[1])


@pytest.mark.parametrize("name", QUICK)
def test_a_header_has_the_planned_peak(name, recipes, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    made, _ = recipes.planned(recipes.RECIPES[name], text(name))
    assert made.peak() / recipes.GIB == pytest.approx(peak_of(head(name)), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_what_the_planner_finds(name, recipes, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    found = recipes.text_of(name)
    assert yaml.safe_load(found) == yaml.safe_load(text(name)), "run python examples/configs/make_recipes.py"
    assert peak_of(found) == pytest.approx(peak_of(text(name)), rel=0.05)


@pytest.mark.slow
def test_what_is_not_shipped_does_not_fit(recipes, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    told = (tiny.ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for title, recipe in recipes.NOT_SHIPPED.items():
        assert title in told and recipes.search(recipe, "none") is None, title
