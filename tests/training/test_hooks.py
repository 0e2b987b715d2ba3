"""What a subclass overrides by DDPOTrainer's names is what trains; what wouldn't be called is refused."""

import json

import pytest
import tiny
import torch

from trl_tafs import NonFiniteError, TAFSGRPOTrainer
from trl_tafs.training.hooks import REPLACED


def made(kind, pipeline_folder, folder, reward=tiny.brightness, prompts=tiny.prompts, **changes):
    config = tiny.config(folder, **({"num_epochs": 1, "train_adam_weight_decay": 0.0} | changes))
    return kind(config, reward, prompts, tiny.load(pipeline_folder))


def trained(kind, pipeline_folder, folder, **changes):
    """What the weights moved by in an epoch, and the log's values."""
    trainer = made(kind, pipeline_folder, folder, **changes)
    before = [p.detach().clone() for p in trainer.policy.parameters]
    trainer.train()
    moved = [p.detach() - b for p, b in zip(trainer.policy.parameters, before, strict=True)]
    values = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values |= json.loads(line)
    return moved, values


class Opposite(TAFSGRPOTrainer):
    def compute_rewards(self, prompt_image_pairs, is_async=False):
        rewards, metadata = super().compute_rewards(prompt_image_pairs, is_async)
        return [-r for r in rewards], metadata


class Doubled(TAFSGRPOTrainer):
    def loss(self, advantages, clip_range, ratio):
        return 2 * super().loss(advantages, clip_range, ratio)


class Tripled(TAFSGRPOTrainer):
    def compute_loss(self, items, conditioning):
        output = super().compute_loss(items, conditioning)
        return type(output)(3 * output.loss, output.metrics)


