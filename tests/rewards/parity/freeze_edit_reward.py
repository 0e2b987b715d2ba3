"""Write edit_reward.json: the scores of TIGER-AI-Lab/EditReward's own model and processing on the cases of cases.py.

    python tests/rewards/parity/freeze_edit_reward.py CHECKOUT [--packages FOLDER] [--output FILE]

CHECKOUT is a checkout of its repository. Installs the transformers that it asks for into a temporary folder, unless
FOLDER has it, and runs itself there. Its code is run as it is; what it imports for training alone is replaced by empty
modules. An edit's source is the picture of the prompt before it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
PACKAGES = ["transformers==4.57.0", "tokenizers==0.22.1", "huggingface_hub==0.36.0"]


def edit_reward(checkout: Path) -> dict:
    """EditReward's own model with two heads, instructions and image processing, on the CPU in float32."""
    import cases
    import cases_qwen
    import torch
    from freeze_hps_v3 import TRAINING, Empty
    from PIL import Image
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLVideoProcessor

    assert Qwen2_5_VLForConditionalGeneration, "loaded before the empty modules"
    unused = ["dataset.pairwise_edit_dataset", "utils.training_utils", "utils.parser", "train_qwen2_5_edit"]
    for name in [*TRAINING, *(f"EditReward.{part}" for part in unused)]:
        sys.modules[name] = Empty(name)
    package = sys.modules["EditReward"] = Empty("EditReward")
    package.__path__ = [str(checkout / "EditReward")]
    from EditReward.inference_edit import EditRewardInferencer
    from EditReward.model.qwen2_5_vl_trainer import Qwen2_5_VLRewardModelBT_MultiHead

    cases_qwen.Qwen2VLProcessor.tokenizer_class = "PreTrainedTokenizerFast"  # where Qwen2's own is expected
    processor = cases_qwen.processor(video_processor=Qwen2VLVideoProcessor())
    processor.tokenizer.padding_side = "right"
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [cases_qwen.REWARD]})
    token = processor.tokenizer.convert_tokens_to_ids([cases_qwen.REWARD])
    ids = cases_qwen.token_ids()
    vocabulary = {name: ids.pop(name) for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    text = cases_qwen.TEXT | vocabulary
    config = Qwen2_5_VLConfig(text_config=text, vision_config=cases_qwen.VISION_2_5, **ids, **cases_qwen.TEXT)
    model = Qwen2_5_VLRewardModelBT_MultiHead(
        config,
        output_dim=2,
        reward_token="special",
        special_token_ids=token,
        rm_head_type="ranknet_multi_head",
        pooling_strategy="mean",
    )
    model.resize_token_embeddings(len(processor.tokenizer))
    model.load_state_dict(cases_qwen.fill(model.state_dict()))
    inferencer = object.__new__(EditRewardInferencer)
    inferencer.model, inferencer.processor, inferencer.device = model.eval(), processor, "cpu"
    inferencer.use_special_tokens, inferencer.rm_head_type, scores = True, "ranknet_multi_head", {}
    for size in cases.SIZES:
        arrays = (cases.pictures(size) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        images = [Image.fromarray(array) for array in arrays]
        with torch.no_grad(), mock.patch("torch.autocast", lambda **options: torch.no_grad()):
            rewards = inferencer.reward(cases.PROMPTS, images[-1:] + images[:-1], images)
        scores[str(size)] = rewards[:, 0].tolist()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {"packages": PACKAGES, "edit_reward": scores, "shapes": shapes}


def main() -> None:
    """Install, start again with what was installed, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of TIGER-AI-Lab/EditReward")
    parser.add_argument("--packages", type=Path, help="a folder that has the packages")
    parser.add_argument("--output", type=Path, default=HERE / "edit_reward.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        args.output.write_text(json.dumps(edit_reward(args.checkout), indent=1) + "\n")
        print(f"wrote {args.output}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.packages or Path(temporary)
        if args.packages is None:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            subprocess.run([*install, *PACKAGES], check=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(HERE)]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(args.checkout), "--inside", "--output", str(args.output)]
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
