"""What a few blocks without values say of a whole model, against one that computes, counted storage by storage."""

import weakref

import families
import pytest
import tiny
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_tafs.pipelines.skeleton import load_skeleton
from trl_tafs.policy.carried import adapter_layers
from trl_tafs.training.simulation import Simulation, block_kinds, example_conditioning

DEEPER = {"num_layers": 5, "num_single_layers": 4, "n_layers": 5}
QUICK = ("sd3", "sana")
NAMES = [name for name in families.FAMILIES if name not in ("flux-schnell", "flux2-klein-distilled")]
FAMILIES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NAMES]


class Counted(TorchDispatchMode):
    """After each operator, the bytes of all storages that live and that an operator inside has made."""

    def __init__(self, weights):
        super().__init__()
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self.storages, self.peak = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        found = [item.untyped_storage() for item in tree_leaves(made) if isinstance(item, Tensor)]
        self.storages = [known for known in self.storages if known() is not None]
        known = {item().data_ptr() for item in self.storages}
        self.storages += [weakref.ref(item) for item in found if item.data_ptr() not in known | self.weights]
        self.peak = max(self.peak, sum(item().nbytes() for item in self.storages))
        return made


def deeper(name):
    """A tiny pipeline with more blocks of each kind."""
    mine = families.ours(families.stock(name), name)
    config = dict(mine.transformer.config)
    changes = {key: value for key, value in DEEPER.items() if key in config}
    if "llama_layers" in config:
        changes["llama_layers"] = [i % 2 for i in range(sum(changes.values()))]
    mine.transformer = type(mine.transformer).from_config(config | changes).eval()
    return mine


def counted(trainer, size, rows, update):
    """Peak bytes of an evaluation of a trainer's policy, with its backward pass or without."""
    policy, mine = trainer.policy, trainer.sd_pipeline
    conditioning = example_conditioning(mine, trainer.config, rows, torch.float32)
    x, level = torch.randn(rows, *mine.latent_shape(size, size)), torch.full((rows,), 0.5)
    given = [x, *(value for value in vars(conditioning.positive).values() if isinstance(value, Tensor))]
    constants = [v for part in mine.denoiser.modules() for v in vars(part).values() if isinstance(v, Tensor)]
    live = Counted([*mine.denoiser.parameters(), *mine.denoiser.buffers(), *constants])
    for parameter in policy.parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with live:
        if update:
            with policy.updating():
                policy.velocity(x, level, conditioning).square().mean().backward()
        else:
            with torch.no_grad():
                policy.velocity(x, level, conditioning)
    return live.peak + sum(item.untyped_storage().nbytes() for item in given)


@pytest.mark.parametrize("setting", [{}, {"train_gradient_checkpointing": True}, {"full_finetuning": True}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_few_blocks_say_what_the_whole_model_holds(name, setting, tmp_path):
    mine, size, rows = deeper(name), families.FAMILIES[name].size, 3
    settings = {"max_sequence_length": families.LENGTH, "height": size, "width": size, **setting}
    config = tiny.config(tmp_path, **settings)
    simulation = Simulation(mine, size, size)
    assert any(len(places) > 2 for places in block_kinds(mine.denoiser).values())
    expected = [simulation.denoiser(config, rows, update=update) for update in (True, False)]
    trainer = tiny.trainer(mine, tmp_path, **settings)
    assert expected[0].trained == sum(parameter.numel() for parameter in trainer.policy.parameters)
    if name == "hidream":  # an upper bound, which says so
        assert "upper bound" in simulation.notes[0]
        assert counted(trainer, size, rows, True) <= 1.1 * expected[0].update
        return
    assert expected[0].update == pytest.approx(counted(trainer, size, rows, True), rel=0.1)
    assert expected[1].evaluation == pytest.approx(counted(trainer, size, rows, False), rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_counted_as_it_is(name):
    mine, size = families.ours(families.stock(name), name), families.FAMILIES[name].size
    live = Counted([*mine.vae.parameters(), *mine.vae.buffers()])
    with live:  # the latents, too: a family that reads them through a view would count them, another not
        mine.decode_latents(torch.zeros(2, *mine.latent_shape(size, size)))
    assert Simulation(mine, size, size).decoding(2, False) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_skeleton_plans_as_the_model_with_weights(name, tmp_path):
    stock = families.stock(name)
    stock.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    skeleton, mine = load_skeleton(tmp_path / "model"), families.ours(stock, name)
    assert all(parameter.is_meta for parameter in skeleton.transformer.parameters())
    if name == "sd3":  # a skeleton has no tokenizers: CLIP's length is 77
        skeleton.tokenizer_max_length = mine.tokenizer_max_length
    size, config = families.FAMILIES[name].size, tiny.config(tmp_path, max_sequence_length=families.LENGTH)
    for module in ("transformer", "vae", *mine.text_encoders()):
        one, two = (sum(p.numel() for p in getattr(pipe, module).parameters()) for pipe in (skeleton, mine))
        assert one == two, module
    one, two = (Simulation(pipe, size, size).denoiser(config, 2, update=True) for pipe in (skeleton, mine))
    assert one == two


def test_blocks_of_a_kind_hold_the_same():
    counts = {"sd3": 2, "flux-dev": 2, "sana": 1, "qwen-image": 1, "flux2": 2, "z-image": 3, "hidream": 2}
    found = {name: len(block_kinds(families.stock(name).transformer)) for name in counts}
    assert found == counts


def test_blocks_are_of_the_same_kinds_with_an_adapter_and_without():
    mine = families.ours(families.stock("sd3"), "sd3")
    before = block_kinds(mine.transformer)
    mine.transformer.add_adapter(LoraConfig(r=4, target_modules=list(mine.lora_target_modules)))
    assert block_kinds(mine.transformer) == before


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_twin_s_adapters_hold_what_the_policy_s_do(precision, tmp_path):
    """Under autocast PEFT's own cast of an input to float32 would be held for the backward pass."""
    mine = families.ours(families.stock("sd3"), "sd3")
    simulation = Simulation(mine, 8, 8)
    twin = simulation.twin(tiny.config(tmp_path, mixed_precision=precision))
    policy = tiny.trainer(mine, tmp_path, height=8, width=8, mixed_precision=precision).policy
    told = [(layer.cast_input_dtype_enabled, set(layer.lora_variant)) for layer in policy.layers]
    twins = adapter_layers(twin.denoiser)
    assert [(layer.cast_input_dtype_enabled, set(layer.lora_variant)) for layer in twins] == told
    assert {enabled for enabled, _ in told} == {precision == "no"}
