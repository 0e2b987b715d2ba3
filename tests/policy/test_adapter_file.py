"""LoRA files: they reload at the right strength in plain diffusers, and bad ones are refused."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from digits_components import build_pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from published import LAYERS, SIZES, images, sampled, with_lora
from safetensors.torch import load_file, save_file

from trl_tafs.policy.adapter_file import (
    SCHEDULER_FILE,
    WEIGHT_NAME,
    check_adapter_fits,
    lora_metadata,
    read_adapter,
    save_adapter,
)
from trl_tafs.policy.denoiser_file import applied

CONFIGS = {
    "plain": {"lora_alpha": 16},
    "rslora": {"lora_alpha": 16, "use_rslora": True},
    "rank_pattern": {"lora_alpha": 16, "rank_pattern": {"transformer_blocks.0.attn.to_q": 2, "to_k": 8}},
    "alpha_pattern": {"lora_alpha": 16, "alpha_pattern": {"transformer_blocks.1.attn.to_q": 3, "to_v": 32}},
    "dora": {"lora_alpha": 16, "use_dora": True},
    "regex": {"lora_alpha": 16, "target_modules": r".*attn\.to_[qk]"},
    "dropout": {"lora_alpha": 16, "lora_dropout": 0.5},
}


def reloaded(folder):
    """The images of a plain pipeline with the adapter and the scheduler of `folder`."""
    pipeline = build_pipeline(0, **SIZES)
    pipeline.load_lora_weights(str(folder))
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(folder), subfolder="scheduler")
    return sampled(pipeline)


@pytest.fixture(scope="module")
def base_images():
    return images(build_pipeline(0, **SIZES))


@pytest.fixture
def saved(tmp_path):
    """The folder of a saved adapter with alpha = 4 r."""
    pipeline, config = with_lora(lora_alpha=16)
    return save_adapter(pipeline, tmp_path / "adapter", lora_config=config)


@pytest.mark.parametrize("kind", CONFIGS)
def test_reloads_bit_equal_in_plain_diffusers(kind, tmp_path, base_images):
    pipeline, config = with_lora(**CONFIGS[kind])
    save_adapter(pipeline, tmp_path, lora_config=config)
    expected = images(pipeline)
    assert torch.equal(reloaded(tmp_path), expected)
    assert (expected - base_images).abs().max() > 0.01


def test_continues_bit_equal_from_what_was_read(tmp_path):
    pipeline, config = with_lora(**CONFIGS["rank_pattern"], use_rslora=True)
    state_dict, read = read_adapter(save_adapter(pipeline, tmp_path, lora_config=config))
    again = build_pipeline(0, **SIZES)
    check_adapter_fits(state_dict, again.transformer)
    again.transformer.add_adapter(read)
    assert not set_peft_model_state_dict(again.transformer, state_dict).unexpected_keys
    assert torch.equal(images(again), images(pipeline))


def test_plain_lora_publishes_five_fields_and_others_what_differs():
    def config(**settings):
        return LoraConfig(r=4, target_modules=LAYERS, init_lora_weights="gaussian", **settings)

    plain = {"r": 4, "lora_alpha": 16, "target_modules": LAYERS, "rank_pattern": {}, "alpha_pattern": {}}
    assert lora_metadata(config(lora_alpha=16, base_model_name_or_path="/home/alice/sd3")) == plain
    assert lora_metadata(config(lora_alpha=16, use_rslora=True)) == {**plain, "use_rslora": True}
    assert lora_metadata(config()) == {**plain, "lora_alpha": 8}  # PEFT's default is written too


def test_weights_are_float32_under_the_pipelines_prefix(tmp_path):
    pipeline, config = with_lora()
    half = {k: v.bfloat16().T.contiguous().T for k, v in get_peft_model_state_dict(pipeline.transformer).items()}
    save_adapter(pipeline, tmp_path, lora_config=config, state_dict=half)
    weights = load_file(tmp_path / WEIGHT_NAME)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(key.startswith("transformer.transformer_blocks.") for key in weights)


def test_scheduler_anneals_and_keeps_the_rest(tmp_path):
    pipeline, config = with_lora()
    shifted = {**pipeline.scheduler.config, "shift": 3.0, "_name_or_path": "/home/alice/sd3"}
    save_adapter(pipeline, tmp_path, lora_config=config, scheduler_config=shifted)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.stochastic_sampling and scheduler.config.shift == 3.0
    assert "alice" not in (tmp_path / SCHEDULER_FILE).read_text()


def test_saves_other_weights_for_the_attached_ones(tmp_path, base_images):
    pipeline, config = with_lora()
    zeros = {k: torch.zeros_like(v) for k, v in get_peft_model_state_dict(pipeline.transformer).items()}
    save_adapter(pipeline, tmp_path, lora_config=config, state_dict=zeros)
    assert torch.equal(reloaded(tmp_path), base_images)
    key = next(iter(zeros))
    with pytest.raises(ValueError, match="2 names are not in both.*lora_A.default"):
        renamed = {key.replace("lora_A", "lora_A.default"): zeros.pop(key), **zeros}
        save_adapter(pipeline, tmp_path, lora_config=config, state_dict=renamed)


def test_interrupted_save_leaves_the_old_adapter(saved):
    class Torn(StableDiffusion3Pipeline):
        @classmethod
        def save_lora_weights(cls, folder, weight_name, **kwargs):
            Path(folder, weight_name).write_bytes(b"half")
            raise OSError("no space left on device")

    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    pipeline, config = with_lora()
    pipeline.__class__ = Torn
    with pytest.raises(OSError, match="no space left"):
        save_adapter(pipeline, saved, lora_config=config)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, "cannot hold bias='all'"),
        ({"modules_to_save": ["proj_out"]}, "cannot hold modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
        ({"target_modules": None}, "no target_modules"),
    ],
)
def test_refuses_what_would_reload_otherwise(settings, message):
    with pytest.raises(ValueError, match=message):
        lora_metadata(LoraConfig(**{"r": 4, "target_modules": LAYERS, **settings}))


def test_names_the_attached_adapters_when_there_is_no_such(tmp_path):
    pipeline, config = with_lora()
    with pytest.raises(ValueError, match=r"no adapter 'ema' .* attached are \['default'\]"):
        save_adapter(pipeline, tmp_path, lora_config=config, adapter_name="ema")


def test_without_metadata_alpha_is_the_rank_with_a_warning(saved, caplog):
    weights = load_file(saved / WEIGHT_NAME)
    save_file(weights, saved / WEIGHT_NAME)
    _, config = read_adapter(saved)
    assert (config.r, config.lora_alpha) == (4, 4)
    assert "alpha is taken as the rank, 4" in caplog.text


def test_torn_files_are_named_at_any_length(saved):
    content = (saved / WEIGHT_NAME).read_bytes()
    for size in (0, 4, 200, len(content) // 2, len(content) - 1):
        (saved / WEIGHT_NAME).write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"weights.safetensors \({size} bytes\) is torn.*earlier checkpoint"):
            read_adapter(saved)


def test_missing_file_says_what_is_there(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"no pytorch_lora.*\['adapter_model.*PEFT's format"):
        read_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder here, and the Hub gave no"):
        read_adapter(tmp_path / "nothing")


A, B = torch.zeros(4, 16), torch.zeros(16, 4)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight", "is in PEFT's format"),
        ("unet.down_blocks.0.attn1.to_q.lora_A.weight", r"as a UNet \(SD 1.5 or SDXL\) has"),
        ("lora_unet_down_blocks_0.lora_up.weight", "a UNet in kohya's format"),
        ("text_encoder.layers.0.q_proj.lora_A.weight", "also adapts a text encoder"),
        ("transformer.proj_out.weight", r"expected keys such as 'transformer.<module>.lora_A.weight'"),
    ],
)
def test_other_formats_are_named(tmp_path, key, message):
    save_file({key: A}, tmp_path / WEIGHT_NAME)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def test_metadata_must_agree_with_the_weights(tmp_path):
    layer = "transformer.transformer_blocks.0.attn.to_q.lora_"
    header = json.dumps({"transformer.r": 8, "transformer.lora_alpha": 8, "transformer.target_modules": ["to_q"]})
    file = tmp_path / WEIGHT_NAME
    save_file({layer + "A.weight": A, layer + "B.weight": B}, file, metadata={"lora_adapter_metadata": header})
    with pytest.raises(ValueError, match=r"r=8 in its metadata, \[4\] in its weights"):
        read_adapter(file)
    header = header.replace('"transformer.r": 8', '"transformer.r": 4, "transformer.next_years_field": 1')
    save_file({layer + "A.weight": A, layer + "B.weight": B}, file, metadata={"lora_adapter_metadata": header})
    with pytest.raises(ValueError, match="next_years_field.*upgrade peft"):
        read_adapter(file)


def test_adapter_of_another_family_or_size_does_not_fit():
    transformer = with_lora()[0].transformer  # with or without an adapter of its own
    layer = "transformer_blocks.0.attn.to_q.lora_"
    check_adapter_fits({layer + "A.weight": A, layer + "B.weight": B}, transformer)
    with pytest.raises(ValueError, match=r"to_q.lora_B.weight is \(24, 4\), and SD3.* maps 16 to 16 features"):
        check_adapter_fits({layer + "A.weight": A, layer + "B.weight": torch.zeros(24, 4)}, transformer)
    with pytest.raises(ValueError, match=r"'single_tr.*lora_A.weight' \(4, 16\), and SD3.*like one for FLUX.1"):
        check_adapter_fits({"single_transformer_blocks.0.attn.to_q.lora_A.weight": A}, transformer)


# Strength where the header isn't read -------------------------------------------------------------------------


def in_comfyui(folder):
    """The images of a base with ComfyUI's patches: W += (alpha / r where there is an alpha key, else 1) B A."""
    weights, pipeline = load_file(folder / WEIGHT_NAME), build_pipeline(0, **SIZES)
    for key, up in weights.items():
        if not key.endswith(".lora_B.weight"):
            continue
        path = key.removesuffix(".lora_B.weight")
        alpha = weights.get(f"{path}.alpha")
        strength = 1.0 if alpha is None else float(alpha) / up.shape[1]
        layer = pipeline.transformer.get_submodule(path.removeprefix("transformer."))
        layer.weight.data += strength * up @ weights[f"{path}.lora_A.weight"]
    return images(pipeline)


