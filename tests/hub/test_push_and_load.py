"""One process pushes, another has diffusers and the name of the repository alone: the same images, bit for bit."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from digits_components import MAX_LENGTH, build_pipeline
from hub_stub import HubStub
from published import PRIVATE, SAMPLING, SETTINGS, SIZES, TOKEN, facts, images, on_a_private_machine, with_lora
from tiny import ROOT

from trl_tafs.hub.card import write_model_card
from trl_tafs.hub.facts import base_model_facts
from trl_tafs.hub.push import PushError, prepare_repo, push_folder
from trl_tafs.policy.adapter_file import (
    SCHEDULER_FILE,
    WEIGHT_NAME,
    save_adapter,
)

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


def load(folder, environment):
    """LOAD in a process of its own, which has diffusers alone; what it printed."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | environment | {"PYTHONPATH": paths, "MPLCONFIGDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def push_all(patch):
    """Push `adapter` in all ways that work and that don't; what came of each."""
    results = {"repo": prepare_repo("digits-lora", private=True)}
    results["url"] = push_folder("adapter", "digits-lora").commit_url
    push_folder("adapter", "user/digits-lora", revision="epoch-2")
    patch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits between its attempts
    for name in ("user/torn", "user/broken", "other/digits-lora", "user/digits", "no token"):
        token = "hf_wrong" if name == "user/digits" else None
        if name == "no token":
            patch.delenv("HF_TOKEN")
        with pytest.raises(PushError) as caught:
            push_folder("adapter", name, token=token)
        results[name] = str(caught.value)
    return results


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
    """A stub that took an adapter from here and gave it to another process, the folder, and what both said."""
    folder = tmp_path_factory.mktemp("home") / "alicesmith" / "job"
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        on_a_private_machine(patch)
        train_and_save(folder)
    with HubStub(tokens={TOKEN: "user"}) as stub:
        stub.failing = {("PUT", "user/torn"): 500, ("POST", "user/broken/commit"): 500}
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            stub.connect(patch, folder / "home", token=TOKEN)
            results = push_all(patch)
        stub.failing = {}
        (command,) = re.findall(r"^  (hf .*)$", results["user/broken"], re.M)
        hf = [str(Path(sys.executable).parent / "hf"), *shlex.split(command)[1:]]
        environment = os.environ | stub.environment(folder / "home", token=TOKEN)
        subprocess.run(hf, env=environment, check=True, timeout=900)
        said = load(folder, stub.environment(folder / "empty"))
    return stub, folder, results, said


def test_the_hub_gives_the_trained_policys_images_bit_for_bit(pushed):
    stub, folder, *_ = pushed
    policy, loaded = numpy.load(folder / "policy.npy"), numpy.load(folder / "loaded.npy")
    assert numpy.array_equal(policy, loaded)
    assert (folder / "image.png").read_bytes() == (folder / "example.png").read_bytes()  # the card's own code
    assert not [entry for entry in stub.log if entry[2] == 501]


def test_only_what_is_meant_to_be_published_is(pushed):
    stub, folder, *_ = pushed
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
    stub, folder, results, _ = pushed
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


def test_the_command_that_a_failed_push_names_pushes(pushed):
    stub = pushed[0]
    assert stub.files("user/broken") == stub.files("user/digits-lora")


def test_an_adapter_missing_on_the_hub_is_named(pushed):
    lines = pushed[3].splitlines()[-2:]
    assert "no adapter at 'user/nowhere'" in lines[0] and "ema.safetensors" in lines[1]
