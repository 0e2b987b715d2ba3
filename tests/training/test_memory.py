"""The memory plan's arithmetic, its advice, and what makes a run smaller without changing it."""

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
from trl_tafs.rewards.loading import planned_bytes
from trl_tafs.training.advice import advice, with_settings
from trl_tafs.training.memory import (
    CONTEXT,
    Footprint,
    gathered_bytes,
    item_bytes,
    plan_memory,
    reward_bytes,
    rollout_bytes,
    tensor_bytes,
    weight_bytes,
)
from trl_tafs.training.plan import plan_epoch

MIB = 2**20


def footprint(**changes):
    parts = {
        "weights": {
            "transformer": 1000 * MIB,
            "text_encoder": 1500 * MIB,
            "text_encoder_2": 500 * MIB,
            "vae": 100 * MIB,
        },
        "denoiser_name": "transformer",
        "trained_parameters": 10 * MIB,
        "evaluation": 120 * MIB,
        "update": 660 * MIB,
        "decoding": 200 * MIB,
        "latent_elements": MIB // 4,
        "storage_bytes": 2,
        "conditioning": MIB,
        "rewards": 30 * MIB,
        "loaded": 3100 * MIB,
    }
    return Footprint(**(parts | changes))


def settings(tmp_path, **changes):
    return tiny.config(
        tmp_path, **({"sample_batch_size": 4, "sample_num_batches_per_epoch": 4, "train_batch_size": 2} | changes)
    )


def sharded(options, world_size, **changes):
    return plan_memory(footprint(**changes), options, plan_epoch(options, world_size), sharded=True)


def planned(options, world_size=1, **changes):
    return plan_memory(footprint(**changes), options, plan_epoch(options, world_size))


def test_each_phase_is_the_sum_of_what_it_holds(tmp_path):
    plan = planned(settings(tmp_path))
    # Of one image, D = 2^18: the 4 states of the path of 2 bytes, which hold the actions, and the final latent of 4
    # bytes; its 3 items have a state and an action each.
    kept, items = (4 * 2 + 4) // 4, 3 * (1 + 1) * 2 // 4
    always = 30 + 40 + 80  # rewards, LoRA, two moments
    scored = 4 * 3  # a batch of 4, three steps of 1 MiB
    held = always + 2000 + 100 + 1000  # text encoders, VAE, denoiser
    expected = {
        "encode": held,
        "rollout": held + 16 * kept + scored + 120,
        "decode": held + 16 * kept + scored + 200,
        "update": held + 16 * (kept + items) + 40 + 660,
        "step": held + 16 * (kept + items) + 40 + 40,
    }
    assert {phase: plan.allocated(phase) / MIB for phase in plan.phases} == expected
    assert plan.allocated() / MIB == max(expected.values())
    assert plan.peak() == round(1.05 * plan.allocated()) + CONTEXT
    assert (plan.host, plan.prompt) == (3100 * MIB, MIB)


def test_processes_hold_buckets_of_gradients(tmp_path):
    options = settings(tmp_path)
    alone, two = planned(options), planned(options, 2)
    assert two.allocated("update") - alone.allocated("update") == 40 * MIB


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
    assert rollout_bytes(options, 2) == 2 * path + 4 * floats
    assert item_bytes(options, 2) == item


