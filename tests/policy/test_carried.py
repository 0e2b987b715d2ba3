"""What a pipeline carries when a trainer is given it: carried on as it is, or refused before anything is moved."""

import copy
import dataclasses
import json

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

from trl_tafs import AutoTAFSPipeline
from trl_tafs.evaluation.compare import _base_settings
from trl_tafs.policy.adapter_file import WEIGHT_NAME, save_adapter
from trl_tafs.policy.carried import active_adapters, adapter_weights
from trl_tafs.policy.lora import adapter_state_dict
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.training.checkpoint_files import CheckpointError

QUICK = {"num_epochs": 1, "train_learning_rate": 1e-2, "save_freq": 0}
CALL = {"num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 1.0, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def turbo(pipeline_folder, tmp_path_factory):
    """The folder of a LoRA that changes the base's images, r = 2, alpha = 6."""
    pipeline = tiny.load(pipeline_folder)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["attn.to_q", "attn.to_v"], init_lora_weights="gaussian")
    pipeline.transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(5)
    for name, weight in pipeline.transformer.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.3, generator=generator)
    return save_adapter(pipeline, tmp_path_factory.mktemp("turbo"), lora_config=config)


def stock(pipeline_folder, *adapters):
    """Plain diffusers with adapters, (folder, name, weight) each, active in this order."""
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    for folder, name, _ in adapters:
        pipe.load_lora_weights(folder, adapter_name=name)
    if adapters:
        pipe.set_adapters([name for _, name, _ in adapters], [weight for *_, weight in adapters])
    return pipe


def annealed(pipe):
    """Two images of plain diffusers by the annealed sampler."""
    config = pipe.scheduler.config
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(0)
    return pipe(["two", "six"], latents=x, output_type="pt", **CALL).images


def rolled(trainer):
    """The same two images by the trainer's policy, or None's: its model as the rollouts call it."""
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(0)
    pipeline = trainer.sd_pipeline
    rollout = pipeline.annealed_rollout(["two", "six"], latents=x, max_sequence_length=8, model=trainer.policy.model)
    return pipeline.decode_latents(rollout.final)


def velocities(trainer):
    """What the policy and its reference predict, on some noise."""
    x, conditioning = (
        torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)),
        trainer.encode(["two", "six"]),
    )
    with torch.no_grad():
        level = torch.full((2,), 0.5)
        return trainer.policy.velocity(x, level, conditioning), trainer.policy.reference(x, level, conditioning)


def stock_velocity(pipe, trainer):
    """The same of a plain pipeline."""
    x, conditioning = (
        torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)),
        trainer.encode(["two", "six"]),
    )
    with torch.no_grad():
        return AutoTAFSPipeline.from_pipe(pipe).velocity(x, torch.full((2,), 0.5), conditioning)


def carrying(pipeline_folder, *adapters):
    return AutoTAFSPipeline.from_pipe(stock(pipeline_folder, *adapters))


# Adapters -----------------------------------------------------------------------------------------------------


def test_a_lora_is_trained_and_published_at_the_weight_that_it_was_given(pipeline_folder, turbo, tmp_path):
    trainer = tiny.trainer(carrying(pipeline_folder, (turbo, "mine", 0.5)), tmp_path, **QUICK)
    assert torch.equal(rolled(trainer), annealed(stock(pipeline_folder, (turbo, "mine", 0.5))))
    trainer.train()
    published = tmp_path / "adapter"
    expected = rolled(trainer)
    torch.testing.assert_close(annealed(stock(pipeline_folder, (published, "any", 1.0))), expected, atol=1e-5, rtol=0)
    assert (annealed(stock(pipeline_folder, (published, "any", 2.0))) - expected).abs().max() > 1e-3
    assert active_adapters(trainer.sd_pipeline.denoiser) == ["mine"]
    assert set(adapter_weights(trainer.sd_pipeline.denoiser, "mine").values()) == {0.5}, "left as it was found"


