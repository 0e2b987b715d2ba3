"""What a run tries before it trains: two images, drawn and scored, without a trace."""

import pytest
import tiny
import torch

from trl_tafs.pipelines.finite import NonFiniteError


def test_two_images_are_drawn_as_the_run_draws_them_and_each_reward_scores_them(pipeline, tmp_path, caplog):
    caplog.set_level("INFO", "trl_tafs")
    seen, held_out = [], []

    def reward(images, prompts, metadata):
        seen.append(images)
        torch.manual_seed(7)  # a trace that a reward may leave
        return images.mean((1, 2, 3))

    def judge(images, prompts, metadata):
        held_out.append((images, prompts))
        return images.mean((1, 2, 3))

    trainer = tiny.trainer(
        pipeline,
        tmp_path,
        {"bright": reward},
        disable_tqdm=False,
        sample_batch_size=1,
        sample_num_batches_per_epoch=16,
        eval_freq=1,
        eval_prompts=["two"],
        eval_reward_function=judge,
    )
    before = torch.get_rng_state()
    trainer.preflight(0)
    assert torch.equal(torch.get_rng_state(), before) and trainer.stopwatch.seconds == {}
    sampler, batch = trainer.collector.sampler, trainer.prompts.batch(0, 1, 2)
    drawn = [sampler.decode(sampler.roll_out(batch[i : i + 1], 0).rollout.final) for i in range(2)]
    assert len(seen) == len(held_out) == 1 and torch.equal(seen[0], torch.cat(drawn)), "in batches of the run's size"
    assert torch.equal(held_out[0][0], seen[0]) and held_out[0][1] == ["two", "two"]
    values = " and ".join(f"{value:.4g}" for value in seen[0].mean((1, 2, 3)).tolist())
    assert f"two images of 'a handwritten seven' were drawn and scored: bright {values}" in caplog.text


def test_without_it_the_rewards_see_noise(pipeline, tmp_path):
    seen = []

    def reward(images, prompts, metadata):
        seen.append(images)
        return images.mean((1, 2, 3))

    pipeline.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    trainer = tiny.trainer(pipeline, tmp_path, reward, preflight_rollout=False)
    trainer.preflight(0)
    assert seen[0].shape == (2, 3, 8, 8) and seen[0].isfinite().all()


def test_pictures_that_are_nan_stop_the_run_before_it_begins(pipeline, tmp_path):
    called = []
    pipeline.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    trainer = tiny.trainer(pipeline, tmp_path, lambda images, *_: called.append(1) or images.mean((1, 2, 3)))
    with pytest.raises(NonFiniteError, match="the VAE .* decoded finite latents to NaN"):
        trainer.train()
    assert not called and trainer.progress.epoch == 0 and not (tmp_path / "checkpoints").exists()
