"""Asynchronous scoring: a step's reward runs while the next step is sampled, and changes nothing but the time."""

import itertools
import threading
import time

import pytest
import tiny
import torch

from trl_tafs.training.logs import Stopwatch


def parts_of(pipeline, folder, reward, threads, **changes):
    trainer = tiny.trainer(
        pipeline, folder, reward=reward, async_reward_computation=threads > 0, max_workers=max(threads, 1), **changes
    )
    batches = trainer.collector.local_batches(trainer.prompts.batch(0, 2, 8))
    return trainer, batches


class Trace:
    """Numbers the sampler's evaluations; lets a reward wait for one, and one wait for an event."""

    def __init__(self, trainer, before=None):
        self.count, self.condition, self.late = 0, threading.Condition(), []
        velocity = trainer.policy.velocity

        def counted(x, level, conditioning):
            with self.condition:
                self.count += 1
                self.condition.notify_all()
            event = (before or {}).get(self.count)
            if event is not None and not event.wait(60):
                self.late.append(self.count)
            return velocity(x, level, conditioning)

        trainer.policy.velocity = counted

    def wait_for(self, count):
        with self.condition:
            return self.condition.wait_for(lambda: self.count >= count, timeout=60)


def test_a_steps_reward_runs_while_the_next_step_is_sampled(pipeline, tmp_path):
    numbers, first_begun = itertools.count(), threading.Event()

    def reward(images, prompts, metadata):
        batch, step = divmod(next(numbers), 3)  # one thread: in the order of 2 batches, 3 scored steps of 4 each
        first_begun.set()
        evaluations = 4 * batch + step + 2  # that led to these images
        return [float(step == 2 or trace.wait_for(evaluations + 1))] * len(prompts)

    trainer, batches = parts_of(pipeline, tmp_path, reward, threads=1)
    trace = Trace(trainer, before={4: first_begun})
    parts, fault = trainer.collector.sampler.sample(batches, 0)
    assert fault is None and trace.count == 8
    assert all(part.scores.min() == 1.0 for part in parts), "a reward ended before the next step began"
    assert not trace.late, "the first reward waited for the end of the rollout"


@pytest.mark.parametrize("changes", [{}, {"sample_kernel": "clean", "num_perturbations": 2}], ids=["annealed", "clean"])
def test_asynchronous_rewards_are_the_synchronous_ones(pipeline_folder, tmp_path, changes):
    def reward(images, prompts, metadata):
        return images.flatten(1).sum(1) * torch.arange(1, len(images) + 1), {"rows": len(prompts)}

    results = []
    for threads in (0, 1, 3):
        trainer, batches = parts_of(tiny.load(pipeline_folder), tmp_path / str(threads), reward, threads, **changes)
        results.append(trainer.collector.sampler.sample(batches, 0)[0])
    for parts in results[1:]:
        for part, expected in zip(parts, results[0], strict=True):
            assert torch.equal(part.scores, expected.scores) and part.metadata == expected.metadata
            assert torch.equal(part.rollout.final, expected.rollout.final)
            assert part.scores.shape[1] == 3 and part.scores.unique().numel() > 8


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"sample_kernel": "clean", "num_perturbations": 2}], ids=["annealed", "clean"])
def test_the_hooks_images_are_those_that_were_scored(pipeline, tmp_path, threads, changes):
    decoded = []
    changes = changes | {"hook": lambda *args: None}
    trainer, batches = parts_of(pipeline, tmp_path, tiny.brightness, threads, **changes)
    decode = trainer.collector.sampler.decode
    trainer.collector.sampler.decode = lambda latents, *more: decoded.append(len(latents)) or decode(latents)
    parts, _ = trainer.collector.sampler.sample(batches, 0)
    scored = [count for part in parts for count in [len(part.prompts) * part.scores.shape[2]] * part.scores.shape[1]]
    assert decoded == scored, "nothing is decoded twice"
    for part in parts:
        assert torch.equal(part.images, decode(part.rollout.final))
    again, _ = trainer.collector.sampler.sample(batches, 0, [part.payload() for part in parts])
    assert all(torch.equal(a.images, b.images) for a, b in zip(again, parts, strict=True)), "restored, with scores"


