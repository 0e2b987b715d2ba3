"""The memory plan's arithmetic, what it measures, and what makes a run smaller without changing it."""

import gc
import weakref

import families
import pytest
import tiny
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from torch import nn

from trl_tafs import AutoTAFSPipeline
from trl_tafs.policy import offload as offload_module
from trl_tafs.policy.base import cast
from trl_tafs.policy.lora import adapter_state_dict
from trl_tafs.policy.offload import DeviceSharing, frozen_tensors, move_frozen
from trl_tafs.training import memory
from trl_tafs.training.memory import Activations, Footprint, extrapolate, measure_activations, plan_memory

MIB = 2**20


def footprint(**changes):
    parts = {
        "denoiser": 1000 * MIB,
        "text_encoders": 2000 * MIB,
        "vae": 100 * MIB,
        "trained_parameters": 10 * MIB,
        "activations": Activations(saved=300 * MIB, block_inputs=30 * MIB, num_blocks=10),
        "decoded_image": 50 * MIB,
        "latent_elements": MIB // 4,
        "storage_bytes": 2,
    }
    return Footprint(**(parts | changes))


def settings(tmp_path, **changes):
    return tiny.config(tmp_path, sample_batch_size=4, sample_num_batches_per_epoch=4, train_batch_size=2, **changes)


def test_each_phase_is_the_sum_of_what_it_holds(tmp_path):
    plan = plan_memory(footprint(), settings(tmp_path), local_images=16)
    # Of one image, D = 2^18: the 4 states of the path of 2 bytes, which hold the actions, and the final latent of 4
    # bytes; its 3 items have a state and an action each.
    kept, items = (4 * 2 + 4) // 4, 3 * (1 + 1) * 2 // 4
    always = 40 + 80 + 2000 + 100  # LoRA, two moments, text encoders, VAE
    scored = 4 * 3  # a batch of 4, three steps of 1 MiB
    expected = {
        "encode": 40 + 80 + 2000 + 100 + 1000,
        "rollout": always + 1000 + 16 * kept + scored + 4 * 30,
        "decode": always + 1000 + 16 * kept + scored + 4 * 50,
        "update": always + 1000 + 16 * (kept + items) + 40 + 2 * (300 + 30),
    }
    assert {phase: plan.peak(phase) / MIB for phase in plan.phases} == expected
    assert plan.peak() / MIB == max(expected.values())


