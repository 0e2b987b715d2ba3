"""The trainer pushes over HTTP, and plain diffusers draws what the trained policy draws."""

import os
import subprocess
import sys

import numpy
import pytest
import tiny
import yaml
from hub_stub import HubStub

TOKEN = "hf_" + "trainertoken" * 3

TRAIN = """
import sys, time
import numpy, tiny, torch
from trl_tafs.hub.push import PushError

settings = dict(num_epochs=2, train_learning_rate=1e-2, push_to_hub=True, hub_model_id="tiny-tafs", run_name="tiny")
try:
    tiny.trainer(tiny.load(sys.argv[1]), "refused", **(settings | {"hub_model_id": "stranger/tiny-tafs"})).train()
except PushError as error:
    print("refused before the first epoch:", error)
trainer = tiny.trainer(tiny.load(sys.argv[1]), "run", **settings)
trainer.train()
for wrong in ({"data_set": "x"}, {"branch": "a", "revision": "b"}, {"dataset_name": "no name"}):
    try:
        trainer.push_to_hub("user/never-made", **wrong)
    except (TypeError, ValueError) as error:
        print("refused:", error)
closing = {"dataset_name": ["user/digits", "mnist"], "model_name": "Tiny", "tags": "handwriting"}  # TRL's closing lines
future = trainer.push_to_hub(**closing, branch="v2", commit_message="Closing", blocking=False)
print("pushed:", future.result().commit_url, trainer.push_to_hub(create_pr=True).pr_num)
from huggingface_hub import constants

constants.ENDPOINT = "http://127.0.0.1:9"  # where nobody listens
time.sleep = lambda seconds: None  # huggingface_hub waits between its attempts
try:
    trainer.push_to_hub()
except PushError as error:
    print("unreachable:", error)
x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
torch.manual_seed(0)
rollout = trainer.sd_pipeline.annealed_rollout(["two", "six"], latents=x)
numpy.save("policy.npy", trainer.sd_pipeline.decode_latents(rollout.final).numpy())
"""

LOAD = """
import sys
import numpy, torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(sys.argv[1])
pipe.load_lora_weights("user/tiny-tafs")
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("user/tiny-tafs", subfolder="scheduler")
x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
torch.manual_seed(0)
call = {"num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 1.0, "output_type": "pt"}
numpy.save("loaded.npy", pipe(["two", "six"], latents=x, max_sequence_length=8, **call).images.numpy())
assert not any(name.startswith("trl_tafs") for name in sys.modules)
"""


def run(code, folder, environment, *arguments):
    paths = os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / "tests")])
    environment = os.environ | environment | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def pushed(pipeline_folder, tmp_path_factory):
    """A run that pushed, its folder, the stub that took it, and what was said."""
    folder = tmp_path_factory.mktemp("pushed")
    with HubStub(tokens={TOKEN: "user"}) as stub:
        said = run(TRAIN, folder, stub.environment(folder / "home", token=TOKEN), pipeline_folder)
        run(LOAD, folder, stub.environment(folder / "empty"), pipeline_folder)
    return folder, stub, said


def test_a_hub_that_cannot_be_reached_at_the_end_costs_nothing(pushed):
    folder, _, said = pushed
    adapter = folder / "run" / "adapter"
    error = said.partition("unreachable: ")[2]
    assert "no push to 'tiny-tafs'" in error and f"the adapter is in {adapter}; push it later with" in error
    assert f"\n  hf upload tiny-tafs {adapter} . --include" in error
    assert (adapter / "pytorch_lora_weights.safetensors").is_file()


def test_what_the_trainer_pushes_is_the_trained_policy(pipeline_folder, pushed):
    tmp_path, stub, said = pushed
    assert "refused before the first epoch" in said and not (tmp_path / "refused" / "checkpoints").exists()
    assert numpy.array_equal(numpy.load(tmp_path / "policy.npy"), numpy.load(tmp_path / "loaded.npy"))
    assert "user/never-made" not in stub.repos and said.count("refused: ") == 3
    assert "unexpected keyword argument 'data_set'" in said and "branch is 'a' and revision 'b'" in said
    assert "dataset_name is 'no name', which is no name on the Hub" in said and "pushed: " in said
    assert stub.messages == ["Upload a TAFS-GRPO adapter", "Closing", "Upload a TAFS-GRPO adapter"]
    for branch in ("v2", "refs/pr/1"):  # a card keeps what it was told
        card = stub.files("user/tiny-tafs", branch)["README.md"].decode()
        metadata = yaml.safe_load(card.split("---\n")[1])
        assert metadata["datasets"] == ["user/digits", "mnist"] and metadata["model_name"] == "Tiny"
        assert {"handwriting", "tafs-grpo"} <= set(metadata["tags"]) and "# Tiny\n" in card
        assert "on prompts of [user/digits](https://huggingface.co/datasets/user/digits), [mnist](" in card
    files = stub.files("user/tiny-tafs")
    card = files["README.md"].decode()
    assert 'load_lora_weights("user/tiny-tafs")' in card and "sigmas=[1.0, 0.75, 0.5, 0.25]" in card
    assert "widget:" in card and "images/after_0.png" in files and "images/before_0.png" in files
    published = b"".join(files.values())
    for private in (TOKEN, str(tmp_path), str(pipeline_folder.parent), os.path.expanduser("~") + "/"):
        assert private.encode() not in published, private
