"""The base's room on a device, known before anything is moved."""

from contextlib import nullcontext

import pytest
import tiny
import torch

from trl_tafs.policy.base import GIB, arriving_weights, check_room
from trl_tafs.training.memory import weight_bytes


def test_weights_are_weighed_as_they_will_be_cast(pipeline, tmp_path):
    config = tiny.config(tmp_path, mixed_precision="bf16")
    weighed = arriving_weights(pipeline, config, torch.device("meta"))
    assert (
        weighed["transformer"]
        < arriving_weights(
            pipeline, tiny.config(tmp_path, mixed_precision="bf16", full_finetuning=True), torch.device("meta")
        )["transformer"]
    )
    assert not arriving_weights(pipeline, config, torch.device("cpu")), "they are there"
    tiny.trainer(pipeline, tmp_path, mixed_precision="bf16")
    for name in ("text_encoder", "text_encoder_3", "vae"):
        assert weighed[name] == weight_bytes([getattr(pipeline, name)]), name
    lora = sum(4 * p.numel() for name, p in pipeline.transformer.named_parameters() if "lora_" in name)
    assert weighed["transformer"] == weight_bytes([pipeline.transformer]) - lora


@pytest.mark.parametrize(
    ("free", "changes", "told"),
    [
        (20, {}, None),
        (13, {}, "take 20.00 GiB .transformer 12.00, .* has 13.00 free; use offload_text_encoders=True or model_cpu"),
        (12, {}, "free; use model_cpu_offload=True or a quantized base"),
        (11, {}, "free; use a quantized base"),
        (13, {"offload_text_encoders": True}, None),
        (12, {"offload_text_encoders": True}, "take 13.00 GiB .transformer 12.00, vae 1.00., .* use model_cpu_offload"),
        (12, {"model_cpu_offload": True}, None),
        (11, {"model_cpu_offload": True}, "take 12.00 GiB .transformer 12.00., .*; use a quantized base"),
    ],
)
def test_a_base_without_room_is_refused_with_what_would_fit(tmp_path, free, changes, told):
    weights = {"transformer": 12 * GIB, "text_encoder": 2 * GIB, "text_encoder_2": 5 * GIB, "vae": GIB}
    config = tiny.config(tmp_path, **changes)
    with pytest.raises(ValueError, match=told) if told else nullcontext():
        check_room(weights, config, free * GIB)
