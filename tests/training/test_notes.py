"""What is said before training of settings and prompts that work, and do other than one may think."""

import warnings

import families
import pytest
import tiny
from families import FAMILIES
from peft import LoraConfig

from trl_tafs.pipelines.components import vae_tiles
from trl_tafs.training.notes import setting_notes
from trl_tafs.training.plan import plan_epoch

ONE = {"sample_num_batches_per_epoch": 1, "num_generations": 8}


def notes(pipeline, folder, **changes):
    """What a trainer says at its start."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        tiny.trainer(pipeline, folder, **changes)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def test_an_ordinary_run_says_nothing(pipeline, tmp_path):
    assert notes(pipeline, tmp_path, prompt_function=["two", "three"], eval_prompts=["four"], eval_freq=1) == []


def test_prompts_are_looked_at_before_training(pipeline, tmp_path):
    long = "a handwritten seven " * 8
    held_out = {"eval_prompts": ["four", "four"], "eval_freq": 1}
    said = notes(pipeline, tmp_path, **ONE, **held_out, prompt_function=["two", "three", "two", long])
    for part in (
        "an epoch is one prompt: its 8 images are one group of num_generations=8",
        "1 of 4 prompts repeat others: 'two', for example, is there 2 times",
        "1 of 3 prompts are longer than max_sequence_length=",
        "1 of 2 eval_prompts repeat others",
    ):
        assert sum(part in text for text in said) == 1, (part, said)
    assert len(said) == 4


def test_weights_of_held_out_rewards_are_told_to_be_idle(pipeline, tmp_path):
    held_out = {"eval_prompts": ["four"], "eval_freq": 1, "eval_reward_function": {"judge": (tiny.brightness, 2.0)}}
    (said,) = notes(pipeline, tmp_path, **held_out)
    assert "the weights of eval_reward_function have no effect" in said


def test_one_prompt_is_no_news_where_there_is_one(pipeline, tmp_path):
    assert notes(pipeline, tmp_path / "one", **ONE, prompt_function=["two"]) == []
    assert any("one prompt" in text for text in notes(pipeline, tmp_path / "function", **ONE))


def test_settings_that_do_less_than_one_may_think(pipeline, tmp_path):
    def said(**changes):
        config = tiny.config(tmp_path, **changes)
        return " ".join(setting_notes(config, plan_epoch(config, 1), pipeline, (8, 8)))

    assert "rounding alone" in said(mixed_precision="bf16", train_batch_size=4)
    assert said(mixed_precision="bf16") == said(mixed_precision="no", train_batch_size=4) == ""
    assert said(mixed_precision="bf16", train_batch_size=4, objective="forward") == "", "no ratio"
    size = pipeline.vae.tile_sample_min_size
    assert ("no effect at 8 x 8" in said(vae_tiling=True)) == (size >= 8)
    assert vae_tiles(pipeline.vae, size + 2, size) and not vae_tiles(pipeline.vae, size, size)


@pytest.mark.parametrize(
    ("source", "adapters", "sign"),
    [
        ("stabilityai/stable-diffusion-3.5-large-turbo", [], "by its name, stable-diffusion-3.5-large-turbo"),
        ("stabilityai/stable-diffusion-3.5-large", [], None),
        ("someone/sd3.5-8steps", ["style"], "by its name, sd3.5-8steps"),
        ("someone/base", ["style", "my_turbo_lora"], "by the name of a LoRA in it, my_turbo_lora"),
        ("turbo/base", [], None),
        ("someone/z-image-de-turbo", ["default"], None),
    ],
)
def test_a_model_known_to_draw_in_few_steps_is_told_of_once(pipeline, tmp_path, source, adapters, sign):
    pipeline.register_to_config(_name_or_path=source)
    for name in adapters:
        pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"]), adapter_name=name)
    if adapters:
        pipeline.set_adapters(adapters)
    config = tiny.config(tmp_path)
    told = [text for text in setting_notes(config, plan_epoch(config, 1), pipeline, (8, 8)) if "few steps" in text]
    assert len(told) == (sign is not None)
    assert sign is None or (f"({sign})" in told[0] and "preset tafs_dm" in told[0])
    config.dm_weight = 1.0
    assert not any("few steps" in text for text in setting_notes(config, plan_epoch(config, 1), pipeline, (8, 8)))


def test_a_run_on_a_distilled_model_says_so_at_its_start(pipeline, tmp_path):
    pipeline.register_to_config(_name_or_path="someone/stable-diffusion-3.5-large-turbo")
    (said,) = notes(pipeline, tmp_path)
    assert "draws in few steps already" in said


def test_a_reward_s_rows_are_asked_at_the_start(pipeline, tmp_path):
    def judge(images, prompts, metadata):
        return images.mean((1, 2, 3))

    judge.required_metadata = ("digit",)
    rows = [{"prompt": "two", "digit": 2}, {"prompt": "three"}]
    with pytest.raises(ValueError, match="prompts, row 1 .'three'. has no digit, which reward 'judge' needs"):
        tiny.trainer(pipeline, tmp_path, reward=judge, prompt_function=rows)
    with pytest.raises(ValueError, match="eval_prompts, row 1 .'three'. has no digit"):
        tiny.trainer(pipeline, tmp_path, eval_reward_function=judge, eval_prompts=rows, eval_freq=1)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("flux-schnell", "flux2-klein-distilled")])
def test_tokens_are_counted_as_the_family_counts_them(name):
    mine = families.ours(families.stock(name), name)
    if name == "qwen-image":
        mine.prompt_template_encode_start_idx = 2  # the tiny tokenizer's template is shorter
    if name == "ovis-image":
        mine.user_prompt_begin_id = 2
    prompts = ["a photo", "a photo of red cat"]
    short, long = mine.prompt_tokens(prompts)
    assert long > short >= 2 and mine.prompt_tokens([]) == []
    if name in ("qwen-image", "z-image"):  # their masks show what is left of a prompt
        assert mine.embed(prompts, 64).mask.sum(1).tolist() == [short, long]
