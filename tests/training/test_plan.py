import pytest
import tiny

from trl_tafs.training.plan import plan_epoch, resolve_group_size


@pytest.mark.parametrize(
    ("total", "expected"), [(96, 48), (48, 48), (480, 48), (64, 32), (100, 25), (36, 36), (49, 7), (7, 7), (2, 2)]
)
def test_none_is_the_papers_48_or_the_largest_divisor_below(total, expected):
    assert resolve_group_size(None, total) == expected


@pytest.mark.parametrize("total", [53, 97, 1])
def test_none_without_a_divisor_is_an_error(total):
    with pytest.raises(ValueError, match=f"epoch of {total} images has no group size from 2 to 48"):
        resolve_group_size(None, total)


@pytest.mark.parametrize(("size", "total"), [(36, 96), (48, 64), (5, 96), (100, 16), (3, 97)])
def test_a_size_that_does_not_divide_is_an_error_whose_remedies_work(size, total):
    with pytest.raises(ValueError) as caught:
        resolve_group_size(size, total)
    message = str(caught.value)
    assert f"{total} images" in message
    assert f"groups of {size}" in message
    remedies = [int(part) for part in message.rpartition("num_generations=")[2].split(" or ")]
    assert remedies
    for remedy in remedies:
        assert resolve_group_size(remedy, total) == remedy


def test_the_remedies_are_the_nearest():
    with pytest.raises(ValueError, match="use num_generations=24 or 32|use num_generations=32 or 48"):
        resolve_group_size(36, 96)


def test_an_epoch_of_one_image_says_what_to_change():
    with pytest.raises(ValueError, match="sample_batch_size|sample_num_batches_per_epoch") as caught:
        resolve_group_size(2, 1)
    assert not str(caught.value).endswith("num_generations=")


@pytest.mark.parametrize("size", [1, 0, -4])
def test_a_group_of_one_is_an_error(size):
    with pytest.raises(ValueError, match=f"num_generations is {size}; .* at least 2"):
        resolve_group_size(size, 96)


def test_the_plan_by_hand(tmp_path):
    # 2 batches of 8 a process, 2 processes, groups of 8; minibatches of 4 images, 2 of them an optimizer step;
    # 3 trained steps: 4 images x 3 steps = 12 rows in micro-batches of 4 rows, twice
    config = tiny.config(tmp_path, train_batch_size=4, train_gradient_accumulation_steps=2)
    plan = plan_epoch(config, 2)
    assert (plan.local_images, plan.total_images, plan.group_size, plan.num_groups) == (16, 32, 8, 4)
    assert (plan.images_per_update, plan.updates_per_inner_epoch, plan.micro_batches_per_update) == (8, 2, 6)


@pytest.mark.parametrize("fraction", [0.3, 0.7, 1.0])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, None), (4, 2), (2, 1), (16, None), (1, 16)])
def test_every_row_is_trained_once_an_inner_epoch(tmp_path, batch, accumulation, fraction):
    config = tiny.config(
        tmp_path,
        train_batch_size=batch,
        train_gradient_accumulation_steps=accumulation,
        train_timestep_fraction=fraction,
    )
    plan = plan_epoch(config, 1)
    rows = plan.updates_per_inner_epoch * plan.micro_batches_per_update * batch
    assert rows == plan.local_images * config.num_replayed_rows
    assert plan.images_per_update * plan.updates_per_inner_epoch == plan.local_images


def test_one_optimizer_step_an_inner_epoch_by_default(tmp_path):
    assert plan_epoch(tiny.config(tmp_path, train_batch_size=2), 1).updates_per_inner_epoch == 1


def remedy(caught, name):
    return int(str(caught.value).rpartition(f"{name}=")[2].split()[0].strip(",;."))


def test_a_minibatch_that_does_not_divide_is_an_error_with_a_size_that_works(tmp_path):
    with pytest.raises(ValueError, match="16 images a process .* train_batch_size=5") as caught:
        plan_epoch(tiny.config(tmp_path, train_batch_size=5), 1)
    size = remedy(caught, "train_batch_size")
    assert plan_epoch(tiny.config(tmp_path, train_batch_size=size), 1)


def test_an_accumulation_that_does_not_divide_is_an_error_with_one_that_works(tmp_path):
    with pytest.raises(ValueError, match="8 minibatches .* train_gradient_accumulation_steps=3; use 2"):
        plan_epoch(tiny.config(tmp_path, train_batch_size=2, train_gradient_accumulation_steps=3), 1)
    assert plan_epoch(tiny.config(tmp_path, train_batch_size=2, train_gradient_accumulation_steps=2), 1)


def test_groups_may_span_processes_and_must_divide_all_their_images(tmp_path):
    config = tiny.config(tmp_path, num_generations=32)
    assert plan_epoch(config, 2).num_groups == 1
    with pytest.raises(ValueError, match="16 images .* groups of 32"):
        plan_epoch(config, 1)


def test_bounds_of_the_groups_are_checked_against_processes_and_batches(tmp_path):
    streaming = {"group_allocation": "streaming", "num_generations": 8}
    plan = plan_epoch(tiny.config(tmp_path, **streaming), 1)
    assert (plan.least_images, plan.most_images) == (4, 32), "two prompts: 2 x 4 is a batch of 8, 2 x 2 is none"
    with pytest.raises(ValueError, match="2 prompts x 3 images .* use min_generations=4"):
        plan_epoch(tiny.config(tmp_path, min_generations=3, **streaming), 1)
    variance = {"group_allocation": "variance", "num_generations": 8}
    assert plan_epoch(tiny.config(tmp_path, **variance), 1).least_images == 2
    with pytest.raises(ValueError, match="num_generations is 8, the mean of groups of 2 to 6"):
        plan_epoch(tiny.config(tmp_path, max_generations=6, **variance), 1)


def test_updates_of_an_epoch_are_equal_whatever_the_batch_sizes(tmp_path):
    for batch in (1, 2, 4, 8):
        plan = plan_epoch(tiny.config(tmp_path, train_batch_size=batch, train_updates_per_epoch=2), 1)
        assert (plan.updates_per_inner_epoch, plan.images_per_update) == (2, 8)
    with pytest.raises(ValueError, match="1 minibatches an epoch .*updates_per_epoch=2 .* use train_batch_size=8, or"):
        plan_epoch(tiny.config(tmp_path, train_batch_size=16, train_updates_per_epoch=2), 1)
    with pytest.raises(ValueError, match="2 minibatches .* use train_updates_per_epoch=1"):
        plan_epoch(tiny.config(tmp_path, train_updates_per_epoch=3), 1)
    with pytest.raises(
        ValueError, match="train_updates_per_epoch=2 and train_gradient_accumulation_steps=1 say the same"
    ):
        tiny.config(tmp_path, train_updates_per_epoch=2, train_gradient_accumulation_steps=1)


def test_what_acts_on_an_old_policy_alone_is_an_error_with_one_optimizer_step(tmp_path):
    settings = {"train_center_ratio": True, "train_kl_limit": 1e-4, "delta": 2.0, "old_policy_beta": 0.5}
    settings["train_clip_weighting"] = "ratio"
    for name, value in settings.items():
        with pytest.raises(ValueError, match=f"{name}={value} has no effect with one optimizer step an epoch.*below 2"):
            plan_epoch(tiny.config(tmp_path, **{name: value}), 1)
        for several in (
            {"train_num_inner_epochs": 2},
            {"train_gradient_accumulation_steps": 1},
            {"train_updates_per_epoch": 2},
            {"old_policy_decay": 0.5},
        ):
            plan_epoch(tiny.config(tmp_path, **{name: value}, **several), 1)
