"""Distribution matching in a run: what moves, what doesn't know of it, what a checkpoint has, what is refused."""

import dataclasses
import json
import re

import families
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from run_state import Signalling, everything, same
from safetensors.torch import load_file

from trl_tafs import TAFSGRPOConfig
from trl_tafs.pipelines.finite import NonFiniteError
from trl_tafs.policy.carried import FAKE_ADAPTER, active_adapters
from trl_tafs.policy.lora import adapter_state_dict
from trl_tafs.training import checkpoint_files as files
from trl_tafs.training.checkpoint_files import CheckpointError, checkpoints
from trl_tafs.training.memory import measure_footprint, plan_memory
from trl_tafs.training.notes import setting_notes
from trl_tafs.training.simulation import Simulation

SETTINGS = {"train_learning_rate": 1e-2, "train_batch_size": 4, "prompt_function": ["one", "two", "three"]}


def make(folder, run, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    return tiny.trainer(tiny.load(folder), run, **SETTINGS | {"dm_weight": 1.0} | changes)


def log(run, name):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def lora(trainer, name=None):
    return adapter_state_dict(trainer.sd_pipeline.denoiser, name or trainer.policy.adapter_name)


def counted(trainer):
    """The rows of each evaluation of the denoiser from now on."""
    counts = []

    def count(module, args, kwargs):
        counts.append(len(kwargs["hidden_states"]))

    trainer.sd_pipeline.denoiser.register_forward_pre_hook(count, with_kwargs=True)
    return counts


def still(images, prompts, metadata):
    """A reward that teaches nothing."""
    return torch.zeros(len(images))


# What moves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["trained", "final"])
@pytest.mark.parametrize("objective", ["clipped", "matched", "forward", "awm"])
@pytest.mark.filterwarnings("ignore:beta is 0")
def test_it_moves_any_objective_also_without_a_reward(pipeline_folder, tmp_path, caplog, objective, rows):
    trainer = make(
        pipeline_folder, tmp_path, reward=still, objective=objective, beta=0.0, dm_rows=rows, dm_guidance_scale=3.0
    )
    before, fake = lora(trainer), lora(trainer, FAKE_ADAPTER)
    trainer.train()
    assert re.search("WARNING.*no image has an advantage.*distribution matching", caplog.text)
    assert any(not torch.equal(before[name], value) for name, value in lora(trainer).items())
    assert any(not torch.equal(fake[name], value) for name, value in lora(trainer, FAKE_ADAPTER).items())
    rows_an_image = {"trained": 3, "final": 1}[rows]
    assert log(tmp_path, "dm_teacher_evaluations") == [2 * rows_an_image] * 2, "guided"
    assert log(tmp_path, "dm_fake_evaluations") == [2 * rows_an_image] * 2, "once for the term, once to learn"


def test_the_evaluations_that_are_logged_are_those_that_are_made(pipeline_folder, tmp_path):
    for rows in ("trained", "final"):
        made = {}
        for weight in (0.0, 1.0):
            options = {"dm_rows": rows, "dm_fake_updates": 3, "dm_guidance_scale": 2.0} if weight else {}
            run = tmp_path / f"{rows}{weight}"
            trainer = make(pipeline_folder, run, dm_weight=weight, num_epochs=1, objective="matched", **options)
            counts = counted(trainer)
            trainer.step(0, 0)
            made[weight] = sum(counts)
        (teacher,), (fake,) = log(run, "dm_teacher_evaluations"), log(run, "dm_fake_evaluations")
        policy = 1 if rows == "final" else 0
        assert made[1.0] - made[0.0] == 16 * (teacher + fake + policy)


def test_without_guidance_and_before_the_fake_has_learned_there_is_no_pull(pipeline_folder, tmp_path):
    """The fake score begins as the base, and the teacher is the base: the term's gradient is 0, to the bit."""
    options = {"num_epochs": 1, "objective": "matched", "beta": 0.2}
    moved = []
    for weight in (0.0, 1.0):
        trainer = make(
            pipeline_folder,
            tmp_path / str(weight),
            dm_weight=weight,
            **options | ({"dm_guidance_scale": 1.0} if weight else {}),
        )
        trainer.train()
        moved.append(lora(trainer))
    assert same(*moved)
    assert log(tmp_path / "1.0", "dm_gap") == [0.0] and log(tmp_path / "1.0", "dm_loss") == [0.0]


def test_the_fake_score_comes_nearer_to_what_the_policy_draws(pipeline_folder, tmp_path):
    """With a policy that stands still, its loss on one and the same noise falls."""
    trainer = make(
        pipeline_folder,
        tmp_path,
        num_epochs=12,
        train_learning_rate=1e-9,
        dm_fake_learning_rate=2e-2,
        dm_fake_updates=3,
        dm_rows="final",
        save_freq=0,
    )
    matching, taught = trainer.updater.matching, []
    teach = matching.teach

    def measured(*arguments):
        before = matching._learn(1, 0.0).item()  # scale 0: no gradient
        teach(*arguments)
        taught.append((before, matching.policy.fake))

    matching.teach = measured
    trainer.train()
    losses = [loss for loss, _ in taught]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_a_heavier_weight_pulls_in_proportion(pipeline_folder, tmp_path):
    gradients = {}
    for weight in (0.0, 1.0, 3.0):
        trainer = make(pipeline_folder, tmp_path / str(weight), dm_weight=weight, num_epochs=1, save_freq=0)
        clip = trainer.policy.clip_gradients

        def keep(trainer=trainer, weight=weight, clip=clip):
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trainer.policy.parameters]
            gradients[weight] = torch.cat([grad.flatten().clone() for grad in grads])
            return clip()

        trainer.policy.clip_gradients = keep
        trainer.train()
    one, three = (gradients[w] - gradients[0.0] for w in (1.0, 3.0))
    assert one.norm() > 0
    torch.testing.assert_close(three, 3 * one, rtol=1e-3, atol=1e-6)


