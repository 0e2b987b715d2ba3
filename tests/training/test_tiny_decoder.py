"""A tiny decoder for images that only rewards see."""

import pytest
import tiny
import torch
from diffusers import AutoencoderTiny
from families import FAMILIES, ours, stock

from trl_tafs.pipelines.tiny_decoder import TinyDecoder
from trl_tafs.training.decoding import correlations


def tiny_vae(pipeline, folder, factor=None, channels=None, seed=0):
    """An AutoencoderTiny with random weights that fits a pipeline's latents, saved."""
    blocks = {1: 1, 2: 2, 4: 3, 8: 4}[factor or pipeline.vae_scale_factor]
    torch.manual_seed(seed)
    model = AutoencoderTiny(
        latent_channels=channels or pipeline.vae.config.latent_channels,
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(8,) * blocks,
        num_encoder_blocks=(1,) * blocks,
        num_decoder_blocks=(1,) * blocks,
    )
    model.save_pretrained(folder)
    return model


def sampled(trainer):
    sampler = trainer.collector.sampler
    batches = trainer.collector.local_batches(
        trainer.prompts.batch(0, trainer.plan.num_groups, trainer.plan.group_size)
    )
    return sampler.sample(batches, 0)


@pytest.mark.parametrize("threads", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize("steps", ["intermediate", "all"])
def test_rewards_see_what_it_decodes_and_hooks_see_the_vae_s(pipeline, tmp_path, steps, threads):
    model, seen = tiny_vae(pipeline, tmp_path / "tiny"), []

    def keep(images, prompts, metadata):
        seen.append(images)
        return images.mean((1, 2, 3))

    options = {"tiny_decoder": str(tmp_path / "tiny"), "tiny_decoder_steps": steps, "hook": lambda *args: None}
    options |= {"async_reward_computation": bool(threads), "max_workers": max(threads, 1)}
    trainer = tiny.trainer(pipeline, tmp_path / "run", keep, **options)
    latents, score = [], trainer.collector.sampler.score
    trainer.collector.sampler.score = lambda p, x, *more: latents.append(x.flatten(0, 1)) or score(p, x, *more)
    trainer.collector.sampler.decoder.compared = True
    parts, fault = sampled(trainer)
    assert fault is None and len(seen) == len(latents) == 3 * len(parts)
    for k, (images, x) in enumerate(zip(seen, latents, strict=True)):
        by_tiny = pipeline.pixels(model.decode(x, return_dict=False)[0].detach())
        by_vae = pipeline.decode_latents(x)
        is_tiny = steps == "all" or k % 3 < 2
        torch.testing.assert_close(images, by_tiny if is_tiny else by_vae, atol=1e-5, rtol=0)
        assert not torch.allclose(by_tiny, by_vae, atol=0.01)
    for part in parts:
        assert torch.equal(part.images, pipeline.decode_latents(part.rollout.final)), "a hook sees the VAE's"


def test_its_rewards_are_compared_with_the_vae_s_once_and_a_poor_one_is_named(pipeline, tmp_path, capsys):
    tiny_vae(pipeline, tmp_path / "tiny")
    options = {"tiny_decoder": str(tmp_path / "tiny"), "num_epochs": 2}
    trainer = tiny.trainer(pipeline, tmp_path / "run", **options)
    with pytest.warns(UserWarning, match="correlate by: brightness .*Below 0.9 the tiny decoder teaches something"):
        trainer.train()
    assert capsys.readouterr().out.count("by the tiny decoder and by the VAE correlate by") == 1


def test_a_reward_that_raises_in_the_comparison_costs_nothing(pipeline, tmp_path):
    tiny_vae(pipeline, tmp_path / "tiny")
    calls = []

    def once(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) == 2:  # the first is the preflight's
            raise RuntimeError("busy")
        return images.mean((1, 2, 3))

    options = {"tiny_decoder": str(tmp_path / "tiny"), "num_epochs": 1, "reward_max_retries": 0}
    trainer = tiny.trainer(pipeline, tmp_path / "run", once, **options)
    with pytest.warns(UserWarning, match="wasn't compared with the VAE: .*busy"):
        trainer.train()
    assert trainer.progress.epoch == 1


def test_correlations_leave_out_what_has_no_score():
    nan = float("nan")
    a = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 1.0], [3.0, 3.0, 1.0], [nan, 9.0, 1.0]])
    b = torch.tensor([[2.0, 3.0, 1.0], [4.0, 2.0, 2.0], [6.0, 1.0, 3.0], [5.0, nan, 4.0]])
    first, second, third = correlations(a, b)
    assert first == pytest.approx(1.0) and second == pytest.approx(-1.0) and third != third


@pytest.mark.parametrize(
    ("made", "options", "told"),
    [
        ({"channels": 5}, {}, "decodes 5 channels .* the latents of TAFSStableDiffusion3Pipeline have"),
        ({"factor": 4}, {}, "at 1 / 4 of the image's size; the latents"),
        (None, {}, "can't be loaded as an AutoencoderTiny"),
        ({}, {"step_credit": "terminal", "objective": "forward"}, "has no effect: only the last step is scored"),
    ],
    ids=["channels", "factor", "missing", "no effect"],
)
def test_one_that_does_not_fit_is_refused(pipeline, tmp_path, made, options, told):
    if made is not None:
        tiny_vae(pipeline, tmp_path / "tiny", **made)
    with pytest.raises(ValueError, match=told):
        tiny.trainer(pipeline, tmp_path / "run", tiny_decoder=str(tmp_path / "tiny"), **options)


def test_steps_without_a_decoder_are_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="tiny_decoder_steps='all' has no effect without tiny_decoder"):
        tiny.config(tmp_path, tiny_decoder_steps="all")


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_s_latents_are_decoded_or_refused(name, tmp_path):
    pipe = ours(stock(name), name)
    plain = type(pipe.vae).__name__ == "AutoencoderKL"
    model = tiny_vae(pipe, tmp_path, channels=pipe.vae.config.latent_channels if plain else 4)
    if not plain:
        with pytest.raises(ValueError, match=f"can't stand in for the {type(pipe.vae).__name__} of"):
            TinyDecoder.load(pipe, str(tmp_path), torch.device("cpu"))
        return
    decoder = TinyDecoder.load(pipe, str(tmp_path), torch.device("cpu"))
    size = 4 * pipe.size_multiple
    latents = torch.randn(2, *pipe.latent_shape(size, size))
    images = decoder.decode_in_batches(latents, 1)
    assert images.shape == (2, 3, size, size) and 0 <= images.min() <= images.max() <= 1
    config = pipe.vae.config
    scaled = (pipe.vae_latents(latents) - (config.get("shift_factor") or 0)) * config.scaling_factor
    expected = pipe.pixels(model.decode(scaled, return_dict=False)[0].detach())
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
