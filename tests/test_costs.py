"""What an epoch of each preset costs, counted by hooks: rows that the denoiser evaluates, backward passes, decodes."""

import pytest
import tiny

from trl_tafs.presets import PRESETS, preset

IMAGES = 8

# For each image of an epoch: evaluations in the rollout, evaluations with a gradient and without one in the update, and
# decoded images. Guidance doubles evaluations. Without a gradient are the base's (beta), the old policy's (where there
# are several updates and the objective needs them), and what distribution matching takes (teacher, fake score).
COSTS = {
    "paper": (4, 3, 0, 3),
    "tafs": (4, 3, 3, 3),
    "tafs_annealed": (4, 3, 0, 3),
    "tafs_clean": (4, 3, 0, 12),  # four explored images of each of three steps
    "tafs_nft": (4, 3, 3, 1),
    "tafs_nft_stepwise": (4, 3, 3, 3),
    "tafs_trace": (4, 3, 0, 4),  # increments need the first step's image, too
    "flow_grpo": (20, 18, 18, 1),
    "flow_grpo_fast": (20, 4, 0, 1),
    "superflow": (20, 18, 18, 1),
    "dance_grpo": (12, 6, 0, 1),  # .6 of 11 steps
    "mix_grpo": (25, 4, 0, 1),
    "flow_cps": (10, 9, 0, 1),
    "diffusion_nft": (10, 9, 19, 1),  # the base at 9 levels, the old policy at 10
    "awm": (14, 6, 6, 1),
    "tafs_without_annealing": (4, 3, 3, 3),
    "tafs_without_step_advantage": (4, 3, 3, 1),
    # the final image's state again, the fake score's own step; the base and the old policy at 3, guided teacher, fake
    "tafs_dm": (4, 3 + 1 + 1, 3 + 3 + 2 + 1, 3),
}


def counted(trainer):
    """Counts of one `step`, for each of its images."""
    counts = {"rollout": 0, "gradient": 0, "no_gradient": 0, "backward": 0, "decoded": 0}

    def evaluated(module, args, kwargs, output):
        rows, output = len(kwargs["hidden_states"]), output[0]
        phase = "gradient" if output.requires_grad else "no_gradient" if trainer.updating else "rollout"
        counts[phase] += rows
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.__setitem__("backward", counts["backward"] + rows))

    def decoded(module, args, output):
        counts["decoded"] += len(output)

    trainer.updating, update = False, trainer.updater.update

    def updates(*arguments):
        trainer.updating = True
        yield from update(*arguments)

    trainer.updater.update = updates
    hooks = [
        trainer.sd_pipeline.denoiser.register_forward_hook(evaluated, with_kwargs=True),
        trainer.sd_pipeline.vae.decoder.register_forward_hook(decoded),
    ]
    trainer.step(0, 0)
    for hook in hooks:
        hook.remove()
    return {name: count / IMAGES for name, count in counts.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_evaluates_and_decodes_as_often_as_its_method_says(name, pipeline, tmp_path):
    settings = preset(name) | {"num_generations": 4, "sample_batch_size": IMAGES, "sample_num_batches_per_epoch": 1}
    settings["train_batch_size"] = IMAGES // settings.get("train_updates_per_epoch", 1)
    trainer = tiny.trainer(pipeline, tmp_path, prompt_function=["one", "two"], **settings)
    rollout, gradient, no_gradient, decoded = COSTS[name]
    found = counted(trainer)
    assert found == {
        "rollout": rollout,
        "gradient": gradient,
        "no_gradient": no_gradient,
        "backward": gradient,
        "decoded": decoded,
    }


@pytest.mark.parametrize("objective", ["matched", "clipped"])
def test_a_distance_at_one_row_evaluates_the_base_once_an_image(objective, pipeline, tmp_path):
    sizes = {
        "num_generations": 4,
        "sample_batch_size": IMAGES,
        "sample_num_batches_per_epoch": 1,
        "train_batch_size": 2,
    }
    options = {"objective": objective, "beta": 0.1, "train_kl_rows": "one"}
    trainer = tiny.trainer(pipeline, tmp_path, prompt_function=["one", "two"], **sizes | options)
    assert counted(trainer) == {"rollout": 4, "gradient": 3, "no_gradient": 1, "backward": 3, "decoded": 3}
