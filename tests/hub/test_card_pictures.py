import errno
import json
from dataclasses import replace

import pytest
import tiny
import torch
from PIL import Image

from trl_tafs.hub import publisher
from trl_tafs.output.pictures import save_png, tensor_to_image

PROMPTS = ["one", "two", "three", "four"]


def test_the_card_s_pictures_are_the_base_s_and_the_policy_s(pipeline, tmp_path):
    trainer = tiny.trainer(pipeline, tmp_path, prompt_function=PROMPTS, num_epochs=3, train_learning_rate=3e-2)
    trainer.train()
    prompts = trainer.publisher.card_prompts()
    base, policy_ = (
        replace(trainer.drawer, velocity=velocity).images(
            trainer.draw_spec("annealed", 4), prompts, range(len(prompts))
        )
        for velocity in (trainer.policy.reference, trainer.policy.velocity)
    )
    for name, images in (("before", base), ("after", policy_)):
        for i, image in enumerate(images):
            with Image.open(tmp_path / "adapter" / "images" / f"{name}_{i}.png") as picture:
                assert picture.tobytes() == tensor_to_image(image).tobytes(), name
    assert not torch.equal(base, policy_)


@pytest.mark.parametrize(("kernel", "anneals"), [("annealed", True), ("ode", False), ("flow_sde", False)])
def test_what_is_published_is_sampled_as_it_was_trained(pipeline, tmp_path, kernel, anneals):
    objective = {"objective": "forward"} if kernel == "ode" else {}
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1, sample_kernel=kernel, **objective)
    trainer.train()
    scheduler = json.loads((tmp_path / "adapter" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["stochastic_sampling"] is anneals
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert ("scheduler anneals" in text, "solves the ODE" in text) == (anneals, not anneals)
    prompts, sampler = trainer.publisher.card_prompts(), "annealed" if anneals else "ode"
    drawn = replace(trainer.drawer, velocity=pipeline.velocity).images(
        trainer.draw_spec(sampler, 4), prompts, range(len(prompts))
    )
    shown = Image.open(tmp_path / "adapter" / "images" / "after_0.png").tobytes()
    assert shown == tensor_to_image(drawn[0]).tobytes(), "the card's pictures, too"


def test_the_weights_are_there_whatever_stops_the_pictures(pipeline, tmp_path, monkeypatch):
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1)

    def out_of_memory(*args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(trainer.policy, "reference", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.save_pretrained(tmp_path / "saved")
    assert list((tmp_path / "saved").glob("*.safetensors"))


def test_a_disk_that_fails_at_the_pictures_leaves_a_whole_adapter_elsewhere(pipeline, tmp_path, monkeypatch):
    trainer, full = tiny.trainer(pipeline, tmp_path, num_epochs=1), []

    def save(image, path):
        if tmp_path in path.parents:
            full.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        save_png(image, path)

    monkeypatch.setattr(publisher, "save_png", save)
    with pytest.warns(UserWarning, match="can't be written .*the adapter is in"):
        place = trainer.save_pretrained()
    assert full and tmp_path not in place.parents
    assert list(place.glob("*.safetensors")) and (place / "README.md").exists() and list(place.glob("images/*.png"))
