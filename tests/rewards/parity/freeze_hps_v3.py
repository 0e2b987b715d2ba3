"""Write hps_v3.json: the scores of the package hpsv3's own model and processing on the cases of cases.py.

    python tests/rewards/parity/freeze_hps_v3.py [--packages FOLDER] [--output FILE]

Installs hpsv3 1.0.0 and the transformers that it asks for into a temporary folder, unless FOLDER has them, and runs
itself there. The package's code is run as it is; what it imports for training alone is replaced by empty modules.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
PACKAGES = ["hpsv3==1.0.0", "transformers==4.45.2", "tokenizers==0.20.3", "huggingface_hub==0.26.5"]
TRAINING = ["pandas", "matplotlib", "matplotlib.pyplot", "matplotlib.patches", "torch.utils.tensorboard", "datasets"]
TRAINING += ["trl", "fire", "hpsv3.dataset.pairwise_dataset", "hpsv3.utils.training_utils", "hpsv3.utils.parser"]
TRAINING += ["hpsv3.train", "peft", "omegaconf", "megfile"]
TRAINING += [f"transformers.{part}" for part in ("trainer", "trainer_pt_utils", "trainer_callback", "training_args")]


class Empty(types.ModuleType):
    """A module that has every name; a class or a decorator is asked for at most."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def hps_v3() -> dict[str, list[float]]:
    """HPSv3's own model, instruction and image processing, on the CPU in float32."""
    import cases
    import cases_qwen
    import torch
    from PIL import Image
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    assert Qwen2VLForConditionalGeneration, "loaded before the empty modules"
    for name in TRAINING:
        sys.modules[name] = Empty(name)
    package = types.ModuleType("hpsv3")
    package.__path__ = [str(Path(entry) / "hpsv3") for entry in sys.path if (Path(entry) / "hpsv3").is_dir()]
    sys.modules["hpsv3"] = package
    from hpsv3.inference import HPSv3RewardInferencer
    from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT

    cases_qwen.Qwen2VLProcessor.tokenizer_class = "PreTrainedTokenizerFast"  # where Qwen2's own is expected
    processor = cases_qwen.processor()
    processor.tokenizer.padding_side = "right"
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [cases_qwen.REWARD]})
    token = processor.tokenizer.convert_tokens_to_ids([cases_qwen.REWARD])
    config = Qwen2VLConfig(**cases_qwen.TEXT, vision_config=cases_qwen.VISION_2, **cases_qwen.token_ids())
    config._attn_implementation = "sdpa"
    model = Qwen2VLRewardModelBT(
        config, output_dim=2, reward_token="special", special_token_ids=token, rm_head_type="ranknet"
    )
    model.resize_token_embeddings(len(processor.tokenizer))
    model.load_state_dict(cases_qwen.fill(model.state_dict()))
    inferencer = object.__new__(HPSv3RewardInferencer)
    inferencer.model, inferencer.processor, inferencer.device = model.eval(), processor, "cpu"
    inferencer.use_special_tokens, scores = True, {}
    for size in cases.SIZES:
        arrays = (cases.pictures(size) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        with torch.no_grad(), mock.patch("torch.autocast", lambda **options: torch.no_grad()):
            rewards = inferencer.reward([Image.fromarray(array) for array in arrays], cases.PROMPTS)
        scores[str(size)] = rewards[:, 0].tolist()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {"packages": PACKAGES, "hps_v3": scores, "shapes": shapes}


def main() -> None:
    """Install, start again with what was installed, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="a folder that has the packages")
    parser.add_argument("--output", type=Path, default=HERE / "hps_v3.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        args.output.write_text(json.dumps(hps_v3(), indent=1) + "\n")
        print(f"wrote {args.output}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.packages or Path(temporary)
        if args.packages is None:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            subprocess.run([*install, *PACKAGES], check=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(HERE)]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--inside", "--output", str(args.output)]
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