def test_a_frozen_lora_acts_everywhere_and_is_published_apart(pipeline_folder, turbo, tmp_path):
    beneath, pipe = "default_0", stock(pipeline_folder)  # as diffusers names it
    pipe.load_lora_weights(turbo)
    pipe.set_adapters([beneath], [0.75])
    trainer = tiny.trainer(
        AutoTAFSPipeline.from_pipe(pipe), tmp_path, model_adapter_name="default", beta=0.1, **QUICK | {"save_freq": 1}
    )
    alone = stock(pipeline_folder, (turbo, beneath, 0.75))
    assert torch.equal(rolled(trainer), annealed(alone)), "the new LoRA is zero at first"
    before = adapter_state_dict(pipe.transformer, beneath)
    trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in adapter_state_dict(pipe.transformer, beneath).items())
    trained = [n for n, p in pipe.transformer.named_parameters() if p.requires_grad]
    assert trained and all(".default." in n for n in trained)

    published = tmp_path / "adapter"
    both = stock(pipeline_folder, (turbo, beneath, 0.75), (published, "default", 1.0))
    assert torch.equal(rolled(trainer), annealed(both)), "plain diffusers with both"
    now, reference = velocities(trainer)
    assert torch.equal(reference, stock_velocity(alone, trainer)) and not torch.equal(now, reference)
    assert trainer.policy.model.transformer_blocks[0].attn.to_q.active_adapters == [beneath, "default"], (
        "and back again"
    )
    layers = load_file(published / WEIGHT_NAME)
    assert {w.shape[0] for key, w in layers.items() if "lora_A" in key} == {4}, "the trained one alone"

    card = (published / "README.md").read_text()
    assert f'pipe.set_adapters(["{beneath}", "default"], [0.75, 1.0])' in card
    settings = json.loads((tmp_path / "config.json").read_text())
    assert json.loads(settings["frozen_adapters"])[0]["weight"] == 0.75

    def resumed(weight, folder=turbo, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        carried = carrying(pipeline_folder, *([(folder, beneath, weight)] if folder else []))
        changes = {"model_adapter_name": "default", "beta": 0.1, "resume_from": "latest"} | changes
        return tiny.trainer(carried, tmp_path, **QUICK | changes)

    again = resumed(0.75)
    assert torch.equal(rolled(again), rolled(trainer))
    for weight, folder in ((0.5, turbo), (0.75, published), (0, None)):
        with pytest.raises(CheckpointError, match=f"trained above .*{beneath}.* load the same adapters"):
            resumed(weight, folder)


def test_which_lora_is_trained_must_be_clear(pipeline_folder, turbo, tmp_path):
    own = LoraConfig(r=2, target_modules=["attn.to_q"])
    one, two = [(turbo, "turbo", 0.5)], [(turbo, "turbo", 0.5), (turbo, "style", 1.0)]

    def refused(adapters, message, **given):
        pipeline = carrying(pipeline_folder, *adapters)
        with pytest.raises(ValueError, match=message):
            tiny.trainer(pipeline, tmp_path, **given)

    refused(one, "already carries the adapter turbo; set model_adapter_name='turbo'.*LoraConfig", peft_config=own)
    refused(one, "already carries the adapter turbo.*without adapter_name_or_path", adapter_name_or_path=str(turbo))
    refused(two, "already carries the adapters turbo, style; set model_adapter_name")
    refused(one, "'turbo', and a LoraConfig is for a new one", peft_config=own, model_adapter_name="turbo")
    refused(one, "'attn' is also a module's", model_adapter_name="attn")
    refused([], "use letters", model_adapter_name="a.b")
    trainer = tiny.trainer(carrying(pipeline_folder, *two), tmp_path, model_adapter_name="style")
    assert trainer.policy.adapter.beneath == ("turbo",) and not trainer.policy.adapter.is_new
    assert all(".style." in n for n, p in trainer.sd_pipeline.denoiser.named_parameters() if p.requires_grad)


def test_fused_disabled_and_other_adapters_are_refused_with_the_call_that_helps(pipeline_folder, turbo, tmp_path):
    fused = carrying(pipeline_folder, (turbo, "turbo", 1.0))
    fused.fuse_lora()
    with pytest.raises(ValueError, match=r"turbo are fused.*unload_lora_weights\(\) to train on the fused weights"):
        tiny.trainer(fused, tmp_path)
    fused.unload_lora_weights()
    trainer = tiny.trainer(AutoTAFSPipeline.from_pipe(StableDiffusion3Pipeline(**fused.components)), tmp_path / "a")
    assert trainer.policy.adapter.is_new
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = tiny.trainer(fused, tmp_path / "b", **QUICK)
    trainer.train()
    card = (tmp_path / "b" / "adapter" / "README.md").read_text()
    assert "LoRAs fused into its weights, known by their names alone: `turbo`" in card

    disabled = carrying(pipeline_folder, (turbo, "turbo", 1.0))
    disabled.disable_lora()
    with pytest.raises(ValueError, match=r"turbo and they are disabled.*enable_lora\(\)"):
        tiny.trainer(disabled, tmp_path)
    whole = carrying(pipeline_folder, (turbo, "turbo", 1.0))
    with pytest.raises(ValueError, match="fuse or unload adapters"):
        tiny.trainer(whole, tmp_path, full_finetuning=True)

    spoken = tiny.load(pipeline_folder)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), spoken.text_encoder)
    with pytest.raises(ValueError, match=r"text_encoder carries a LoRA.*unload_lora_weights\(\)"):
        tiny.trainer(spoken, tmp_path)


