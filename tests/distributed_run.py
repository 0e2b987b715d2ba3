"""The body of test_distributed.py: epochs on the CPU, by torchrun with gloo in two processes, or in the test's own.

That of test_sharding.py has its runs, too.
"""

import json
import os
import signal
import sys
from pathlib import Path

import tiny
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState

from trl_tafs import NonFiniteError
from trl_tafs.policy.carried import FAKE_ADAPTER
from trl_tafs.policy.lora import adapter_state_dict
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.rewards import RewardError

DIGITS = [{"prompt": "two", "digit": 2}, {"prompt": "one", "digit": 1}]
# Adam's first steps are the gradients' signs, which rounding may turn where a gradient is nearly 0.
MATCHED = {"dm_weight": 1.0, "dm_rows": "final", "dm_fake_updates": 2, "train_adam_epsilon": 1e-2}


def run(
    folder,
    model,
    batches,
    fail_at=None,
    signal_at=None,
    resume="",
    examined=False,
    spoiled=None,
    sharded=False,
    flat=False,
    **changes,
):
    """Two epochs of two groups of 8; what a rank saw of them, and what its doctor says if it is examined before.

    `model`: a folder, or a pipeline; `sharded`: by FSDP2; `flat`: the reward of the second group doesn't vary.
    """
    AcceleratorState._reset_state()
    seen = []
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2) if sharded else None

    def reward(images, prompts, metadata):
        seen.append(images)
        if len(seen) == fail_at and trainer.accelerator.process_index == 1:
            raise ConnectionError("judge is down")
        varies = [not (flat and row["digit"] % 2) for row in metadata] if flat else 1.0
        return images.mean((1, 2, 3)) * torch.as_tensor(varies), {}

    chosen = DIGITS if flat else ["one", "two", "three"] if changes else tiny.prompts
    trainer = tiny.trainer(
        tiny.load(model) if isinstance(model, (str, Path)) else model,
        folder,
        reward=reward,
        train_batch_size=4,
        sample_num_batches_per_epoch=batches,
        num_generations=8,
        reward_max_retries=0,
        accelerator_kwargs={"cpu": True} | ({"fsdp_plugin": plugin} if sharded else {}),
        eval_freq=0 if spoiled is not None else 2,
        eval_num_steps=[2],
        eval_prompts=["one", "two", "three"],
        eval_reward_function={"judge": lambda images, p, m: images.mean((1, 2, 3))},
        resume_from=resume,
        **({"num_epochs": 2, "sample_batch_size": 4, "prompt_function": chosen} | changes),
    )
    if trainer.accelerator.process_index == spoiled:
        trainer.sd_pipeline.vae.decoder.conv_in.weight.data.fill_(torch.nan)
    prompts = trainer.prompts.batch(0, trainer.plan.num_groups, trainer.plan.group_size)
    rollouts = [trainer.collector.sampler.roll_out(b, 0) for b in trainer.collector.local_batches(prompts)]
    report = trainer.doctor() if examined else None
    clip_gradients, gradients = trainer.policy.clip_gradients, []

    def clipping():
        norm = clip_gradients()
        gradients.append([p.grad.clone() for p in trainer.policy.parameters if p.grad is not None])
        return norm

    trainer.policy.clip_gradients = clipping
    compute_loss, losses = trainer.compute_loss, []

    def signalling(*arguments):
        losses.append(arguments)
        if len(losses) == signal_at and trainer.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(*arguments)

    trainer.compute_loss = signalling
    trainer.train()
    return {
        "report": report,
        "world": trainer.accelerator.num_processes,
        "type": trainer.accelerator.distributed_type.value,
        "shards": shards(trainer.sd_pipeline.denoiser),
        "gradients": gradients,
        "losses": [line["loss"] for line in log_lines(folder) if "loss" in line],
        "final": torch.cat([part.rollout.final for part in rollouts]),
        "weights": adapter_state_dict(trainer.sd_pipeline.denoiser, trainer.policy.adapter_name),
        "fake": trainer.policy.fake and adapter_state_dict(trainer.sd_pipeline.denoiser, FAKE_ADAPTER),
        "curve": trainer.progress.reward_curve,
        "evaluations": trainer.progress.evaluations,
    }


def shards(denoiser):
    """The bytes of the base that this process keeps, of those that there are; and of what isn't sharded."""
    parts = [p for p in denoiser.parameters() if hasattr(p, "to_local")]
    own = sum(p.to_local().nbytes for p in parts)
    return own, sum(p.nbytes for p in parts), sum(p.nbytes for p in denoiser.parameters() if not hasattr(p, "to_local"))


def log_lines(folder):
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    encoded, encode = [], PromptEncoder._encode

    def counting(self, prompts, keep=True):
        encoded.extend(() if keep else prompts)
        encode(self, prompts, keep)

    PromptEncoder._encode = counting
    folder, model = Path(sys.argv[1]), sys.argv[2]
    results = {"straight": run(folder / "straight", model, 2, examined=True)}
    try:
        run(folder / "failed", model, 2, fail_at=3)  # the second batch of the first epoch, after the preflight
    except RewardError as error:
        results["error"] = str(error)
    results["kept"] = len(list((folder / "failed" / "pending").glob("*.pt")))
    for early in (True, False):
        try:
            run(folder / f"spoiled_{early}", model, 2, spoiled=1, preflight_rollout=early)
        except NonFiniteError as error:
            results["spoiled", early] = str(error)
    torch.distributed.barrier()
    results["resumed"] = run(folder / "failed", model, 2, resume="latest")
    try:
        run(folder / "stopped", model, 2, signal_at=2)
    except SystemExit as error:
        results["code"] = error.code
    results["continued"] = run(folder / "stopped", model, 2, resume="latest")
    results["streaming"] = run(folder / "streaming", model, 2, group_allocation="streaming", min_generations=4)
    results["matched"] = run(folder / "matched", model, 2, **MATCHED)
    encoder = PromptEncoder(tiny.load(model), torch.device("cpu"), cache_dir=folder / "prompts")
    encoder.prepare(["one", "two", "three"])
    results["there"] = len(list((folder / "prompts").rglob("*.safetensors")))
    results["encoded"] = encoded
    torch.save(results, folder / f"result_{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
