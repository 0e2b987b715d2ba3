"""CPU seconds of one thread for an image, of each reward at its real size, on random weights.

    python examples/reward_throughput.py [NAME ...] [--images 2] [--size 512]

Random weights cost what trained ones do; those of a reward that loads a file are written to a temporary folder first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from trl_tafs.rewards.loading import load_reward

PROMPT, ROW = (
    'a photo of a red dog, "Open"',
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]},
)


def clip_score(folder: Path):
    """ViT-L-14."""
    return load_reward("clip_score", {"pretrained": None})


def aesthetic(folder: Path):
    """ViT-L-14 and the MLP."""
    sizes = (768, 1024, 128, 64, 16, 1)
    head = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)))
    torch.save(head.state_dict(), folder / "aesthetic-model.pth")
    return load_reward("aesthetic", {"head": str(folder), "pretrained": None})


def hps_v2(folder: Path):
    """ViT-H-14; pickscore is as large."""
    import open_clip

    torch.save(open_clip.create_model("ViT-H-14").state_dict(), folder / "HPS_v2.1_compressed.pt")
    return load_reward("hps_v2", {"checkpoint": str(folder)})


def geneval(folder: Path):
    """Mask2Former with Swin-S, and ViT-L-14 for colours."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        image_size=384, embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=80)).save_pretrained(folder)
    return load_reward("geneval", {"detector": str(folder), "clip_pretrained": None})


def by_name(name: str):
    """A reward without weights of its own to make."""
    return lambda folder: load_reward(name)


MAKERS = {"clip_score": clip_score, "aesthetic": aesthetic, "hps_v2": hps_v2, "geneval": geneval}
MAKERS |= {name: by_name(name) for name in ("ocr", "jpeg_compressibility")}


def main() -> None:
    """Measure and print a line a reward."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MAKERS), help=f"of {', '.join(MAKERS)}")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.rand(args.images, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    for name in args.names:
        with tempfile.TemporaryDirectory() as folder:
            reward = MAKERS[name](Path(folder))
        batch = (images, [PROMPT] * args.images, [ROW] * args.images)
        start = time.process_time()
        reward(*batch)
        seconds = (time.process_time() - start) / args.images
        print(json.dumps({"reward": name, "cpu_seconds_an_image": round(seconds, 3)}), flush=True)


if __name__ == "__main__":
    main()