@pytest.mark.parametrize(
    ("changes", "phase", "less"),
    [
        ({"offload_text_encoders": True}, "update", 2000),
        ({"model_cpu_offload": True}, "update", 2000 + 100),
        ({"model_cpu_offload": True}, "decode", 2000 + 1000 - 3 * (16 - 4)),
        ({"model_cpu_offload": True}, "encode", 1000 + 100),
        ({"train_use_8bit_adam": True}, "update", 60),
        ({"train_use_8bit_adam": True}, "step", 60 + 40),
        ({"train_use_ema": True}, "update", -40),
        ({"old_policy_decay": 0.5}, "rollout", -40),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_a_setting_saves(tmp_path, changes, phase, less):
    before = planned(settings(tmp_path)).allocated(phase)
    assert (before - planned(settings(tmp_path, **changes)).allocated(phase)) / MIB == less


def test_the_report_adds_up_and_warns(tmp_path):
    plan = planned(settings(tmp_path))
    lines = plan.report(capacity=3 * 2**30, processes=8).splitlines()
    table = [line for line in lines[1:] if len(line.split()) > 5 and line[22:32].strip().replace(".", "").isdigit()]
    columns = [[float(line[i : i + 10]) for i in range(22, 72, 10)] for line in table]
    for together, parts in zip(columns[-2], zip(*columns[:-2], strict=True), strict=True):
        assert together == pytest.approx(sum(parts), abs=0.06)
    assert any(line.startswith("host memory 24.22 GiB (8 x 3.03)") for line in lines)
    assert "the device has 3.00" in lines[-1] and "no setting makes it fit" in lines[-1]
    assert lines[-1] != plan.report(capacity=80 * 2**30).splitlines()[-1] and "fit" not in plan.report(80 * 2**30)


def linear(options):
    """A plan whose working memory follows the batch sizes and checkpointing."""
    update = options.train_batch_size * (60 if options.train_gradient_checkpointing else 330) * MIB
    decoding = 50 * options.decode_size * MIB
    sizes = {"update": update, "decoding": decoding, "evaluation": 30 * options.sample_batch_size * MIB}
    return plan_memory(footprint(**sizes), options, plan_epoch(options, 1))


@pytest.mark.parametrize(("below", "most"), [(100, 1), (500, 1), (700, 1), (1900, 2)])
def test_advice_names_settings_that_are_enough_and_needed(tmp_path, below, most):
    options = settings(tmp_path, decode_batch_size=1)
    capacity = linear(options).peak() - round(1.05 * below * MIB)
    found = advice(options, linear, capacity)
    taken = {item.partition("=")[0]: eval(item.partition("=")[2]) for item in found}
    assert found and linear(with_settings(options, taken)).peak() <= capacity
    for name in taken:
        rest = {key: value for key, value in taken.items() if key != name}
        assert linear(with_settings(options, rest)).peak() > capacity, f"{name} isn't needed"
    assert len(taken) <= most


def test_advice_is_none_where_nothing_helps(tmp_path):
    assert advice(settings(tmp_path), linear, CONTEXT) == ()


def test_weights_are_counted_once():
    shared = nn.Linear(4, 4, bias=False)
    pair = nn.ModuleList([shared, shared, nn.BatchNorm1d(2).half()])
    assert weight_bytes([pair, shared]) == 4 * 16 + 2 * 2 * 2 + 2 * 2 * 2 + 8


def test_rewards_are_counted_by_what_their_classes_say_and_by_what_they_hold():
    assert planned_bytes(["clip_score=1.0", "jpeg_compressibility"], {}) == 4 * 428_000_000
    assert planned_bytes(["pickscore"], {"pickscore": {"dtype": "bfloat16"}}) == 2 * 986_000_000
    assert planned_bytes(["pickscore"], {"pickscore": {"offload": True}}) == 0
    assert planned_bytes(["http://judge:8000"], {}) == 0

    class Judge:
        modules = [nn.Linear(3, 2)]

    one = Judge()
    assert reward_bytes([one, one, min], "cpu") == 4 * (3 * 2 + 2) and reward_bytes([one], "cuda") == 0


def test_the_plan_is_said_before_anything_is_moved(pipeline, tmp_path, caplog, monkeypatch):
    from trl_tafs.policy import policy

    printed = []
    prepare = policy.prepare_base
    caplog.set_level("INFO", "trl_tafs")
    monkeypatch.setattr(policy, "prepare_base", lambda *a: printed.append(caplog.text) or prepare(*a))
    trainer = tiny.trainer(pipeline, tmp_path, disable_tqdm=False)
    assert f"memory: {trainer.logs.memory_plan.peak() / 2**30:.2f} GiB planned at the peak" in printed[0]
    real = sum(4 * p.numel() for n, p in pipeline.transformer.named_parameters() if "lora_" not in n)
    buffers = sum(b.numel() * b.element_size() for b in pipeline.transformer.buffers())
    plan = trainer.logs.memory_plan
    assert plan.phases["update"]["denoiser"] == real + buffers
    assert plan.phases["update"]["trained weights"] == sum(4 * p.numel() for p in trainer.policy.parameters)


def test_a_plan_that_cannot_be_made_costs_a_warning(pipeline, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(type(pipeline), "embedding_shapes", lambda self, length: {})
    caplog.set_level("INFO", "trl_tafs")  # somebody would read it
    with pytest.warns(UserWarning, match="memory plan can't be made .TypeError"):
        trainer = tiny.trainer(pipeline, tmp_path, disable_tqdm=False)
    assert trainer.logs.memory_plan is None


def prepared(name):
    mine = families.ours(families.stock(name), name)
    mine.transformer.add_adapter(LoraConfig(r=4, target_modules=list(mine.lora_target_modules)))
    return mine, mine.encode_conditioning(["a red cat"], max_sequence_length=families.LENGTH)


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
    assert tensor_bytes(weight) < 2 * weight.numel() and torch.equal(
        weight.dequantize(), frozen["transformer_blocks.0.attn.to_q.weight"].dequantize()
    )


def test_shards_divide_the_denoiser_and_gather_a_part_of_it(tmp_path):
    options = settings(tmp_path)
    whole, shards = planned(options, 8), sharded(options, 8, gathered=90 * MIB)
    for phase in ("rollout", "decode", "update", "step"):
        parts = {name: size // MIB for name, size in shards.phases[phase].items()}
        assert (parts["denoiser"], parts["gathered blocks"]) == (125, 90) and "buckets of DDP" not in parts
        same = {name for name in parts if name not in ("denoiser", "gathered blocks", "activations")}
        assert all(parts[name] == whole.phases[phase][name] // MIB for name in same)
    assert shards.phases["step"]["activations"] == 2 * 40 * MIB, "the averaged gradients, twice"
    assert sharded(options, 64).allocated() < shards.allocated() < whole.allocated()


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "hidream"])
def test_what_shards_gather_is_two_blocks_and_what_is_outside(name):
    denoiser = families.stock(name).transformer
    sizes = {n: sum(p.nbytes for p in module.parameters()) for n, module in denoiser.named_modules()}
    blocks = [size for n, size in sizes.items() if n.count(".") == 1 and n.split(".")[0].endswith("blocks")]
    gathered = gathered_bytes(denoiser, weight_bytes([denoiser]))
    outside = weight_bytes([denoiser]) - sum(blocks)
    assert gathered == pytest.approx(outside + sum(sorted(blocks)[-2:]), abs=8) and outside > 0