def test_a_result_that_is_not_scored_is_decoded_for_the_hook(pipeline, tmp_path):
    trainer, batches = parts_of(pipeline, tmp_path, tiny.brightness, 0, hook=lambda *args: None)
    object.__setattr__(trainer.algorithm, "scored_steps_at", lambda epoch: range(1, 3))
    parts, _ = trainer.collector.sampler.sample(batches, 0)
    assert all(torch.equal(part.images, trainer.collector.sampler.decode(part.rollout.final)) for part in parts)


@pytest.mark.parametrize("threads", [0, 1])
def test_scored_latents_are_freed_as_soon_as_their_scores_are_there(pipeline, tmp_path, threads):
    trainer, batches = parts_of(pipeline, tmp_path, tiny.brightness, threads)
    roll_out, alive, drawn = trainer.collector.sampler.roll_out, [], []

    def watched(*args):
        alive.append([part.rollout.scored.untyped_storage().nbytes() > 0 for part in drawn])
        drawn.append(roll_out(*args))
        return drawn[-1]

    trainer.collector.sampler.roll_out = watched
    parts, fault = trainer.collector.sampler.sample(batches, 0)
    assert fault is None and len(batches) > 1
    if not threads:
        assert not any(any(before) for before in alive)
    assert not any(part.rollout.scored.untyped_storage().nbytes() for part in parts)


def test_a_fault_in_a_thread_is_the_batchs(pipeline, tmp_path):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("gone")
        return [1.0] * len(prompts)

    trainer, batches = parts_of(pipeline, tmp_path, reward, threads=1, reward_max_retries=0)
    parts, fault = trainer.collector.sampler.sample(batches, 0)
    assert "gone" in str(fault) and parts[0].scores is not None and parts[1].scores is None
    kept = [part.payload() for part in parts]
    parts, fault = trainer.collector.sampler.sample(batches, 0, kept)
    assert fault is None and all(part.scores.min() == 1.0 for part in parts)


def test_the_stopwatch_counts_every_second_once(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0])  # outer, inner, inner ends, second inner, ends, outer ends
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch("rollout"):
        with watch("decode"):
            pass
        with watch("decode"):
            pass
    monkeypatch.undo()
    assert watch.pop() == {"time/rollout": 7.5, "time/decode": 2.5}


def test_what_sampling_does_not_hide_is_told_as_the_rewards_time(pipeline, tmp_path):
    sampled = threading.Event()

    def reward(images, prompts, metadata):
        sampled.wait(60)  # the rewards begin to count when there is nothing to sample any more
        time.sleep(0.05)
        return [0.0] * len(prompts)

    class Watch(Stopwatch):
        def __call__(self, phase):
            if phase == "reward":
                sampled.set()
            return super().__call__(phase)

    trainer, batches = parts_of(pipeline, tmp_path, reward, threads=1)
    trainer.collector.sampler.stopwatch = watch = Watch()
    trainer.collector.sampler.sample(batches, 0)
    told = watch.pop()["time/reward"]
    assert told > 0.05, "all rewards came when nothing was left to hide them"


def test_threads_are_the_default_where_every_reward_may_run_in_them(pipeline_folder, tmp_path):
    def threads_of(index, reward, **changes):
        return tiny.trainer(
            tiny.load(pipeline_folder), tmp_path / str(index), reward=reward, **changes
        ).collector.sampler

    def safe(images, prompts, metadata):
        seen.append(threading.current_thread() is threading.main_thread())
        return images.mean((1, 2, 3))

    safe.runs_in_threads, seen = True, []
    unsafe = lambda images, prompts, metadata: images.mean((1, 2, 3))  # noqa: E731
    assert threads_of(0, safe).threaded
    assert not threads_of(1, {"safe": safe, "unsafe": unsafe}).threaded
    assert not threads_of(2, safe, async_reward_computation=False).threaded
    assert not threads_of(3, safe, model_cpu_offload=True).threaded
    assert threads_of(4, unsafe, async_reward_computation=True).threaded
    trainer = tiny.trainer(
        tiny.load(pipeline_folder), tmp_path / "run", reward=safe, num_epochs=1, preflight_rollout=False
    )
    trainer.train()
    assert len(seen) > 2 and not any(seen[1:]), "in threads alone, but for the check before training"


def test_rewards_of_servers_run_in_threads():
    from trl_tafs.rewards.jpeg import jpeg_compressibility
    from trl_tafs.rewards.remote import RemoteReward
    from trl_tafs.rewards.unified_reward import UnifiedReward

    assert RemoteReward.runs_in_threads and UnifiedReward.runs_in_threads and jpeg_compressibility.runs_in_threads
