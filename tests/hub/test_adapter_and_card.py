"""Adapters reload at the right strength in plain diffusers, also over HTTP, and publish nothing private."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "digits"), str(ROOT / "tests")]

from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline  # noqa: E402
from digits_components import MAX_LENGTH, build_pipeline  # noqa: E402
from hub_stub import HubStub  # noqa: E402
from peft import LoraConfig  # noqa: E402
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from trl_tafs import AutoTAFSPipeline  # noqa: E402
from trl_tafs.hub.card import create_model_card, usage_code, write_model_card  # noqa: E402
from trl_tafs.hub.facts import CardFacts, base_model_facts  # noqa: E402
from trl_tafs.hub.scrub import scrub  # noqa: E402
from trl_tafs.method.credit import SumCredit  # noqa: E402
from trl_tafs.method.kernels import FlowSde, Ode  # noqa: E402
from trl_tafs.method.objectives import ClippedObjective  # noqa: E402
from trl_tafs.policy.adapter_file import (  # noqa: E402
    SCHEDULER_FILE,
    WEIGHT_NAME,
    check_adapter_fits,
    lora_metadata,
    read_adapter,
    save_adapter,
)

SIZES = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "text_width": 16}
LAYERS = ["attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"]
LEVELS = [1.0, 0.75, 0.5, 0.25]
SAMPLING = {"num_inference_steps": 4, "sigmas": LEVELS, "guidance_scale": 1.0, "height": 8, "width": 8}
CONFIGS = {
    "plain": {"lora_alpha": 16},
    "rslora": {"lora_alpha": 16, "use_rslora": True},
    "rank_pattern": {"lora_alpha": 16, "rank_pattern": {"transformer_blocks.0.attn.to_q": 2, "to_k": 8}},
    "alpha_pattern": {"lora_alpha": 16, "alpha_pattern": {"transformer_blocks.1.attn.to_q": 3, "to_v": 32}},
    "dora": {"lora_alpha": 16, "use_dora": True},
    "regex": {"lora_alpha": 16, "target_modules": r".*attn\.to_[qk]"},
    "dropout": {"lora_alpha": 16, "lora_dropout": 0.5},
}


def with_lora(**settings):
    """A pipeline that carries a LoRA with random A and B, r = 4, and its LoraConfig."""
    config = LoraConfig(**{"r": 4, "target_modules": LAYERS, "init_lora_weights": "gaussian", **settings})
    pipeline = build_pipeline(0, **SIZES)
    pipeline.transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(3)
    for name, weight in pipeline.transformer.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            weight.data.normal_(0, 0.3, generator=generator)
    pipeline.transformer.eval()
    return pipeline, config


def images(pipeline):
    """Four annealed steps at LEVELS, (2, 3, 8, 8), whether the pipeline's own scheduler anneals or not."""
    config = pipeline.scheduler.config
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True)
    return sampled(pipeline)


def sampled(pipeline):
    torch.manual_seed(1)
    prompts = ["a handwritten seven", "the digit two"]
    return pipeline(prompts, max_sequence_length=MAX_LENGTH, output_type="pt", **SAMPLING).images


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


# Saving


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


# Reading


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


# What is published

TOKEN = "hf_" + "abcdefgh" * 4
KEY = "0123456789abcdef" * 2 + "01234567"  # as W&B's
PRIVATE = (TOKEN, KEY, "alicesmith", "/home/", "secret-value", "/data/", "bob@", "gpu-box-17", "swordfish")
SETTINGS = {
    "train_learning_rate": 3e-4,
    "seed": 0,
    "max_sequence_length": 8,
    "logdir": "/home/alicesmith/runs/digits",
    "resume_from": Path("/data/alicesmith/checkpoints/epoch 7"),
    "run_name": "alicesmith_run-3",
    "hub_token": TOKEN,
    "resolution": torch.float32,
    "tracker_kwargs": {
        "wandb": {"entity": "alice", "apiKey": "secret-value", "notes": f"see {TOKEN}, or ask bob@lab.org"},
        "tags": [
            "a",
            f"key {KEY}",
            "out=/home/alicesmith/x/y.txt",
            "https://alicesmith:swordfish@host.org/x",
        ],
    },
    "project_kwargs": {
        "project_dir": "~alicesmith/p",
        "nested": [{"password": "swordfish", "depth": (1, 2)}],
    },
    "negative_prompts": "blurry and/or dark, 1/2 size",
    "docs": "https://huggingface.co/docs/peft",
    "node": "gpu-box-17",
    "comment": "the word was swordfish",
    "accelerator_kwargs": json.dumps({"wandb": {"api_key": "secret-value", "mode": "offline"}}),
    "command": "train --hub_token=secret-value --wandb-password swordfish {'user_name': 'secret-value'}",
}


