"""An adapter is known by its tensors: not by the order in which a file happens to hold them."""

import torch
from safetensors.torch import load_file, save_file

from trl_tafs.policy.fingerprint import fingerprint

TENSORS = {f"layer.{i}.lora_{part}.weight": torch.randn(4, 8) for i in range(6) for part in "AB"}
METADATA = {f"key_{i}": str(i) for i in range(8)} | {"lora_adapter_metadata": '{"transformer.lora_alpha": 16}'}


def test_an_adapter_written_again_is_the_same_adapter(tmp_path):
    files = [tmp_path / f"{i}" / "pytorch_lora_weights.safetensors" for i in range(8)]
    for file in files:
        file.parent.mkdir()
        save_file(TENSORS, file, metadata=METADATA)
    assert len({file.read_bytes() for file in files}) > 1, "safetensors writes its metadata in no fixed order"
    assert len({fingerprint(file.parent) for file in files}) == 1
    assert fingerprint(files[0]) == fingerprint(str(files[0].parent))


def test_what_acts_otherwise_is_another_adapter(tmp_path):
    name, file = "layer.3.lora_B.weight", tmp_path / "a.safetensors"

    def of(tensors, metadata=METADATA):
        save_file(tensors, file, metadata=metadata)
        return fingerprint(file)

    bits = TENSORS[name].clone()
    bits.view(torch.int32)[1, 2] ^= 1  # the least of its mantissa
    others = [
        TENSORS,
        TENSORS | {name: bits},
        TENSORS | {name: TENSORS[name].reshape(8, 4)},
        TENSORS | {name: TENSORS[name].view(torch.int32)},
        {key.replace("layer.3", "layer.7"): tensor for key, tensor in TENSORS.items()},
        {key: tensor for key, tensor in TENSORS.items() if key != name},
    ]
    found = [of(tensors) for tensors in others]
    found.append(of(TENSORS, METADATA | {"lora_adapter_metadata": '{"transformer.lora_alpha": 8}'}))
    assert len(set(found)) == len(found)
    assert of(load_file(file)) == found[0] and fingerprint(None) is None
    assert of({"scalar": torch.tensor(1.0), "half": torch.zeros(0, dtype=torch.bfloat16)}) not in found
