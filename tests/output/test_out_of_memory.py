"""A micro-batch that a GPU has no room for: halved once, said, the same result."""

import tiny
import torch
from pytest import mark, raises, warns

from trl_tafs.output.out_of_memory import MicroBatch
from trl_tafs.rewards.model import ModelReward


def limited(limit, sizes):
    """Work that has room for so many images."""

    def work(size):
        sizes.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size

    return work


def test_it_is_halved_once_for_good_and_says_so():
    batch, sizes = MicroBatch(6, "decoding", "decode_batch_size"), []
    with warns(UserWarning, match="no room for decoding 6 images.*decode_batch_size=3"):
        assert batch(limited(3, sizes)) == 3
    assert batch(limited(3, sizes)) == 3 and sizes == [6, 3, 3]
    with raises(torch.OutOfMemoryError):
        batch(limited(2, sizes))
    with raises(torch.OutOfMemoryError):
        MicroBatch(1, "decoding", "decode_batch_size")(limited(0, sizes))


def test_other_errors_are_not_touched():
    def work(size):
        raise RuntimeError("no memory of that kind")

    batch = MicroBatch(4, "decoding", "decode_batch_size")
    with raises(RuntimeError, match="of that kind"):
        batch(work)
    assert batch.size == 4


class Judge(ModelReward):
    """Brightness, for as many images as there is room for."""

    def __init__(self, limit):
        super().__init__(device="cpu", batch_size=4)
        self.limit, self.sizes = limit, []

    def score(self, images, prompts, metadata):
        self.sizes.append(len(images))
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images.mean((1, 2, 3))


def test_a_reward_scores_the_same_in_halves():
    images = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    given = images, ["a"] * 7, [{}] * 7
    small = Judge(2)
    with warns(UserWarning, match="scoring .Judge. 4 images.*its batch_size=2"):
        assert torch.equal(small(*given), Judge(4)(*given))
    assert small.sizes == [4, 2, 2, 2, 1]


@mark.parametrize("evaluated", [False, True])
def test_a_run_goes_on_where_the_vae_had_no_room(pipeline, tmp_path, monkeypatch, evaluated):
    decode, sizes = type(pipeline).decode_latents, []

    def fails_first(self, latents):
        sizes.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, latents)

    held_out = {"eval_prompts": ["one", "two", "three", "four"], "eval_freq": 1} if evaluated else {}
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1, decode_batch_size=4, **held_out)
    latents = torch.zeros(4, *trainer.algorithm.latent_shape)
    expected = trainer.collector.sampler.decode(latents)
    monkeypatch.setattr(type(pipeline), "decode_latents", fails_first)
    with warns(UserWarning, match="no room for decoding 4 images at once; from now on 2"):
        if evaluated:
            trainer.evaluate(0)
        else:
            assert torch.allclose(trainer.collector.sampler.decode(latents), expected, atol=1e-6)
            trainer.train()
    assert evaluated or trainer.collector.sampler.decoder.batch.size == 2
    assert {1, 2, 4} >= set(sizes) >= {2, 4}