def on_a_private_machine(patch):
    """A machine with a name, a user and a secret in its environment."""
    patch.setattr("socket.gethostname", lambda: "gpu-box-17")
    patch.setenv("LOGNAME", "alicesmith")
    patch.setenv("MY_API_KEY", "swordfish")


@pytest.fixture
def elsewhere(monkeypatch):
    on_a_private_machine(monkeypatch)


def test_scrub_keeps_the_training_and_drops_the_machine(elsewhere):
    published = scrub(SETTINGS)
    text = json.dumps(published)
    assert [part for part in PRIVATE if part in text] == []
    kept = ("train_learning_rate", "seed", "max_sequence_length", "negative_prompts", "docs")
    assert {name: published[name] for name in kept} == {name: SETTINGS[name] for name in kept}
    assert (published["logdir"], published["resume_from"]) == ("digits", "epoch 7")
    assert published["tracker_kwargs"]["tags"][2] == "out=y.txt"
    assert published["project_kwargs"]["nested"] == [{"depth": [1, 2]}]
    assert published["accelerator_kwargs"] == {"wandb": {"mode": "offline"}}
    assert scrub(published) == published


def test_scrub_takes_names_from_homes_of_other_machines():
    settings = {
        "a": "/Users/carol.jones/x",
        "b": "carol.jones",
        "c": r"C:\Users\dave99\data",
        "d": ["dave99"],
    }
    assert scrub(settings) == {"a": "x", "b": "[removed]", "c": "data", "d": ["[removed]"]}
    assert scrub({"home": "/home/erin", "tilde": "~", "revision": KEY}) == {
        "home": "[removed]",
        "tilde": "[removed]",
        "revision": KEY,
    }


def facts(**settings):
    usual = {
        "pipeline_class": "StableDiffusion3Pipeline",
        "card_tags": ("sd3", "sd3-diffusers"),
        "num_steps": 4,
        "levels_unshifted": LEVELS,
        "levels": [1.0, 0.9, 0.75, 0.5],
        "height": 8,
        "width": 8,
        "max_sequence_length": MAX_LENGTH,
        "base_name": "digits-base",
        "repo_id": "user/digits-lora",
        "prompts": ["a handwritten seven"],
        "training": SETTINGS,
        "rewards": {"legible": 1.0},
        "reward_curve": [(0, 0.2), (1, 0.4)],
        "metrics": {"4 annealed steps": {"before": 0.19, "after": 0.845}},
        "pictures": [("a handwritten seven", "images/before_0.png", "images/after_0.png")],
    }
    return CardFacts(**{**usual, **settings})