# What doesn't know of it ----------------------------------------------------------------------------------------


def test_policy_and_reference_are_those_of_a_run_without_it(pipeline_folder, tmp_path):
    plain, matched = (make(pipeline_folder, tmp_path / str(w), dm_weight=w) for w in (0.0, 1.0))
    prompts = plain.prompts.batch(0, 2, 8)[:8]
    one, two = (trainer.collector.sampler.roll_out(prompts, 0).rollout for trainer in (plain, matched))
    assert all(torch.equal(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(one))
    assert [p.shape for p in plain.policy.parameters] == [p.shape for p in matched.policy.parameters]
    assert active_adapters(matched.sd_pipeline.denoiser) == [matched.policy.adapter_name]
    assert not any(parameter.requires_grad for parameter in matched.policy.fake.parameters)

    for parameter in matched.policy.fake.parameters:  # whatever it has learned
        parameter.data.normal_()
    x, level = torch.randn(2, *one.final.shape[1:]), torch.full((2,), 0.5)
    condition = matched.encode(["one", "two"])
    for name in ("velocity", "reference"):
        mine, other = (getattr(trainer.policy, name)(x, level, condition) for trainer in (plain, matched))
        assert torch.equal(mine, other)
    with matched.policy.fake.acting():
        fake = matched.sd_pipeline.velocity(x, level, condition)
    assert not torch.allclose(fake, mine)
    with matched.policy.fake.acting(learning=True):
        matched.sd_pipeline.velocity(x, level, condition).sum().backward()
    assert all(parameter.grad is None for parameter in matched.policy.parameters)
    matched.policy.velocity(x, level, condition).sum().backward()
    assert any(parameter.grad is not None for parameter in matched.policy.parameters)


def test_what_is_published_has_none_of_the_fake_score(pipeline_folder, tmp_path):
    trainer = make(pipeline_folder, tmp_path)
    trainer.train()
    names = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    alone = load_file(tmp_path / "checkpoints" / "checkpoint_000002" / "pytorch_lora_weights.safetensors")
    assert names.keys() == alone.keys() and len(names) == len(trainer.policy.parameters)
    assert not any(FAKE_ADAPTER in path.read_text(errors="ignore") for path in (tmp_path / "adapter").glob("*.*"))
    # another trainer on the same pipeline: the fake score is taken off, the trained LoRA is trained on
    AcceleratorState._reset_state(reset_partial_state=True)
    again = tiny.trainer(trainer.sd_pipeline, tmp_path / "again", **SETTINGS)
    assert list(again.sd_pipeline.denoiser.peft_config) == [trainer.policy.adapter_name]
    assert same(lora(again), lora(trainer))


# Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(pipeline_folder, tmp_path_factory):
    trainer = make(pipeline_folder, tmp_path_factory.mktemp("undisturbed"), num_epochs=3, dm_fake_updates=2)
    trainer.train()
    return trainer, everything(trainer)


def test_a_resume_is_bit_exact_with_two_adapters_and_two_optimizers(pipeline_folder, tmp_path, undisturbed):
    make(pipeline_folder, tmp_path, num_epochs=1, dm_fake_updates=2).train()
    resumed = make(pipeline_folder, tmp_path, num_epochs=3, dm_fake_updates=2, resume_from="latest")
    resumed.train()
    state = everything(resumed)
    assert same(state, undisturbed[1])
    kept = state["states"]["fake_score"]
    assert kept["optimizer"]["state"] and kept["weights"].keys() == resumed.policy.fake.named.keys()


@pytest.mark.parametrize("save_freq", [1, 3])
def test_a_signal_within_an_update_loses_nothing(pipeline_folder, tmp_path, undisturbed, save_freq):
    trainer = make(pipeline_folder, tmp_path, num_epochs=3, dm_fake_updates=2, save_freq=save_freq)
    trainer.compute_loss = Signalling(trainer.compute_loss, 15)  # the second epoch's third micro-batch
    with pytest.raises(SystemExit):
        trainer.train()
    assert files.epoch_of(checkpoints(tmp_path / "checkpoints")[-1]) == 1
    resumed = make(pipeline_folder, tmp_path, num_epochs=3, dm_fake_updates=2, resume_from="latest")
    resumed.train()
    assert same(everything(resumed), undisturbed[1])


def test_the_doctor_leaves_the_fake_score_as_it_was(pipeline_folder, tmp_path):
    trainer = make(pipeline_folder, tmp_path)
    before = trainer.policy.fake.state_dict()
    before = {"weights": {name: value.clone() for name, value in before["weights"].items()}} | {
        "optimizer": before["optimizer"]
    }
    assert not [finding for finding in trainer.doctor().findings if finding.severity == "error"]
    after = trainer.policy.fake.state_dict()
    assert same(before["weights"], after["weights"]) and not after["optimizer"]["state"]


def test_a_checkpoint_without_a_fake_score_or_of_another_is_refused(pipeline_folder, tmp_path):
    make(pipeline_folder, tmp_path / "plain", dm_weight=0.0, num_epochs=1).train()
    with pytest.raises(CheckpointError, match=r"has no state 'fake_score', and this run needs one \(dm_weight\)"):
        make(pipeline_folder, tmp_path / "plain", resume_from="latest")
    trainer = make(pipeline_folder, tmp_path / "matched", num_epochs=1)
    trainer.train()
    with pytest.raises(CheckpointError, match=r"has a state 'fake_score', and this run takes none \(dm_weight\)"):
        make(pipeline_folder, tmp_path / "matched", dm_weight=0.0, resume_from="latest")

    (found,) = checkpoints(tmp_path / "matched" / "checkpoints")
    path, state = found / "states" / "fake_score.pt", trainer.policy.fake.state_dict()
    names = list(state["weights"])
    for wrong in (
        {name: weight[..., :1] for name, weight in state["weights"].items()},
        {name: state["weights"][name] for name in names[1:]},
    ):
        torch.save(state | {"weights": wrong}, path)
        files._write_manifest(found)
        with pytest.raises(
            CheckpointError, match=r"fake_score.pt can't be used \(.*another base model, lora_rank or lora_target"
        ):
            make(pipeline_folder, tmp_path / "matched", resume_from="latest")


def test_a_resume_takes_the_new_learning_rate_of_the_fake_score(pipeline_folder, tmp_path):
    make(pipeline_folder, tmp_path, num_epochs=1).train()
    with pytest.warns(UserWarning, match="dm_fake_learning_rate"):
        resumed = make(pipeline_folder, tmp_path, dm_fake_learning_rate=0.5, resume_from="latest")
    assert [group["lr"] for group in resumed.policy.fake.optimizer.param_groups] == [0.5]
    assert resumed.policy.lr_scheduler.get_last_lr() == [1e-2]


# What isn't finite ----------------------------------------------------------------------------------------------


def test_a_fake_score_that_diverges_stops_the_run_and_is_named(pipeline_folder, tmp_path):
    trainer = make(pipeline_folder, tmp_path, num_epochs=3)
    next(iter(trainer.policy.fake.parameters)).data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=FAKE_ADAPTER), pytest.warns(UserWarning, match="left out"):
        trainer.train()
    assert not checkpoints(tmp_path / "checkpoints")


