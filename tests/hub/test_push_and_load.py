"""One process pushes, another has diffusers and the name of the repository alone: the same images, bit for bit."""

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
from diffusers import FlowMatchEulerDiscreteScheduler
from digits_components import MAX_LENGTH, build_pipeline
from hub_stub import HubStub
from peft import LoraConfig
from tiny import ROOT

from trl_tafs.hub.card import write_model_card
from trl_tafs.hub.facts import CardFacts, base_model_facts
from trl_tafs.policy.adapter_file import (
    SCHEDULER_FILE,
    WEIGHT_NAME,
    save_adapter,
)

SIZES = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "text_width": 16}


LAYERS = ["attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"]


LEVELS = [1.0, 0.75, 0.5, 0.25]


SAMPLING = {"num_inference_steps": 4, "sigmas": LEVELS, "guidance_scale": 1.0, "height": 8, "width": 8}


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