@pytest.mark.parametrize(
    ("changes", "path", "floats", "item"),
    [
        ({}, 4, 1, 3 * (2 + 2)),
        ({"num_perturbations": 4}, 3 + 3 * 4, 1, 3 * (2 + 4 * 2)),
        ({"sample_kernel": "clean", "clean_baseline": "group"}, 3 + 3, 1, 3 * (2 + 2)),
        ({"objective": "forward"}, 3, 1, 3 * (2 + 4 + 4)),
        ({"objective": "forward", "forward_levels": "sampler"}, 0, 1, 4 * (2 + 4 + 4)),
        ({"objective": "awm", "forward_images": "every"}, 3, 4 + 1, 3 * (2 + 4 + 4)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_a_rollout_is_planned_as_it_is_kept(tmp_path, changes, path, floats, item):
    options = settings(tmp_path, **changes)
    assert memory.rollout_bytes(options, 2) == 2 * path + 4 * floats
    assert memory.item_bytes(options, 2) == item


@pytest.mark.parametrize(
    ("changes", "phase", "less"),
    [
        ({"train_gradient_checkpointing": True}, "update", 2 * (300 + 30) - 2 * (30 + 2 * 30)),
        ({"offload_text_encoders": True}, "update", 2000),
        ({"model_cpu_offload": True}, "update", 2000 + 100),
        ({"model_cpu_offload": True}, "decode", 2000 + 1000 - 3 * (16 - 4)),
        ({"model_cpu_offload": True}, "encode", 1000 + 100),
        ({"train_use_8bit_adam": True}, "update", 60),
        ({"decode_batch_size": 1}, "decode", 3 * 50),
        ({"train_use_ema": True}, "update", -40),
        ({"sample_guidance_scale": 2.0, "train_cfg": True}, "update", -2 * (300 + 30)),
        ({"old_policy_decay": 0.5}, "rollout", -40),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_a_setting_saves(tmp_path, changes, phase, less):
    before = plan_memory(footprint(), settings(tmp_path), 16).peak(phase)
    assert (before - plan_memory(footprint(), settings(tmp_path, **changes), 16).peak(phase)) / MIB == less


def test_the_report_adds_up_and_warns(tmp_path):
    plan = plan_memory(footprint(), settings(tmp_path), 16)
    lines = plan.report(capacity=3 * 2**30).splitlines()
    columns = [[float(value) for value in line.split()[-4:]] for line in lines[1:-1]]
    for together, parts in zip(columns[-1], zip(*columns[:-1], strict=True), strict=True):
        assert together == pytest.approx(sum(parts), abs=0.05)
    assert "the device has 3.00" in lines[-1] and "train_batch_size" in lines[-1]
    assert "the device has" not in plan.report(capacity=80 * 2**30)


def test_weights_are_counted_once_and_by_what_is_trained():
    shared = nn.Linear(4, 4, bias=False)
    pair = nn.ModuleList([shared, shared, nn.BatchNorm1d(2).half()])
    shared.weight.requires_grad_(False)
    assert memory.weight_bytes([pair, shared]) == 4 * 16 + 2 * 4 * 2 + 8
    assert memory.weight_bytes([pair], trained=True) == 2 * 2 * 2
    assert memory.weight_bytes([pair], trained=False) == 4 * 16 + 2 * 2 * 2 + 8


def test_a_line_through_two_points():
    assert extrapolate((1, 30), (2, 40), 10) == 120
    assert extrapolate((4, 40), (4, 40), 8) == 80


def prepared(name):
    mine = families.ours(families.stock(name), name)
    mine.transformer.add_adapter(LoraConfig(r=4, target_modules=list(mine.lora_target_modules)))
    return mine, mine.encode_conditioning(["a red cat"], max_sequence_length=families.LENGTH)


@pytest.mark.parametrize("name", ["flux-dev", "qwen-image", "flux2", "sd3"])
def test_activations_at_the_training_size_are_what_two_smaller_sizes_say(name):
    mine, conditioning = prepared(name)
    size = 64 if name != "sd3" else 8
    found = memory.measure_footprint(mine, conditioning, size, size).activations
    real = measure_activations(mine, conditioning, size, size)
    assert found.saved == pytest.approx(real.saved, rel=0.05)
    assert found.block_inputs == pytest.approx(real.block_inputs, rel=0.05)
    assert found.num_blocks == real.num_blocks == 2
    assert real.block_inputs < real.saved


def test_activations_are_those_without_checkpointing_and_the_model_is_left_as_it_was():
    mine, conditioning = prepared("flux-dev")
    plain = measure_activations(mine, conditioning, 16, 16)
    mine.transformer.enable_gradient_checkpointing()
    assert measure_activations(mine, conditioning, 16, 16) == plain
    assert mine.transformer.is_gradient_checkpointing
    assert not any(block._forward_pre_hooks for block in memory.blocks_of(mine.transformer))


def test_a_measured_model_is_freed_with_its_activations():
    mine, conditioning = prepared("flux-dev")
    weights = weakref.ref(next(p for name, p in mine.transformer.named_parameters() if "lora_" in name))
    layer = weakref.ref(mine.transformer.transformer_blocks[0])
    memory.measure_footprint(mine, conditioning, 32, 32)
    del mine, conditioning
    gc.collect()
    assert layer() is None and weights() is None, "the measured graph keeps the denoiser"


def test_a_measurement_that_fails_leaves_no_hooks(monkeypatch):
    mine, conditioning = prepared("flux-dev")

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(mine, "velocity", fails)
    monkeypatch.setattr(mine, "decode_latents", fails)
    for measure in (
        lambda: measure_activations(mine, conditioning, 16, 16),
        lambda: memory.measure_decoder(mine, 16, 16),
    ):
        with pytest.raises(RuntimeError, match="out of memory"):
            measure()
    assert not any(m._forward_pre_hooks for m in mine.transformer.modules())
    assert not any(m._forward_hooks for m in mine.vae.modules())


def test_blocks_are_found_in_every_family():
    counts = {"sd3": 2, "flux-dev": 2, "sana": 2, "qwen-image": 2, "flux2": 2, "z-image": 3, "hidream": 2}
    assert {name: len(memory.blocks_of(families.stock(name).transformer)) for name in counts} == counts


def test_a_tile_bounds_what_the_decoder_holds():
    mine, conditioning = prepared("flux-dev")
    whole = memory.measure_footprint(mine, conditioning, 64, 64).decoded_image
    mine.vae.enable_tiling()
    mine.vae.tile_sample_min_size = 16
    assert memory.measure_footprint(mine, conditioning, 64, 64).decoded_image == whole // 16


def test_the_plan_is_printed_before_training(pipeline, tmp_path, capsys):
    trainer = tiny.trainer(pipeline, tmp_path, num_epochs=1, disable_tqdm=False)
    trainer.train()
    assert "memory plan, GiB" in capsys.readouterr().out
    real = sum(4 * p.numel() for n, p in pipeline.transformer.named_parameters() if "lora_" not in n)
    buffers = sum(b.numel() * b.element_size() for b in pipeline.transformer.buffers())
    assert trainer.logs.memory_plan.phases["update"]["denoiser"] == real + buffers


# Taking turns -------------------------------------------------------------------------------------------------


def test_frozen_weights_leave_and_what_is_trained_stays():
    mine, _ = prepared("flux-dev")
    model = mine.transformer
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    leaving = {id(tensor) for tensor in frozen_tensors(model)}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in leaving) == ("lora_" not in name)
    before = dict(model.named_parameters())
    move_frozen(model, torch.device("cpu"))
    assert all(parameter is before[name] for name, parameter in model.named_parameters()), "the optimizer's are these"


class Guest(nn.Linear):
    """Says where it is sent, since there is one device here."""

    def __init__(self):
        super().__init__(1, 1)
        self.place = "cpu"

    def to(self, device):
        self.place = device.type
        return self


def test_residents_come_and_go_and_the_denoiser_waits_for_the_last(monkeypatch):
    moves = []
    monkeypatch.setattr(offload_module, "move_frozen", lambda module, device: moves.append(device.type))
    vae, encoder = Guest(), Guest()
    turns = DeviceSharing(nn.Linear(1, 1), torch.device("cuda"))
    with turns.on_device([vae]):
        with turns.on_device([vae]):
            assert vae.place == "cuda"
        with turns.on_device([encoder]):
            assert vae.place == encoder.place == "cuda" and moves == ["cpu"]
        assert vae.place == "cuda" and encoder.place == "cpu" and moves == ["cpu"]
    assert vae.place == "cpu" and moves == ["cpu", "cuda"] and turns.resident == []


def losses(tmp_path, pipeline_folder, **changes):
    trainer = tiny.trainer(tiny.load(pipeline_folder), tmp_path, num_epochs=1, **changes)
    trainer.train()
    return adapter_state_dict(trainer.sd_pipeline.denoiser, trainer.policy.adapter_name)


@pytest.mark.parametrize(
    "changes",
    [{"model_cpu_offload": True}, {"decode_batch_size": 8, "train_gradient_checkpointing": True}, {"vae_tiling": True}],
    ids=lambda changes: "-".join(changes),
)
def test_a_smaller_run_is_the_same_run(pipeline_folder, tmp_path, changes):
    plain = losses(tmp_path / "plain", pipeline_folder)
    small = losses(tmp_path / "small", pipeline_folder, **changes)
    assert all(torch.equal(plain[key], small[key]) for key in plain)


def test_evaluation_exchanges_the_models_once_a_setting_and_changes_nothing(pipeline_folder, tmp_path, monkeypatch):
    results, moves, residents = [], [], []

    def judge(images, prompts, metadata):
        residents.append(len(trainer.policy.devices.resident))
        return images.mean((1, 2, 3))

    monkeypatch.setattr(offload_module, "move_frozen", lambda module, device: moves.append(device))
    for offload in (False, True):
        pipeline = tiny.load(pipeline_folder)
        trainer = tiny.trainer(
            pipeline,
            tmp_path / str(offload),
            model_cpu_offload=offload,
            eval_prompts=["one", "two", "three", "four", "five"],
            eval_reward_function={"judge": judge},
            eval_batch_size=2,
            eval_num_steps=[2, 3],
            eval_samplers=["annealed", "ode"],
        )
        trainer.encode(["one", "two", "three", "four", "five"])
        moves.clear()
        trainer.evaluate(0)
        results.append(trainer.progress.evaluations)
    assert results[0] == results[1]
    assert len(moves) == 2 * 4 and residents == [0] * 4 + [1] * 4, "the rewards have the denoiser's place"


def test_models_on_the_move_are_refused(pipeline, tmp_path):
    cpu_offload(pipeline.text_encoder, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"text_encoder has a hook of Accelerate.*use model_cpu_offload=True"):
        tiny.trainer(pipeline, tmp_path)
    with pytest.raises(ValueError, match="use one of them"):
        tiny.config(tmp_path, model_cpu_offload=True, async_reward_computation=True)


@pytest.mark.parametrize("setting", ["offload_text_encoders", "model_cpu_offload"])
def test_what_waits_on_the_cpu_is_cast_as_what_does_not(pipeline_folder, tmp_path, setting):
    found = []
    for name, changes in (("plain", {}), ("waiting", {setting: True})):
        trainer = tiny.trainer(tiny.load(pipeline_folder), tmp_path / name, mixed_precision="bf16", **changes)
        mine = trainer.sd_pipeline
        encoders = [mine.text_encoder, mine.text_encoder_2, mine.text_encoder_3]
        assert all({p.dtype for p in module.parameters()} == {torch.bfloat16} for module in encoders)
        assert mine.vae.dtype == torch.float32
        found.append(trainer.encode(["seven"]).positive.text)
    assert torch.equal(*found)


def test_float16_leaves_in_float32_what_overflows_in_it(pipeline_folder):
    t5 = tiny.load(pipeline_folder).text_encoder_3
    before = {name: p.clone() for name, p in t5.named_parameters()}
    cast(t5, torch.float16)
    for name, parameter in t5.named_parameters():
        assert parameter.dtype == (torch.float32 if ".wo." in name else torch.float16), name
        assert ".wo." not in name or torch.equal(parameter, before[name])
    assert any(".wo." in name for name in before)
    theirs = type(t5).from_pretrained(pipeline_folder / "text_encoder_3", dtype=torch.float16)
    dtypes = {name: p.dtype for name, p in theirs.named_parameters()}
    assert dtypes == {name: p.dtype for name, p in t5.named_parameters()}
    cast(t5, torch.bfloat16)
    assert {p.dtype for p in t5.parameters()} == {torch.bfloat16}


def test_a_quantized_base_keeps_its_dtype(pipeline, tmp_path):
    pipeline.text_encoder.is_quantized = True
    trainer = tiny.trainer(pipeline, tmp_path, mixed_precision="bf16")
    assert next(trainer.sd_pipeline.text_encoder.parameters()).dtype == torch.float32
    assert next(trainer.sd_pipeline.text_encoder_2.parameters()).dtype == torch.bfloat16


def test_a_base_that_torchao_quantized_is_trained_under_a_lora(tmp_path):
    pytest.importorskip("torchao")
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    families.stock("flux-dev").save_pretrained(tmp_path / "flux")
    quantization = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    mine = AutoTAFSPipeline.from_pretrained(tmp_path / "flux", quantization_config=quantization, dtype=torch.bfloat16)
    mine.set_progress_bar_config(disable=True)
    frozen = {name: p.clone() for name, p in mine.transformer.named_parameters()}
    settings = {"mixed_precision": "bf16", "num_epochs": 1, "max_sequence_length": families.LENGTH}
    trainer = tiny.trainer(mine, tmp_path / "run", height=16, width=16, **settings)
    trainer.train()
    lora = adapter_state_dict(mine.denoiser, trainer.policy.adapter_name)
    assert all(weight.abs().sum() > 0 for name, weight in lora.items() if "lora_B" in name)
    weight = mine.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    assert memory.tensor_bytes(weight) < 2 * weight.numel() and torch.equal(
        weight.dequantize(), frozen["transformer_blocks.0.attn.to_q.weight"].dequantize()
    )