@pytest.fixture(scope="module")
def plain(pipeline_folder, tmp_path_factory):
    return trained(TAFSGRPOTrainer, pipeline_folder, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_rewards_of_an_overridden_compute_rewards_train(plain, pipeline_folder, tmp_path, asynchronous):
    moved, values = trained(Opposite, pipeline_folder, tmp_path, async_reward_computation=asynchronous)
    assert values["reward"] == pytest.approx(-plain[1]["reward"], rel=1e-12)
    assert values["rewards/compute_rewards/mean"] == values["reward"] and "rewards/brightness/mean" not in values
    for opposite, expected in zip(moved, plain[0], strict=True):
        torch.testing.assert_close(opposite, -expected, rtol=1e-3, atol=1e-9)  # Adam's first step has a gradient's sign
    assert max(step.abs().max() for step in moved) > 1e-4


def test_an_overridden_loss_is_the_surrogate_that_trains(plain, pipeline_folder, tmp_path):
    for kind, factor in ((Doubled, 2), (Tripled, 3)):
        _, values = trained(kind, pipeline_folder, tmp_path / kind.__name__)
        assert values["grad_norm"] == pytest.approx(factor * plain[1]["grad_norm"], rel=1e-4)
        assert values["loss"] == pytest.approx(factor * plain[1]["loss"], abs=1e-6)
        assert values["approx_kl"] == pytest.approx(plain[1]["approx_kl"], abs=1e-9)


def test_an_overridden_loss_that_repeats_the_formula_trains_as_without_it(plain, pipeline_folder, tmp_path):
    class Same(TAFSGRPOTrainer):
        def loss(self, advantages, clip_range, ratio):
            bound = torch.tensor(clip_range)
            clipped = ratio.clamp(torch.exp(-bound), torch.exp(bound))
            return torch.mean(torch.maximum(-advantages * ratio, -advantages * clipped))

    moved, values = trained(Same, pipeline_folder, tmp_path)
    assert values["grad_norm"] == pytest.approx(plain[1]["grad_norm"], rel=1e-4)


def test_a_loss_for_an_objective_without_a_ratio_is_refused(pipeline_folder, tmp_path):
    with pytest.raises(TypeError, match="Doubled.loss is the formula of the clipped ratio, which objective=.forward"):
        made(Doubled, pipeline_folder, tmp_path, objective="forward")


@pytest.mark.parametrize("name", REPLACED)
def test_a_method_of_ddpo_s_that_nothing_calls_is_refused(name, pipeline_folder, tmp_path):
    kind = type("Mine", (TAFSGRPOTrainer,), {name: lambda self, *args: None})
    with pytest.raises(TypeError, match=rf"Mine.{name} is a method of DDPOTrainer that nothing calls here; \w+"):
        made(kind, pipeline_folder, tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_override_that_fails_is_an_error_of_a_reward(pipeline_folder, tmp_path):
    class Wrong(TAFSGRPOTrainer):
        def compute_rewards(self, prompt_image_pairs, is_async=False):
            return [torch.zeros(3)], [{}]

    with pytest.raises(RuntimeError, match=r"'compute_rewards' returned shape \(3,\) for 2 images"):
        made(Wrong, pipeline_folder, tmp_path).train()


def test_a_credit_rule_that_makes_nan_stops_before_the_update(pipeline_folder, tmp_path, monkeypatch):
    from trl_tafs.method.credit import CREDITS

    monkeypatch.setitem(CREDITS, "broken", lambda normalised: normalised * float("nan"))
    with pytest.raises(NonFiniteError, match="epoch 0: step_credit='broken' made NaN of finite rewards"):
        made(TAFSGRPOTrainer, pipeline_folder, tmp_path, step_credit="broken", train_adv_clip_max=1.0).train()


# DDPO's own mode ------------------------------------------------------------------------------------------------


def test_groups_of_one_have_their_prompt_s_buffer_as_a_baseline(pipeline_folder, tmp_path):
    scores = {"one": 1.0, "two": 5.0}
    noise = iter(range(1000))

    def reward(images, prompts, metadata):
        return [scores[prompt] + 0.01 * (next(noise) % 7) for prompt in prompts]

    settings = {"num_generations": 1, "per_prompt_stat_tracking": True, "per_prompt_stat_tracking_buffer_size": 8}
    settings |= {"per_prompt_stat_tracking_min_count": 8, "step_credit": "terminal", "train_adv_clip_max": 10.0}
    trainer = made(TAFSGRPOTrainer, pipeline_folder, tmp_path, reward, ["one", "two"], num_epochs=2, **settings)
    assert (trainer.plan.group_size, trainer.plan.num_groups) == (1, 16)
    seen, credit = [], type(trainer.algorithm).credit

    def spy(rewards, prompts, epoch):
        table = credit(trainer.algorithm, rewards, prompts, epoch)
        seen.append((prompts.prompts, rewards.values[:, -1, 0, 0], table.advantages[:, -1, 0]))
        return table

    object.__setattr__(trainer.algorithm, "credit", spy)
    trainer.train()
    buffers = {prompt: [] for prompt in scores}
    for prompts, rewards, advantages in seen:
        assert sorted(prompts) == ["one"] * 8 + ["two"] * 8
        for prompt in scores:
            index = [i for i, p in enumerate(prompts) if p == prompt]
            buffers[prompt] = (buffers[prompt] + rewards[index].tolist())[-8:]
            history = torch.tensor(buffers[prompt], dtype=torch.float64)
            expected = (rewards[index] - history.mean()) / (history.std() + 1e-4)
            torch.testing.assert_close(advantages[index], expected.float(), rtol=1e-5, atol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in lines) and not any("frac_reward_zero_std" in line for line in lines)


def test_groups_of_one_without_a_buffer_are_refused_in_a_line(pipeline_folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"num_generations is 1; .* at least 2 .* or 1 with DDPO's statistics"
    ) as caught:
        made(TAFSGRPOTrainer, pipeline_folder, tmp_path, num_generations=1)
    assert "\n" not in str(caught.value)
