"""`speed.py --device cuda`: full-size models of random weights, by batch, eager and compiled. Has not been run yet."""

from __future__ import annotations

import time
from typing import Any

import torch
from speed_models import build, make_trainer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from trl_tafs.presets import preset


def matrix_rate(size: int = 8192, times: int = 20) -> float:
    """Return the operations a second of a bfloat16 matrix product, as measured here: what MFU is a share of."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        a @ a
    torch.cuda.synchronize()
    return 2 * size**3 * times / (time.perf_counter() - start)


def row(model: str, batch: int, compiled: bool, rate: float) -> dict[str, Any]:
    """Measure an iteration of 2 batches: images a second, MFU, share of the time without a kernel, memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    sizes = {"sample_batch_size": batch, "sample_num_batches_per_epoch": 2, "num_generations": 2 * batch}
    options = preset("tafs") | sizes | {"train_batch_size": batch, "train_kl_rows": "one", "height": 512, "width": 512}
    options |= {"train_gradient_checkpointing": model == "flux1_dev", "mixed_precision": "bf16"}
    pipeline = build(model, "cuda", torch.bfloat16)
    if compiled:
        pipeline.transformer = torch.compile(pipeline.transformer)
    trainer = make_trainer(pipeline, model, **options)
    trainer.step(0, 0)  # compiles, and fills caches
    policy, images = trainer.policy, 2 * batch
    x = torch.randn(batch, *pipeline.latent_shape(512, 512), device="cuda").to(policy.storage_dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        policy.reference(x, torch.full((batch,), 0.5, device="cuda"), trainer.encode(["one"] * batch))
    steps = trainer.config.sample_num_steps
    # a backward pass of a frozen base is about one evaluation more: no gradients of its weights
    operations = flops.get_total_flops() / batch * images * (steps + 2 * (steps - 1) + 1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.step(1, 1)
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        begin = time.perf_counter()
        trainer.step(2, 2)
        torch.cuda.synchronize()
        profiled = time.perf_counter() - begin
    busy = sum(event.self_device_time_total for event in seen.key_averages()) / 1e6
    return {
        "model": model,
        "batch": batch,
        "compiled": compiled,
        "images_per_second": images / taken,
        "mfu": operations / taken / rate,
        "idle_share": max(0.0, 1 - busy / profiled),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def table(models: list[str], batches: list[int]) -> list[dict[str, Any]]:
    """Measure all; what has no room is said and passed over."""
    rate, rows = matrix_rate(), []
    for model in models:
        for batch in batches:
            for compiled in (False, True):
                try:
                    rows.append(row(model, batch, compiled, rate))
                except torch.cuda.OutOfMemoryError as error:
                    rows.append({"model": model, "batch": batch, "compiled": compiled, "error": str(error)[:200]})
                print(rows[-1], flush=True)
    return rows