def test_card_metadata(elsewhere):
    made = create_model_card(
        facts(
            base_model="stabilityai/stable-diffusion-3.5-medium",
            base_license="other",
            base_license_name="stabilityai-ai-community",
            base_license_link="https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md",
        )
    )
    metadata = yaml.safe_load(str(made).split("---\n")[1])
    assert metadata["library_name"] == "diffusers" and metadata["pipeline_tag"] == "text-to-image"
    assert metadata["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert metadata["base_model_relation"] == "adapter"
    assert (metadata["license"], metadata["license_name"]) == ("other", "stabilityai-ai-community")
    assert {"text-to-image", "lora", "diffusers", "trl", "tafs-grpo", "sd3"} <= set(metadata["tags"])
    assert metadata["widget"] == [{"text": "a handwritten seven", "output": {"url": "images/after_0.png"}}]
    text = str(made)
    for part in (
        "| 2 | 0.75 | 0.9 |",
        "| 4 annealed steps | 0.19 | 0.845 |",
        "| legible | 1 |",
        "2512.17951",
    ):
        assert part in text
    assert [part for part in PRIVATE if part in text] == []


def test_card_of_a_base_that_is_not_on_the_hub():
    made = create_model_card(facts(base_license="bsd-3-clause", prompts=['the "7"\nof | Ann'], pictures=()))
    metadata = yaml.safe_load(str(made).split("---\n")[1])
    assert "base_model" not in metadata and "widget" not in metadata
    assert metadata["license"] == "bsd-3-clause"
    compile(usage_code(facts(prompts=['the "7"\nof'])), "card", "exec")
    assert 'from_pretrained("digits-base")  # the folder' in made.text
    bare = create_model_card(facts(training={}, rewards={}, reward_curve=(), metrics={}, repo_id=None))
    assert not re.search(r"## Results|<details>|reward_curve|None|\n\n\n", bare.text)


def test_the_card_says_how_it_was_trained_and_is_to_be_sampled():
    def text(**settings):
        return create_model_card(facts(**settings)).text

    ours = text()
    assert "scheduler anneals" in ours and "the final images are scored" in ours and "re-noising follows" in ours
    steps = text(moved=ClippedObjective.description, credited=SumCredit.description, scores_every_step=True)
    assert (
        "every step's clean images are scored" in steps
        and "answers for all of them" in steps
        and "clipped policy gradient" in steps
    )
    ode = text(drawn=Ode.description, anneals=False)
    assert "solves the ODE" in ode and "are drawn by the ODE" in ode and "noise" not in ode.split("## Noise levels")[0]
    assert "are drawn by Flow-GRPO's SDE" in text(drawn=FlowSde.description, anneals=False)


def test_card_facts_are_checked():
    with pytest.raises(ValueError, match="4 steps need as many levels.*levels has 4, levels_unshifted 5"):
        facts(levels_unshifted=[*LEVELS, 0.0])
    with pytest.raises(ValueError, match="'/tmp/after.png' isn't relative"):
        facts(pictures=[("a seven", None, "/tmp/after.png")])


def test_reward_curve_is_a_table_without_matplotlib(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else found(name))
    curve = [(epoch, epoch / 100) for epoch in range(48)]
    text = write_model_card(facts(reward_curve=curve), tmp_path).read_text()
    assert len(re.findall(r"^\| \d+ \| 0\.\d+ \|$|^\| 0 \| 0 \|$", text, re.MULTILINE)) == 10
    assert "| 47 | 0.47 |" in text and not (tmp_path / "images").exists()


def test_base_model_facts(tmp_path):
    pipeline = build_pipeline(0, **SIZES)

    def of(source):
        pipeline.register_to_config(_name_or_path=str(source))
        return base_model_facts(pipeline)

    assert of("")["base_name"] == "StableDiffusion3Pipeline"
    folder = tmp_path / "alicesmith" / "digits-base"
    folder.mkdir(parents=True)
    expected = {"base_model": None, "base_name": "digits-base", "base_license": None}
    assert of(folder).items() >= expected.items()
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\nText\n")
    expected = {**expected, "base_license": "other", "base_license_name": "mine", "base_license_link": None}
    assert of(folder) == {**expected, "base_revision": None, "base_llama": None}
    snapshot = tmp_path / "models--org--sd3-tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text((folder / "README.md").read_text())
    assert of(snapshot)["base_model"] == "org/sd3-tiny"
    assert of(snapshot)["base_license_link"] == "https://huggingface.co/org/sd3-tiny/blob/main/LICENSE"


def test_the_card_s_code_loads_the_revision_that_was_trained_on(tmp_path):
    build_pipeline(0, **SIZES).save_pretrained(tmp_path / "base")
    pipeline = AutoTAFSPipeline.from_pretrained(tmp_path / "base", revision="fp16")
    named = type(pipeline).from_pretrained(pretrained_model_name_or_path=tmp_path / "base")  # as the parent names it
    assert named.base_revision is None
    assert pipeline.base_revision == "fp16" and base_model_facts(pipeline)["base_revision"] is None
    snapshot = tmp_path / "models--org--sd3-tiny" / "snapshots"
    (tmp_path / "models--org--sd3-tiny").mkdir()
    (tmp_path / "base").rename(snapshot)
    pipeline.register_to_config(_name_or_path=str(snapshot))
    code = usage_code(facts(**base_model_facts(pipeline)))
    assert 'from_pretrained("org/sd3-tiny", revision="fp16")' in code
    assert "revision" not in usage_code(facts(**base_model_facts(pipeline)), base="here")
    pipeline.base_revision = None
    assert 'from_pretrained("org/sd3-tiny")' in usage_code(facts(**base_model_facts(pipeline)))


# Over HTTP: one process pushes, another has nothing but diffusers and the repository's name

PUSH = """
from trl_tafs.hub import card
from trl_tafs.hub.push import PushError, prepare_repo, push_folder
import sys
loaded = {"diffusers", "huggingface_hub", "peft", "transformers"} & sys.modules.keys()
import json, os, time
from trl_tafs.hub.push import PushError, prepare_repo, push_folder

results = {"loaded": sorted(loaded), "repo": prepare_repo("digits-lora", private=True)}
results["url"] = push_folder("adapter", "digits-lora").commit_url
push_folder("adapter", "user/digits-lora", revision="epoch-2")

time.sleep = lambda seconds: None  # huggingface_hub waits between its attempts
for name in ("user/torn", "user/broken", "other/digits-lora", "user/digits", "no token"):
    token = "hf_wrong" if name == "user/digits" else None
    if name == "no token":
        del os.environ["HF_TOKEN"]
    try:
        push_folder("adapter", name, token=token)
    except PushError as error:
        results[name] = str(error)
with open("results.json", "w") as file:
    json.dump(results, file)
"""

LOAD = """
import re, sys
import numpy, torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from huggingface_hub import hf_hub_download

pipe = StableDiffusion3Pipeline.from_pretrained("digits-base")
pipe.load_lora_weights("user/digits-lora")
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("user/digits-lora", subfolder="scheduler")
torch.manual_seed(1)
settings = dict(num_inference_steps=4, sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1.0, height=8, width=8)
prompts = ["a handwritten seven", "the digit two"]
images = pipe(prompts, max_sequence_length=8, output_type="pt", **settings).images
numpy.save("loaded.npy", images.numpy())
card = open(hf_hub_download("user/digits-lora", "README.md"), encoding="utf-8").read()
exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1])
assert not any(name.startswith("trl_tafs") for name in sys.modules)

from trl_tafs.policy.adapter_file import WEIGHT_NAME, check_adapter_fits, read_adapter
state_dict, config = read_adapter("user/digits-lora", revision="epoch-2")
assert config.lora_alpha == 16 and config.r == 4, config
check_adapter_fits(state_dict, StableDiffusion3Pipeline.from_pretrained("digits-base").transformer)
for source, weight_name in (("user/nowhere", WEIGHT_NAME), ("user/digits-lora", "ema.safetensors")):
    try:
        read_adapter(source, weight_name=weight_name)
    except FileNotFoundError as error:
        print(error)
"""


def run(code, folder, environment):
    paths = [str(ROOT), str(ROOT / "tests")]
    environment = {
        **os.environ,
        **environment,
        "PYTHONPATH": os.pathsep.join(paths),
        "MPLCONFIGDIR": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def train_and_save(folder):
    """What the trainer does at its end: an adapter, its card, and beside them the policy's own images."""
    build_pipeline(0, **SIZES).save_pretrained(folder / "digits-base")
    pipeline, config = with_lora(lora_alpha=16, base_model_name_or_path=str(folder / "digits-base"))
    pipeline.register_to_config(_name_or_path=str(folder / "digits-base"))
    adapter = save_adapter(pipeline, folder / "adapter", lora_config=config)
    numpy.save(folder / "policy.npy", images(pipeline).numpy())
    torch.manual_seed(0)
    example = pipeline("a handwritten seven", max_sequence_length=MAX_LENGTH, **SAMPLING).images[0]
    example.save(folder / "example.png")
    (adapter / "images").mkdir()
    for name in ("before_0", "after_0"):
        example.save(adapter / "images" / f"{name}.png")
    training = {**SETTINGS, "project_dir": str(folder)}
    write_model_card(facts(training=training, **base_model_facts(pipeline)), adapter)
    (adapter / "optimizer.pt").write_bytes(b"not to be pushed")


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A stub that took an adapter from one process and gave it to another, their folder, what was said."""
    folder = tmp_path_factory.mktemp("home") / "alicesmith" / "job"
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        on_a_private_machine(patch)
        train_and_save(folder)
    with HubStub(tokens={TOKEN: "user"}) as stub:
        stub.failing = {("PUT", "user/torn"): 500, ("POST", "user/broken/commit"): 500}
        run(PUSH, folder, stub.environment(folder / "home", token=TOKEN))
        said = run(LOAD, folder, stub.environment(folder / "empty"))
    return stub, folder, said


def test_the_hub_gives_the_trained_policys_images_bit_for_bit(pushed):
    stub, folder, _ = pushed
    policy, loaded = numpy.load(folder / "policy.npy"), numpy.load(folder / "loaded.npy")
    assert numpy.array_equal(policy, loaded)
    assert (folder / "image.png").read_bytes() == (folder / "example.png").read_bytes()  # the card's own code
    assert not [entry for entry in stub.log if entry[2] == 501]


def test_only_what_is_meant_to_be_published_is(pushed):
    stub, folder, _ = pushed
    pictures = {"images/before_0.png", "images/after_0.png"}
    if importlib.util.find_spec("matplotlib"):
        pictures.add("images/reward_curve.png")
    meant = {WEIGHT_NAME, SCHEDULER_FILE, "README.md", "training_settings.json", *pictures}
    assert set(stub.files("user/digits-lora")) == {".gitattributes", *meant}
    assert stub.verified == set(stub.blobs)
    everything = [*stub.files("user/digits-lora").values(), *stub.received]
    private = [part.encode() for part in (*PRIVATE, str(folder), "pytest-of", str(Path.home()) + "/")]
    assert [part for part in private if any(part in content for content in everything)] == []


def test_failed_pushes_say_why_and_keep_the_folder(pushed):
    stub, folder, _ = pushed
    results = json.loads((folder / "results.json").read_text())
    assert results["loaded"] == []  # by importing trl_tafs.hub and trl_tafs.card
    assert results["repo"] == "user/digits-lora"
    assert results["url"].startswith(f"{stub.url}/user/digits-lora/commit/")
    expected = {
        "user/torn": "500 Internal Server Error.*lfs/user/torn.*the push can be made again",
        "user/broken": "500 Internal Server Error.*/commit/main.*the push can be made again",
        "other/digits-lora": "403.*may not write there",
        "user/digits": "401.*hf auth login.*HF_TOKEN",
        "no token": "run `hf auth login.*HF_TOKEN",
    }
    for name, message in expected.items():
        assert re.search(f"'{name}'.*{message}", results[name]), results[name]
        assert f"the adapter is in {folder / 'adapter'}" in results[name]
    assert (folder / "adapter" / WEIGHT_NAME).is_file()


def test_an_adapter_missing_on_the_hub_is_named(pushed):
    lines = pushed[2].splitlines()[-2:]
    assert "no adapter at 'user/nowhere'" in lines[0] and "ema.safetensors" in lines[1]
