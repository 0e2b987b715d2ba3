"""Run by torchrun in test_distributed.py: a few epochs on the CPU with gloo; each rank writes what it saw."""

import sys
from pathlib import Path

import tiny
import torch

from trl_tafs import policy

torch.set_num_threads(1)
folder, model, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
seen = []


def reward(images, prompts, metadata):
    seen.append(images)
    if mode == "fail" and len(seen) == 3 and trainer.accelerator.process_index == 1:
        raise ConnectionError("judge is down")
    return images.mean((1, 2, 3)) * (images[:, 0, 0, 0] > -1), {}


world_batches = {"one": 4}.get(mode, 2)
trainer = tiny.trainer(
    tiny.load(model),
    folder / "run",
    reward=reward,
    sample_batch_size=4,
    train_batch_size=4,
    sample_num_batches_per_epoch=world_batches,
    num_generations=8,
    num_epochs=2,
    reward_max_retries=0,
    accelerator_kwargs={"cpu": True},
    eval_freq=2,
    eval_num_steps=[2],
    eval_prompts=["one", "two", "three"],
    eval_reward_function={"judge": lambda images, p, m: images.mean((1, 2, 3))},
    resume_from="latest" if mode == "resume" else "",
)
start = trainer.prompts.batch(0, trainer.plan.num_groups, trainer.plan.group_size)
parts, _ = trainer.collector.collect(trainer._batches(trainer._local(start)), trainer.config.seed, 0)
final = torch.cat([part.rollout.final for part in parts])
seen.clear()
trainer.train()
result = {
    "world": trainer.accelerator.num_processes,
    "final": final,
    "weights": policy.adapter_state_dict(trainer.sd_pipeline.denoiser, trainer.adapter_name),
    "curve": trainer.report.reward_curve,
    "evaluations": trainer.report.evaluations,
}
torch.save(result, folder / f"result_{trainer.accelerator.process_index}.pt")
