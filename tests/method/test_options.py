"""Options of the method that have no effect together, and what warns."""

import warnings

import pytest

from trl_tafs.method.options import MethodOptions


def test_matched_by_default_has_a_bounded_pull_and_a_kl():
    options = MethodOptions(objective="matched")
    assert (options.level_weighting, options.beta, options.rows_per_image) == ("adaptive", 0.1, 3)
    assert options.log_prob_reduction == "mean", "whose spread doesn't depend on D"
    assert not options.credits_final_image and not options.from_actions


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "matched", "forward_levels": "random"}, "forward_levels=random has no effect with objective"),
        ({"objective": "matched", "forward_images": "every"}, "forward_images=every has no effect with objective"),
        ({"objective": "matched", "nft_beta": 0.5}, "nft_beta=0.5 has no effect"),
        ({"objective": "matched", "num_perturbations": 2}, "num_perturbations=2 needs objective='clipped'"),
        ({"objective": "matched", "sample_kernel": "clean"}, "sample_kernel='clean' with .* needs objective='clipped'"),
        ({"objective": "matched", "train_level_weighting": "balanced"}, "use one of adaptive, velocity, clean with"),
        ({"objective": "forward", "train_center_ratio": True}, "train_center_ratio=True has no effect"),
        ({"objective": "forward", "train_kl_limit": 1e-4}, "train_kl_limit=0.0001 has no effect"),
        ({"objective": "forward", "delta": 2.0}, "delta=2.0 has no effect"),
        ({"objective": "forward", "train_negative_weight": 0.5}, "train_negative_weight=0.5 has no effect"),
        ({"objective": "forward", "old_policy_beta": 0.5}, "old_policy_beta=0.5 has no effect"),
        ({"objective": "clipped", "train_kl_limit": 0.0}, "train_kl_limit is 0.0; it must be above 0"),
        ({"objective": "clipped", "train_negative_weight": -1.0}, "train_negative_weight is -1.0"),
        ({"objective": "clipped", "delta": 1.0}, "delta is 1.0, a bound of the ratio"),
        (
            {"objective": "clipped", "train_kl_limit": 1e-4, "train_clip_range": 0.1},
            "train_kl_limit=0.0001 takes the place of the clip, and train_clip_range=0.1",
        ),
        ({"objective": "clipped", "train_kl_limit": 1e-4, "delta": 2.0}, "with delta=2.0 has no effect"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_an_error(options, said):
    with pytest.raises(ValueError, match=said):
        MethodOptions(**options)


@pytest.mark.parametrize(("objective", "least"), [("forward", 0.2), ("awm", 0.2), ("matched", 0.1)])
def test_image_objectives_without_a_kl_warn(objective, least):
    with pytest.warns(UserWarning, match=f"beta is 0: objective='{objective}' pushes away .* use beta={least}"):
        MethodOptions(objective=objective, beta=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MethodOptions(objective=objective, beta=0.1)
        MethodOptions(objective="clipped", beta=0.0)