def from_a_dict(folder):
    """The images of plain diffusers that is given the weights alone."""
    pipeline = build_pipeline(0, **SIZES)
    pipeline.load_lora_weights(load_file(folder / WEIGHT_NAME))
    return images(pipeline)


def into_the_denoiser(folder):
    """The images of plain diffusers whose denoiser is given the weights alone."""
    pipeline = build_pipeline(0, **SIZES)
    pipeline.transformer.load_lora_adapter(load_file(folder / WEIGHT_NAME), prefix="transformer")
    return images(pipeline)


@pytest.mark.parametrize("kind", ["plain", "rslora", "rank_pattern", "alpha_pattern", "dora", "bias"])
def test_a_folded_adapter_acts_the_same_however_it_is_read(kind, tmp_path, base_images):
    pipeline, config = with_lora(
        **(CONFIGS | {"bias": {"lora_alpha": 16, "lora_bias": True, "init_lora_weights": True}})[kind]
    )
    expected = images(pipeline)
    save_adapter(pipeline, tmp_path, lora_config=config, fold_alpha=True)
    ways = {"file": reloaded, "dict": from_a_dict, "denoiser": into_the_denoiser}
    if kind not in ("dora", "bias"):  # of which ComfyUI's rule is another
        ways["comfyui"] = in_comfyui
    exact = kind in ("plain", "dora", "bias")  # factors that are powers of two, and ranks that are all alike
    for name, way in ways.items():
        found = way(tmp_path)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(found, expected) or not exact or name == "comfyui", name
    again, read = read_adapter(tmp_path)
    assert read.lora_alpha == read.r and not read.use_rslora
    going_on = build_pipeline(0, **SIZES)
    going_on.transformer.add_adapter(read)
    set_peft_model_state_dict(going_on.transformer, again)
    torch.testing.assert_close(images(going_on), expected, atol=1e-5, rtol=0)
    assert (expected - base_images).abs().max() > 0.01


