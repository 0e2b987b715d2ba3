"""The body of test_distributed.py: epochs on the CPU, by torchrun with gloo in two processes, or in the test's own."""

import os
import signal
import sys
from pathlib import Path

import tiny
import torch
from accelerate.state import AcceleratorState

from trl_tafs import NonFiniteError
from trl_tafs.policy.carried import FAKE_ADAPTER
from trl_tafs.policy.lora import adapter_state_dict
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.rewards import RewardError

# Adam's first steps are the gradients' signs, which rounding may turn where a gradient is nearly 0.
MATCHED = {"dm_weight": 1.0, "dm_rows": "final", "dm_fake_updates": 2, "train_adam_epsilon": 1e-2}


def run(folder, model, batches, fail_at=None, signal_at=None, resume="", examined=False, spoiled=None, **changes):
    """Two epochs of two groups of 8; what a rank saw of them, and what its doctor says if it is examined before."""
    AcceleratorState._reset_state()
    seen = []

    def reward(images, prompts, metadata):
        seen.append(images)
        if len(seen) == fail_at and trainer.accelerator.process_index == 1:
            raise ConnectionError("judge is down")
        return images.mean((1, 2, 3)), {}

    trainer = tiny.trainer(
        tiny.load(model),
        folder,
        reward=reward,
        sample_batch_size=4,
        train_batch_size=4,
        sample_num_batches_per_epoch=batches,
        num_generations=8,
        num_epochs=2,
        reward_max_retries=0,
        accelerator_kwargs={"cpu": True},
        eval_freq=0 if spoiled is not None else 2,
        eval_num_steps=[2],
        eval_prompts=["one", "two", "three"],
        eval_reward_function={"judge": lambda images, p, m: images.mean((1, 2, 3))},
        resume_from=resume,
        prompt_function=["one", "two", "three"] if changes else tiny.prompts,
        **changes,
    )

    if trainer.accelerator.process_index == spoiled:
        trainer.sd_pipeline.vae.decoder.conv_in.weight.data.fill_(torch.nan)
    prompts = trainer.prompts.batch(0, trainer.plan.num_groups, trainer.plan.group_size)
    rollouts = [trainer.collector.sampler.roll_out(b, 0) for b in trainer.collector.local_batches(prompts)]
    report = trainer.doctor() if examined else None
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
        "final": torch.cat([part.rollout.final for part in rollouts]),
        "weights": adapter_state_dict(trainer.sd_pipeline.denoiser, trainer.policy.adapter_name),
        "fake": trainer.policy.fake and adapter_state_dict(trainer.sd_pipeline.denoiser, FAKE_ADAPTER),
        "curve": trainer.progress.reward_curve,
        "evaluations": trainer.progress.evaluations,
    }


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