# Wrappers, hooks, modes ---------------------------------------------------------------------------------------


def test_a_compiled_denoiser_saves_the_same_keys(pipeline_folder, tmp_path):
    plain = tiny.trainer(tiny.load(pipeline_folder), tmp_path / "plain", **QUICK)
    plain.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    pipeline = tiny.load(pipeline_folder)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    with torch.compiler.set_stance("force_eager"):  # the wrapper without the minutes of compilation
        trainer = tiny.trainer(pipeline, tmp_path / "compiled", **QUICK)
        trainer.train()
    for name in ("adapter", "checkpoints/checkpoint_000001"):
        one, two = (load_file(tmp_path / run / name / WEIGHT_NAME) for run in ("plain", "compiled"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    again = tiny.trainer(pipeline, tmp_path / "again", **QUICK)
    assert trainer.policy.model is again.policy.model is pipeline.transformer, "and for a second trainer on it"


@pytest.mark.slow
def test_a_compiled_denoiser_is_what_rolls_out_and_trains(pipeline, tmp_path):
    graphs = []

    def counting(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    eager = tiny.trainer(pipeline, tmp_path / "eager", **QUICK)
    now, _ = velocities(eager)
    pipeline.transformer = torch.compile(pipeline.transformer, backend=counting)
    trainer = tiny.trainer(pipeline, tmp_path / "compiled", **QUICK)
    compiled, _ = velocities(trainer)
    torch.testing.assert_close(compiled, now, atol=1e-5, rtol=1e-4)
    trainer.train()
    assert set(graphs) == {False, True}


def test_wrapped_and_hooked_modules_are_refused_and_untouched(pipeline_folder, tmp_path):
    def refused(change, message):
        pipeline = tiny.load(pipeline_folder)
        change(pipeline)
        before = [(p.data_ptr(), p.dtype, p.requires_grad) for p in pipeline.vae.parameters()]
        with pytest.raises(ValueError, match=message):
            tiny.trainer(pipeline, tmp_path, mixed_precision="bf16")
        assert before == [(p.data_ptr(), p.dtype, p.requires_grad) for p in pipeline.vae.parameters()]
        assert not getattr(pipeline.denoiser, "peft_config", None) and not list(tmp_path.iterdir())

    def parallel(pipeline):
        pipeline.transformer = torch.nn.DataParallel(pipeline.transformer)

    def inner(pipeline):
        pipeline.transformer.transformer_blocks[0] = torch.compile(pipeline.transformer.transformer_blocks[0])

    cpu = torch.device("cpu")
    for change, message in (
        (parallel, "transformer is wrapped as DataParallel"),
        (inner, "parts of the pipeline's transformer are wrapped by torch.compile.*compile_repeated_blocks"),
        (
            lambda p: p.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level"),
            "hook 'group_offloading'; load it again without enable_group_offload",
        ),
        (
            lambda p: p.transformer.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
            ),
            "transformer has diffusers' hook 'layerwise_casting'",
        ),
    ):
        refused(change, message)


def test_the_process_s_modes(pipeline_folder, tmp_path):
    trained = []
    for i, mode in enumerate((torch.inference_mode, torch.no_grad)):
        AcceleratorState._reset_state(reset_partial_state=True)
        pipeline = tiny.load(pipeline_folder)
        pipeline.transformer.train().requires_grad_(True)  # an earlier training's leftovers
        with mode():
            tiny.trainer(pipeline, tmp_path / f"{i}", **QUICK).train()
        trained.append(adapter_state_dict(pipeline.denoiser, "default"))
    assert all(torch.equal(value, trained[1][key]) for key, value in trained[0].items())
    assert any(value.any() for key, value in trained[0].items() if "lora_B" in key), "and it has learned"
    with torch.inference_mode():
        inference = tiny.load(pipeline_folder)
    with pytest.raises(ValueError, match="made inside torch.inference_mode"):
        tiny.trainer(inference, tmp_path / "c")
    pipeline = tiny.load(pipeline_folder)
    try:
        torch.set_default_dtype(torch.float64)
        with pytest.raises(ValueError, match="default dtype is torch.float64"):
            tiny.trainer(pipeline, tmp_path / "d")
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")
        with pytest.raises(ValueError, match="default device is meta"):
            tiny.trainer(pipeline, tmp_path / "e")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


# Whose objects they are ---------------------------------------------------------------------------------------


def test_what_is_handed_over_stays_as_it_was_and_what_is_handed_out_may_be_changed(pipeline_folder, tmp_path):
    rows = [{"prompt": "two", "tags": ["a"]}, {"prompt": "six", "tags": ["b"]}]
    own = LoraConfig(r=2, target_modules=["attn.to_q"], base_model_name_or_path="mine")
    config = tiny.config(tmp_path / "a", **QUICK, eval_freq=1)
    given = copy.deepcopy((rows, own.to_dict(), dataclasses.asdict(config)))

    def spoiling(images, prompts, metadata):
        found = images.mean(dim=(1, 2, 3)), {"seen": [list(entry["tags"]) for entry in metadata]}
        images.zero_()
        for entry in metadata:
            entry["tags"].append("spoilt")
        prompts.clear()
        return found

    def spoiling_hook(rows, step, tracker):
        for images, _, metadata, rewards, _ in rows:
            images.zero_()
            rewards.zero_()
            metadata[0]["tags"].append("spoilt")

    from trl_tafs import TAFSGRPOTrainer

    def run(folder, reward, hook):
        AcceleratorState._reset_state(reset_partial_state=True)
        config.project_kwargs["project_dir"] = str(folder)
        pipeline = tiny.load(pipeline_folder)
        trainer = TAFSGRPOTrainer(config, reward, rows, pipeline, hook, peft_config=own, eval_prompts=rows)
        config.project_kwargs["project_dir"] = str(tmp_path / "another trainer's")
        trainer.train()
        return adapter_state_dict(pipeline.denoiser, "default")

    spoilt = run(tmp_path / "a", {"one": spoiling, "two": tiny.brightness}, spoiling_hook)
    config.project_kwargs["project_dir"] = given[2]["project_kwargs"]["project_dir"]
    assert (rows, own.to_dict(), dataclasses.asdict(config)) == given
    clean = run(tmp_path / "b", {"one": tiny.brightness, "two": tiny.brightness}, lambda *args: None)
    assert all(torch.equal(value, spoilt[key]) for key, value in clean.items())
    assert (tmp_path / "a" / "adapter").is_dir() and not (tmp_path / "another trainer's").exists()


def test_a_second_trainer_of_another_precision_is_told_what_stands_in_the_way(pipeline, tmp_path):
    tiny.trainer(pipeline, tmp_path / "a", mixed_precision="bf16")
    with pytest.raises(ValueError, match="mixed_precision is 'no', and an earlier.*has 'bf16'.*another process"):
        tiny.trainer(pipeline, tmp_path / "b", mixed_precision="no")
    assert not (tmp_path / "b").exists()


def test_scores_and_cached_prompts_are_known_by_what_a_pipeline_carries(pipeline_folder, turbo, tmp_path):
    fused = carrying(pipeline_folder, (turbo, "turbo", 1.0))
    fused.fuse_lora()
    fused.unload_lora_weights()
    pipelines = [
        carrying(pipeline_folder),
        carrying(pipeline_folder, (turbo, "turbo", 0.5)),
        carrying(pipeline_folder, (turbo, "turbo", 1.0)),
        fused,
    ]
    assert len({json.dumps(_base_settings(pipeline)) for pipeline in pipelines}) == 4
    files = {PromptEncoder(p, torch.device("cpu"), cache_dir=tmp_path)._file("two") for p in (pipelines[0], fused)}
    assert len(files) == 2
