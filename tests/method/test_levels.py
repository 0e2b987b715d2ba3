import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from trl_tafs.method.levels import (
    SlidingWindow,
    level_to_timestep,
    scheduler_levels,
    shift_levels,
    shift_levels_exponential,
    uniform_levels,
    with_zero,
)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 10])
def test_uniform_levels_divide_the_trajectory_evenly_from_one(num_steps):
    levels = uniform_levels(num_steps)
    assert levels.dtype == torch.float32
    expected = [(num_steps - n) / num_steps for n in range(num_steps)]
    torch.testing.assert_close(levels, torch.tensor(expected), rtol=0, atol=1e-7)
    assert levels[0] == 1.0


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 6, 8, 10, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_static_shift_is_diffusers_bit_for_bit(num_steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=uniform_levels(num_steps).tolist())
    levels = with_zero(shift_levels(uniform_levels(num_steps), shift))
    assert torch.equal(levels, scheduler.sigmas)
    assert torch.equal(level_to_timestep(levels[:-1]), scheduler.timesteps)


@pytest.mark.parametrize("num_steps", [1, 4, 8, 28])
@pytest.mark.parametrize("mu", [0.0, 0.5, 1.15])
def test_exponential_shift_is_diffusers_dynamic_shift_to_one_rounding(num_steps, mu):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=uniform_levels(num_steps).tolist(), mu=mu)
    levels = with_zero(shift_levels_exponential(uniform_levels(num_steps), mu))
    torch.testing.assert_close(levels, scheduler.sigmas, rtol=0, atol=1.2e-7)


def test_exponential_shift_is_the_static_one_with_the_factor_e_to_the_mu():
    levels = uniform_levels(7)
    torch.testing.assert_close(shift_levels_exponential(levels, math.log(3.0)), shift_levels(levels, 3.0))


def test_shift_keeps_pure_noise_and_worked_values():
    # c s / (1 + (c - 1) s) with c = 3: 3/4 -> 2.25 / 2.5 = .9, 1/2 -> 1.5 / 2 = .75, 1/4 -> .75 / 1.5 = .5
    torch.testing.assert_close(shift_levels(uniform_levels(4), 3.0), torch.tensor([1.0, 0.9, 0.75, 0.5]))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10, 14, 28])
@pytest.mark.parametrize("options", [{"shift": 1.0}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_scheduler_levels_are_what_diffusers_sets_by_itself(num_steps, options):
    own, given = (FlowMatchEulerDiscreteScheduler(**options) for _ in range(2))
    extra = {"mu": 0.8} if "use_dynamic_shifting" in options else {}
    own.set_timesteps(num_steps, **extra)
    given.set_timesteps(sigmas=scheduler_levels(num_steps, own.sigma_min).tolist(), **extra)
    torch.testing.assert_close(given.sigmas, own.sigmas, rtol=0, atol=2e-7)


def test_ten_steps_of_the_public_sd3_recipes_end_near_zero():
    levels = with_zero(shift_levels(scheduler_levels(10, 3 * 0.001 / 1.002), 3.0))
    expected = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
    torch.testing.assert_close(levels, torch.tensor(expected), rtol=0, atol=5e-5)
    assert shift_levels(uniform_levels(10), 3.0)[-1] == 0.25


def test_sd3s_own_four_steps_waste_the_last_one_and_ours_do_not():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[-2].item() == pytest.approx(0.0089, abs=5e-5)
    assert shift_levels(uniform_levels(4), 3.0)[-1] == 0.5


@pytest.mark.parametrize(
    "levels", [[1.0, 0.5, 0.5], [0.5, 1.0], [1.0, 0.5, 0.0], [1.0, -0.1], [1.0, float("nan"), 0.5]]
)
def test_levels_that_do_not_fall_are_an_error_that_shows_them(levels):
    with pytest.raises(ValueError, match="fall strictly") as caught:
        with_zero(torch.tensor(levels))
    assert "1.0" in str(caught.value)


@pytest.mark.parametrize("num_steps", [0, -3])
def test_no_steps_are_an_error(num_steps):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}"):
        uniform_levels(num_steps)
    with pytest.raises(ValueError, match="takes at least 1 step"):
        scheduler_levels(num_steps, 0.001)


def test_timestep_is_a_thousand_levels_in_float32():
    timestep = level_to_timestep(torch.tensor([1.0, 0.25]))
    assert timestep.dtype == torch.float32
    assert timestep.tolist() == [1000.0, 250.0]
    assert level_to_timestep(torch.tensor(0.5), 10).item() == 5.0


def test_a_progressive_window_moves_a_step_onwards_and_back_to_the_start():
    window = SlidingWindow(size=4, num_steps=6, interval=25)
    assert [window.at(epoch).start for epoch in (0, 24, 25, 50, 74, 75)] == [0, 0, 1, 2, 2, 0]
    assert all(len(window.at(epoch)) == 4 and window.at(epoch).stop <= 6 for epoch in range(200))


def test_a_random_window_is_drawn_anew_each_move_and_is_the_same_on_every_process():
    windows = [SlidingWindow(size=2, num_steps=5, interval=1, order="random", seed=3) for _ in range(2)]
    places = [[window.at(epoch).start for epoch in range(200)] for window in windows]
    assert places[0] == places[1], "a function of the seed and the epoch alone"
    assert set(places[0]) == {0, 1, 2, 3}
    assert min(places[0].count(start) for start in range(4)) > 25
    assert SlidingWindow(2, 5, 1, "random", seed=4).at(0) is not None
    assert [SlidingWindow(2, 5, 1, "random", seed=4).at(e).start for e in range(200)] != places[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [((5, 4), "window of 5 steps"), ((0, 4), "window of 0 steps"), ((2, 4, 0), "every 0"), ((2, 4, 1, "up"), "'up'")],
)
def test_a_window_that_can_not_be_is_an_error(options, told):
    with pytest.raises(ValueError, match=told):
        SlidingWindow(*options)
