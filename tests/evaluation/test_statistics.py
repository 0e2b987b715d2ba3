import math

import numpy as np
import pytest
import torch

from trl_tafs.evaluation.statistics import (
    bootstrap,
    colour_entropy,
    diversity,
    paired_difference,
    pearson,
    prompt_means,
    saturation,
    sharpness,
    thumbnails,
)


def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        estimate = bootstrap(generator.normal(2.0, 1.0, 40), resamples=400, seed=seed)
        hits += estimate.low <= 2.0 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.98
    assert estimate.count == 40 and estimate.low < estimate.mean < estimate.high


def test_its_width_is_that_of_the_standard_error():
    data = np.random.default_rng(1).normal(0, 1, 400)
    estimate = bootstrap(data)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * data.std() / 20, rel=0.1)
    assert bootstrap(data) == estimate
    one, none = bootstrap([3.0]), bootstrap([])
    assert one.mean == 3.0 and math.isnan(one.low) and math.isnan(none.mean) and none.count == 0


def test_prompts_not_images_are_the_unit_and_missing_scores_are_left_out():
    means = prompt_means([1.0, 3.0, None, 5.0, float("nan"), None], [0, 0, 1, 1, 2, 2])
    assert means == {0: 2.0, 1: 5.0}


def test_pairs_cancel_what_is_the_prompts_own():
    hard = np.random.default_rng(2).normal(0, 10, 50)
    first = dict(enumerate(hard))
    second = {i: v + 0.5 + 0.01 * (i % 3) for i, v in first.items()} | {99: 1e6}
    difference = paired_difference(first, second)
    assert difference.count == 50 and difference.mean == pytest.approx(0.51, abs=0.01)
    assert 0.5 <= difference.low < difference.high <= 0.52
    apart = bootstrap(list(second.values())[:50])
    assert apart.high - apart.low > 100 * (difference.high - difference.low)


def test_pearson():
    x = np.arange(10.0)
    assert pearson(x, 2 * x + 1) == pytest.approx(1) and pearson(x, -x) == pytest.approx(-1)
    assert math.isnan(pearson(x, 0 * x)) and math.isnan(pearson([1.0], [2.0]))
    assert pearson([1, 2, math.nan, 4], [1, 2, 50, 4]) == pytest.approx(1)


def test_statistics_of_images_at_their_limits():
    gray, red = torch.full((1, 3, 32, 32), 0.5), torch.zeros(1, 3, 32, 32)
    red[:, 0] = 1.0
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert saturation(torch.cat([gray, red])).tolist() == [0.0, 1.0]
    assert sharpness(gray).item() == 0.0
    blurred = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
    assert sharpness(noise) > 5 * sharpness(blurred)
    assert colour_entropy(torch.cat([gray, red])).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert 8.5 < colour_entropy(noise).item() <= 9.0
    half = torch.cat([gray[..., :16], red[..., :16]], dim=-1)
    assert colour_entropy(half).item() == pytest.approx(1.0)


def test_diversity_is_the_mean_distance_within_a_prompt():
    black, white = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    assert thumbnails(white).shape == (1, 3, 16, 16) and thumbnails(white).dtype == torch.uint8
    assert diversity(thumbnails(torch.cat([black, white]))) == pytest.approx(1.0)
    assert diversity(thumbnails(torch.cat([black, black, white]))) == pytest.approx(2 / 3)
    assert diversity(thumbnails(torch.cat([white, white]))) == 0.0 and math.isnan(diversity(thumbnails(white)))
