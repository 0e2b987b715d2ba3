"""The trainer pushes over HTTP, and plain diffusers draws what the trained policy draws."""

import os

import pytest
import tiny
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from hub_stub import HubStub

from trl_tafs.hub.push import PushError

TOKEN = "hf_" + "trainertoken" * 3
SETTINGS = {"num_epochs": 2, "train_learning_rate": 1e-2, "push_to_hub": True, "run_name": "tiny"}
WRONG = [
    ({"data_set": "x"}, "unexpected keyword argument 'data_set'"),
    ({"branch": "a", "revision": "b"}, "branch is 'a' and revision 'b'"),
    ({"dataset_name": "no name"}, "dataset_name is 'no name', which is no name on the Hub"),
]


def latents():
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def trained(pipeline_folder):
    """A trainer that has trained and pushed, after one that was refused before its first epoch."""
    with pytest.raises(PushError):
        tiny.trainer(tiny.load(pipeline_folder), "refused", **SETTINGS, hub_model_id="stranger/tiny-tafs").train()
    trainer = tiny.trainer(tiny.load(pipeline_folder), "run", **SETTINGS, hub_model_id="tiny-tafs")
    trainer.train()
    return trainer


def loaded(pipeline_folder):
    """The images of plain diffusers with what is on the Hub."""
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights("user/tiny-tafs")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("user/tiny-tafs", subfolder="scheduler")
    torch.manual_seed(0)
    call = {"num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 1.0, "output_type": "pt"}
    return pipe(["two", "six"], latents=latents(), max_sequence_length=8, **call).images


def test_what_the_trainer_pushes_is_the_trained_policy(pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with HubStub(tokens={TOKEN: "user"}) as stub:
        stub.connect(monkeypatch, tmp_path / "home", token=TOKEN)
        trainer = trained(pipeline_folder)
        for wrong, told in WRONG:
            with pytest.raises((TypeError, ValueError), match=told):
                trainer.push_to_hub("user/never-made", **wrong)
        closing = {"dataset_name": ["user/digits", "mnist"], "model_name": "Tiny", "tags": "handwriting"}  # TRL's
        trainer.push_to_hub(**closing, branch="v2", commit_message="Closing", blocking=False).result()
        trainer.push_to_hub(create_pr=True)
        torch.manual_seed(0)
        rollout = trainer.sd_pipeline.annealed_rollout(["two", "six"], latents=latents())
        stub.connect(monkeypatch, tmp_path / "empty")  # as somebody else
        assert torch.equal(trainer.sd_pipeline.decode_latents(rollout.final), loaded(pipeline_folder))
    assert not (tmp_path / "refused" / "checkpoints").exists()
    assert "user/never-made" not in stub.repos
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


def test_a_hub_that_cannot_be_reached_at_the_end_costs_nothing(pipeline_folder, tmp_path, monkeypatch):
    with HubStub(tokens={TOKEN: "user"}) as stub:
        stub.connect(monkeypatch, tmp_path / "home", token=TOKEN)
        trainer = tiny.trainer(tiny.load(pipeline_folder), tmp_path / "run", push_to_hub=True, hub_model_id="tiny-tafs")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits between its attempts
    adapter = tmp_path / "run" / "adapter"
    with pytest.raises(PushError) as caught:  # nobody listens there any more
        trainer.push_to_hub()
    error = str(caught.value)
    assert "no push to 'tiny-tafs'" in error and f"the adapter is in {adapter}; push it later with" in error
    assert f"\n  hf upload tiny-tafs {adapter} . --include" in error
    assert (adapter / "pytorch_lora_weights.safetensors").is_file()