# Parts of adapters --------------------------------------------------------------------------------------------


def rewritten(folder, change):
    """The adapter's file with other weights and the same header."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHT_NAME, "pt") as file:
        header = file.metadata()
    weights = load_file(folder / WEIGHT_NAME)
    change(weights)
    save_file(weights, folder / WEIGHT_NAME, metadata=header)


def test_halves_parts_and_mixed_ranks_are_named(saved):
    whole = load_file(saved / WEIGHT_NAME)
    layer = "transformer.transformer_blocks.1.attn.to_k"
    rewritten(saved, lambda weights: weights.pop(f"{layer}.lora_B.weight"))
    with pytest.raises(ValueError, match=r"1 of 8 layers are halves, the first '.*1.attn.to_k'.*lacks lora_B"):
        read_adapter(saved)

    def mixed(weights):
        weights.update(whole)
        weights[f"{layer}.lora_A.weight"], weights[f"{layer}.lora_B.weight"] = torch.zeros(2, 16), torch.zeros(16, 2)

    rewritten(saved, mixed)
    with pytest.raises(ValueError, match=r"the rank of '.*1.attn.to_k' is 2, and the metadata's is 4.*rank_pattern"):
        read_adapter(saved)

    def half(weights):
        weights.update(whole)
        for key in [key for key in weights if ".0." in key.partition("attn")[0]]:
            del weights[key]

    rewritten(saved, half)
    weights, config = read_adapter(saved)
    base = build_pipeline(0, **SIZES)
    with pytest.raises(ValueError, match=r"lacks 4 of the 8 layers that its metadata targets.*blocks.0.attn.to_q"):
        check_adapter_fits(weights, base.transformer, config)
    with pytest.warns(UserWarning, match=r"lacks 4 of the 8 layers"), applied(base, saved):
        pass
    rewritten(saved, lambda weights: weights.update(whole))
    weights, config = read_adapter(saved)
    check_adapter_fits(weights, with_lora()[0].transformer, config)


def test_an_adapter_is_applied_above_what_a_pipeline_carries_and_taken_off_again(saved):
    pipeline, config = with_lora(lora_alpha=2)
    alone = images(pipeline)
    with applied(pipeline, saved):
        both = images(pipeline)
    assert not torch.equal(both, alone)
    assert torch.equal(images(pipeline), alone) and list(pipeline.transformer.peft_config) == ["default"]
    pipeline.load_lora_weights(saved, adapter_name="second")
    pipeline.set_adapters(["default", "second"])
    assert torch.equal(images(pipeline), both), "as plain diffusers has both"
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match=r"fused.*unload_lora_weights\(\)"), applied(pipeline, saved):
        pass
