"""The body of a test in test_editing.py: epochs of edits by torchrun in two processes, or in the test's own."""

import sys
from pathlib import Path

import tiny
import torch
from PIL import Image

from trl_tafs.policy.lora import adapter_state_dict
from trl_tafs.rewards.pixel_faithfulness import PixelFaithfulness


def run(folder, batches, **changes):
    """Two epochs of two groups of 4 edits of FLUX.1-Kontext's twin: the rewards' curve and the weights."""
    import families  # after tiny, which says where its examples are

    pixels = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    rows = [{"prompt": "a red cat", "source_image": Image.fromarray(one)} for one in pixels]
    mine = families.ours(families.stock("flux-kontext"), "flux-kontext")
    settings = {"height": 16, "width": 16, "max_sequence_length": families.LENGTH, "num_generations": 4}
    settings |= {"sample_batch_size": 2, "train_batch_size": 2, "sample_num_batches_per_epoch": batches}
    settings |= {"accelerator_kwargs": {"cpu": True}, "prompt_cache_dir": str(folder / "prompts")} | changes
    trainer = tiny.trainer(mine, folder, reward=PixelFaithfulness(), prompt_function=rows, **settings)
    trainer.train()
    weights = adapter_state_dict(trainer.sd_pipeline.denoiser, trainer.policy.adapter_name)
    return {"curve": trainer.progress.reward_curve, "weights": weights, "world": trainer.accelerator.num_processes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(run(Path(sys.argv[1]), 2), Path(sys.argv[1]) / f"result_{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
