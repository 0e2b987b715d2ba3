"""The trainer pushes over HTTP, and plain diffusers draws what the trained policy draws."""

import os

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from hub_stub import HubStub

from trl_tafs.hub.push import PushError

TOKEN = "hf_" + "trainertoken" * 3
SETTINGS = {"num_epochs": 2, "train_learning_rate": 1e-2, "push_to_hub": True, "run_name": "tiny"}


def latents():
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_what_the_trainer_pushes_is_the_trained_policy(pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with HubStub(tokens={TOKEN: "user"}) as stub:
        stub.connect(monkeypatch, tmp_path / "home", token=TOKEN)
        with pytest.raises(PushError):  # before the first epoch
            tiny.trainer(tiny.load(pipeline_folder), "refused", **SETTINGS, hub_model_id="stranger/tiny-tafs").train()
        trainer = tiny.trainer(tiny.load(pipeline_folder), "run", **SETTINGS, hub_model_id="tiny-tafs")
        trainer.train()
        torch.manual_seed(0)
        rollout = trainer.sd_pipeline.annealed_rollout(["two", "six"], latents=latents())
        policy = trainer.sd_pipeline.decode_latents(rollout.final)

        stub.connect(monkeypatch, tmp_path / "empty")  # as another user
        pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
        pipe.load_lora_weights("user/tiny-tafs")
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("user/tiny-tafs", subfolder="scheduler")
        torch.manual_seed(0)
        call = {"num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 1.0}
        loaded = pipe(["two", "six"], latents=latents(), max_sequence_length=8, output_type="pt", **call).images
    assert not (tmp_path / "refused" / "checkpoints").exists()
    assert torch.equal(policy, loaded)
    files = stub.files("user/tiny-tafs")
    card = files["README.md"].decode()
    assert 'load_lora_weights("user/tiny-tafs")' in card and "sigmas=[1.0, 0.75, 0.5, 0.25]" in card
    assert "widget:" in card and "images/after_0.png" in files and "images/before_0.png" in files
    published = b"".join(files.values())
    for private in (TOKEN, str(tmp_path), str(pipeline_folder.parent), os.path.expanduser("~") + "/"):
        assert private.encode() not in published, private
