"""What looks wrong is said where it is so, and not where it isn't."""

import pytest

from trl_tafs.training.symptoms import WINDOW, Symptoms

RISING = [0.3 + 0.02 * i for i in range(40)]
FLAT = [0.3 + 0.01 * (-1) ** i for i in range(40)]


def told(rewards, distances=None, symptoms=None):
    """[(epoch, what is said)] over a whole curve."""
    symptoms, found = symptoms or Symptoms(), []
    for i in range(len(rewards)):
        curve = list(enumerate(rewards[: i + 1]))
        found += [(i, said) for said in symptoms.epoch(curve, distances[i] if distances else None)]
    return found


def test_a_reward_that_rises_is_no_symptom():
    assert told(RISING, [0.001 * i for i in range(40)]) == []


def test_a_flat_reward_is_said_after_two_windows_and_then_ever_less():
    epochs = [epoch for epoch, said in told(FLAT * 3) if "is flat" in said]
    assert epochs == [2 * WINDOW - 1, 3 * WINDOW - 1, 5 * WINDOW - 1, 9 * WINDOW - 1]


def test_a_falling_reward_is_said_to_fall():
    assert "has fallen" in told(RISING[::-1])[0][1]


def test_drift_is_a_distance_that_grows_while_the_reward_does_not():
    rewards = RISING[:20] + [RISING[19] + 0.001 * (-1) ** i for i in range(20)]
    growing = [0.01 * 1.1**i for i in range(40)]
    assert [epoch for epoch, said in told(rewards, growing) if "drifts" in said] == [39]
    assert not [said for _, said in told(rewards, [0.1] * 40) if "drifts" in said], "it stays where it is"
    assert not [said for _, said in told(RISING, growing) if "drifts" in said], "it gains by it"
    assert told(rewards, [float("nan")] * 40) == []


def row(epoch, value, **more):
    ends = {"image/annealed_4/saturated_pixels/low": 0.02, "image/annealed_4/saturated_pixels/high": 0.1}
    return {"image/annealed_4/saturated_pixels": value} | (ends if epoch == 0 else {}) | more


@pytest.mark.parametrize(("value", "heard"), [(0.05, False), (0.1, False), (0.11, True), (0.4, True), (0.01, True)])
def test_an_image_statistic_that_leaves_the_range_before_training_is_suspected(value, heard):
    found = list(Symptoms().evaluation([row(0, 0.04), row(10, value)], []))
    assert [("suspected reward hacking" in said, "saturated pixels" in said) for said in found] == [
        (True, True)
    ] * heard


def test_a_statistic_without_width_is_not_judged_by_rounding():
    first = {"image/ode_2/saturation": 0.0, "image/ode_2/saturation/low": 0.0, "image/ode_2/saturation/high": 0.0}
    assert list(Symptoms().evaluation([first, {"image/ode_2/saturation": 1e-4}], [])) == []
    assert list(Symptoms().evaluation([first, {"image/ode_2/saturation": 1e-2}], [])) != []


def test_only_images_as_training_draws_them_are_judged():
    other = {"image/ode_8/sharpness": 1.0, "image/ode_8/sharpness/low": 0.9, "image/ode_8/sharpness/high": 1.1}
    rows = [row(0, 0.04) | other, row(10, 0.05) | {"image/ode_8/sharpness": 9.0}]
    assert list(Symptoms(drawn="annealed_4").evaluation(rows, [])) == []
    assert "sharpness 9" in next(Symptoms(drawn="ode_8").evaluation(rows, []))


@pytest.mark.parametrize(("direction", "values", "heard"), [
    (1, [0.5, 0.4, 0.3], True),
    (1, [0.5, 0.6, 0.4], False),
    (1, [0.5, 0.6, 0.7], False),
    (-1, [0.5, 0.6, 0.7], True),
])  # fmt: skip
def test_a_held_out_metric_that_falls_while_the_reward_rises_is_suspected(direction, values, heard):
    rows = [{"epoch": i, "eval/ode_4/judge": value} for i, value in enumerate(values)]
    symptoms = Symptoms(direction={"eval/ode_4/judge": direction})
    assert bool(list(symptoms.evaluation(rows, RISING))) is heard
    assert list(symptoms.evaluation(rows, FLAT)) == [], "what isn't rewarded isn't hacked"