def test_a_gradient_of_the_fake_score_that_is_not_finite_is_left_out(pipeline_folder, tmp_path):
    trainer = make(pipeline_folder, tmp_path, train_max_skipped_steps=2, num_epochs=3)
    before = lora(trainer, FAKE_ADAPTER)
    parameter = trainer.policy.fake.parameters[0].requires_grad_(True)
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    parameter.requires_grad_(False)
    with pytest.raises(NonFiniteError, match="epoch 1: 2 optimizer steps of the fake score .*dm_fake_learning_rate"):
        trainer.train()
    assert same(before, lora(trainer, FAKE_ADAPTER))


# Options and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dm_guidance_scale": 3.0}, "dm_guidance_scale=3.0 needs dm_weight above 0"),
        ({"dm_rows": "final"}, "dm_rows='final' needs dm_weight above 0"),
        ({"dm_fake_updates": 2}, "dm_fake_updates=2 needs dm_weight above 0"),
        ({"dm_fake_learning_rate": 1e-3}, "dm_fake_learning_rate=0.001 needs dm_weight above 0"),
        ({"dm_level_shift": 3.0}, "dm_level_shift=3.0 needs dm_weight above 0"),
        ({"dm_weight": -1.0}, "dm_weight is -1.0; it must be at least 0"),
        ({"dm_weight": 1.0, "dm_rows": "all"}, "dm_rows is 'all'; use one of trained, final"),
        ({"dm_weight": 1.0, "dm_fake_updates": 0}, "dm_fake_updates is 0; it must be at least 1"),
        ({"dm_weight": 1.0, "dm_guidance_scale": 0.5}, "dm_guidance_scale is 0.5; it must be at least 1"),
        ({"dm_weight": 1.0, "full_finetuning": True}, "dm_weight=1.0 needs a frozen base.*full_finetuning=True"),
        ({"dm_weight": 1.0, "dm_guidance_scale": 1.0, "negative_prompts": "x"}, "negative_prompts='x' needs"),
        ({"dm_weight": 1.0, "model_adapter_name": FAKE_ADAPTER}, "model_adapter_name='tafs_fake_score' is the name"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_one_line(pipeline_folder, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        tiny.trainer(tiny.load(pipeline_folder), tmp_path, **changes)


def test_a_model_with_guidance_in_it_says_what_its_teacher_is(tmp_path):
    config = tiny.config(tmp_path, dm_weight=1.0)
    found = {}
    for name in ("flux-dev", "sana-sprint", "sd3"):
        pipeline = families.ours(families.stock(name), name)
        found[name] = [note for note in setting_notes(config, None, pipeline, (32, 32)) if "teacher" in note]
    assert found["sd3"] == []
    assert "given its embedded guidance of 3.5, without classifier-free" in found["flux-dev"][0]
    assert "given its embedded guidance of 4.5, without classifier-free" in found["sana-sprint"][0]
    sprint = families.ours(families.stock("sana-sprint"), "sana-sprint")
    with pytest.raises(ValueError, match=r"dm_guidance_scale is 3.0, and SanaSprintPipeline has no classifier-free"):
        tiny.trainer(sprint, tmp_path, dm_weight=1.0, dm_guidance_scale=3.0)


def test_the_memory_plan_counts_the_fake_score(pipeline_folder, tmp_path):
    plain, matched = (make(pipeline_folder, tmp_path / str(w), dm_weight=w) for w in (0.0, 1.0))
    settings = [(Simulation(tiny.load(pipeline_folder), 8, 8), trainer.config) for trainer in (plain, matched)]
    one, two = (measure_footprint(simulation, config) for simulation, config in settings)
    assert one.fake_parameters == 0
    assert two.fake_parameters == two.trained_parameters == one.trained_parameters
    plans = [plan_memory(f, t.config, t.plan).phases for f, t in ((one, plain), (two, matched))]
    size = two.fake_parameters
    assert plans[1]["update"]["fake score"] == (4 + 8) * size
    assert plans[1]["update"]["gradients"] - plans[0]["update"]["gradients"] == 4 * size
    estimates = 4 * two.latent_elements * 3 * plain.plan.local_images  # three trained rows of each image
    assert plans[1]["update"]["rollouts"] - plans[0]["update"]["rollouts"] == estimates
    assert "fake score" not in plans[0]["update"]


def test_the_preset_is_the_matched_one_with_the_term():
    matched, plain = TAFSGRPOConfig.from_preset("tafs_dm"), TAFSGRPOConfig.from_preset("tafs")
    differing = {f.name for f in dataclasses.fields(plain) if getattr(plain, f.name) != getattr(matched, f.name)}
    assert differing == {"dm_weight", "dm_rows", "train_updates_per_epoch"}
