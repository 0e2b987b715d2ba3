"""Write official.json: the scores of the official packages' own classes on the cases of cases.py.

    python tests/parity/freeze.py [--packages FOLDER] [--output FILE]

Installs hpsv2 and image-reward with --no-deps into a temporary folder, unless FOLDER has them. Their code is run as it
is; only names that transformers and timm have moved since are put back where it looks for them.
"""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import types
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import cases
from PIL import Image

PACKAGES = ["hpsv2==1.2.0", "image-reward==1.5"]


def install(folder: Path) -> None:
    """Fetch the packages; by uv where it is, else by pip."""
    uv = Path(sys.executable).with_name("uv")
    tool = [str(uv), "pip", "install", "--python", sys.executable] if uv.exists() else [
        sys.executable, "-m", "pip", "install"
    ]  # fmt: skip
    subprocess.run([*tool, "--quiet", "--no-deps", "--target", str(folder), *PACKAGES], check=True)


def bare_package(name: str, folder: Path) -> None:
    """A package without its `__init__`, which imports far more than the models."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def put_back_moved_names() -> None:
    """What ImageReward's BLIP imports from old places of transformers and timm."""
    import timm.layers
    import timm.models
    import transformers
    from transformers import modeling_utils, pytorch_utils, utils

    files = types.ModuleType("transformers.file_utils")
    files.ModelOutput = utils.ModelOutput
    sys.modules["transformers.file_utils"] = files
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        setattr(modeling_utils, name, getattr(pytorch_utils, name, None))
    modeling_utils.PreTrainedModel.get_head_mask = lambda self, mask, layers: [None] * layers
    lowest = torch.finfo(torch.float32).min
    modeling_utils.PreTrainedModel.invert_attention_mask = lambda self, mask: (1.0 - mask[:, None, None, :]) * lowest
    hub = types.ModuleType("timm.models.hub")
    hub.download_cached_file = None
    registry = types.ModuleType("timm.models.registry")
    registry.register_model = timm.models.register_model
    helpers = types.ModuleType("timm.models.helpers")
    helpers.named_apply, helpers.adapt_input_conv = timm.models.named_apply, timm.models.adapt_input_conv
    layers = types.ModuleType("timm.models.layers")
    layers.trunc_normal_, layers.DropPath = timm.layers.trunc_normal_, timm.layers.DropPath
    checkpoints = types.ModuleType("fairscale.nn.checkpoint.checkpoint_activations")  # only for training
    checkpoints.checkpoint_wrapper = None
    for module in (hub, registry, helpers, layers, checkpoints):
        sys.modules[module.__name__] = module
    transformers.logging.set_verbosity_error()


def as_pil(pictures: torch.Tensor) -> list[Image.Image]:
    """As the official code takes them."""
    return [Image.fromarray((p * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()) for p in pictures]


@torch.no_grad()
def hps(folder: Path) -> dict[str, list[float]]:
    """HPSv2's own model, transform and score."""
    bare_package("hpsv2", folder / "hpsv2")
    words = folder / "hpsv2" / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    if not words.exists():  # the wheel lacks it; it is the file of OpenAI's CLIP, which open_clip ships too
        shutil.copy(Path(find_spec("open_clip").origin).parent / words.name, words)
    clip = importlib.import_module("hpsv2.src.open_clip")
    with tempfile.TemporaryDirectory() as configs:
        (Path(configs) / "tiny-h.json").write_text(json.dumps(cases.CLIP))
        clip.add_model_config(configs)
    model, _, transform = clip.create_model_and_transforms("tiny-h", None, device="cpu", output_dict=True)
    model.load_state_dict(cases.fill(model.state_dict()))
    tokens, scores = clip.get_tokenizer("ViT-H-14")(cases.PROMPTS), {}
    for size in cases.SIZES:
        images = torch.stack([transform(image) for image in as_pil(cases.pictures(size))])
        output = model.eval()(images, tokens)
        scores[str(size)] = torch.diagonal(output["image_features"] @ output["text_features"].T).tolist()
    return scores


@torch.no_grad()
def image_reward(folder: Path) -> dict[str, list[float]]:
    """ImageReward's own ViT, BERT, head and transform, as its `score_gard` puts them together."""
    put_back_moved_names()
    for name in ("ImageReward", "ImageReward.models", "ImageReward.models.BLIP"):
        bare_package(name, folder / name.replace(".", "/"))
    vit = importlib.import_module("ImageReward.models.BLIP.vit")
    med = importlib.import_module("ImageReward.models.BLIP.med")
    official = importlib.import_module("ImageReward.ImageReward")
    from transformers import BertTokenizer

    class Tiny(official.ImageReward):
        def __init__(self):
            torch.nn.Module.__init__(self)
            config = med.BertConfig(**cases.BERT, add_cross_attention=True, is_decoder=False)
            config.encoder_width, config.fusion_layer = cases.VIT["embed_dim"], 0
            self.blip = torch.nn.Module()
            self.blip.visual_encoder = vit.VisionTransformer(**cases.VIT)
            med.BertModel.init_weights = lambda model: None  # all weights are set below
            self.blip.text_encoder = med.BertModel(config, add_pooling_layer=False)
            self.mlp = official.MLP(cases.BERT["hidden_size"])
            self.mean, self.std, self.device = 0.16717362830052426, 1.0333394966054072, "cpu"

    model = Tiny()
    model.load_state_dict(cases.fill(model.state_dict()))
    with tempfile.TemporaryDirectory() as words:
        tokenizer = BertTokenizer(str(cases.vocabulary(Path(words))))
    tokens = tokenizer(cases.PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    transform, scores = official._transform(cases.VIT["img_size"]), {}
    for size in cases.SIZES:
        images = torch.stack([transform(image) for image in as_pil(cases.pictures(size))])
        values = model.eval().score_gard(tokens["input_ids"], tokens["attention_mask"], images)
        scores[str(size)] = values.squeeze(-1).tolist()
    return scores


def main() -> None:
    """Install, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="a folder that has both packages")
    parser.add_argument("--output", type=Path, default=cases.FROZEN)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.packages or Path(temporary)
        if args.packages is None:
            install(folder)
        sys.path.insert(0, str(folder))
        result = {"packages": PACKAGES, "hps_v2": hps(folder), "image_reward": image_reward(folder)}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
