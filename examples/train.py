"""Train any of the families with TAFS-GRPO, on prompts from a file, for any rewards; the model says which family it is.

FLUX.1-dev on eight GPUs, and as the paper trains it:

    accelerate launch --num_processes 8 examples/train.py --config examples/configs/flux1_dev_8x80gb.yaml
    accelerate launch --num_processes 8 examples/train.py --config examples/configs/flux1_dev_paper.yaml

One GPU of 24 GB, on prompts of your own (docs/recipes.md has all recipes; none was run at its size):

    accelerate launch examples/train.py --config examples/configs/flux2_klein_24gb.yaml --prompts prompts.txt
    accelerate launch examples/train.py --config examples/configs/qwen_image_24gb.yaml --prompts prompts.txt
    accelerate launch examples/train.py --config examples/configs/sana_24gb.yaml --prompts prompts.txt

It is `trl-tafs train` as a script that Accelerate can launch on several GPUs.
"""

import sys

from trl_tafs.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
