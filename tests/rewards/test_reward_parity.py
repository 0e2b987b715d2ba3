"""Each reward against its official implementation, from the same weights on the same pictures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

from trl_tafs.rewards.aesthetic import Aesthetic
from trl_tafs.rewards.hps_v2 import HPSv2
from trl_tafs.rewards.image_reward import ImageReward, reward_head, transformers_names
from trl_tafs.rewards.pickscore import PickScore
from trl_tafs.rewards.preprocessing import resize

PARITY = Path(__file__).with_name("parity")
sys.path.insert(0, str(PARITY))

import cases  # noqa: E402

METADATA = [{}] * len(cases.PROMPTS)
SIZES = pytest.mark.parametrize("size", cases.SIZES, ids=str)
TINY_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
TINY_VISION |= {"image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny_open_clip(tmp_path_factory):
    """open_clip knows a tiny ViT-H; its weights by the formula."""
    path = tmp_path_factory.mktemp("open_clip") / "tiny-h.json"
    path.write_text(json.dumps(cases.CLIP))
    open_clip.add_model_config(path)
    return cases.fill(open_clip.create_model("tiny-h").state_dict())


def agrees(got, expected):
    """Within 1e-5 of the official score, resized pictures included."""
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(32, 32), (32, 51), (31, 29), (90, 128)], ids=str)
def test_resizing_is_pillows_to_the_bit(mode, target):
    generator = torch.Generator().manual_seed(0)
    noise = (torch.rand(2, 3, 48, 61, generator=generator) * 255).round() / 255
    arrays = (noise * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[mode]
    for array, got in zip(arrays, resize(noise, target, mode=mode), strict=True):
        expected = np.asarray(Image.fromarray(array).resize((target[1], target[0]), resample))
        assert np.array_equal((got * 255).round().permute(1, 2, 0).numpy(), expected)


# HPSv2 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hps(tiny_open_clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": tiny_open_clip}, path)
    return HPSv2(checkpoint=str(path.parent), model_name="tiny-h", device="cpu")


@SIZES
def test_hps_v2_is_the_official_one(hps, size):
    got = hps(cases.pictures(size), cases.PROMPTS, METADATA)
    agrees(got, cases.frozen("hps_v2")[str(size)])


def test_hps_v2_takes_the_file_of_its_version(hps, tiny_open_clip, tmp_path):
    torch.save(tiny_open_clip, tmp_path / "HPS_v2_compressed.pt")
    got = HPSv2("v2.0", str(tmp_path), "tiny-h", device="cpu")(cases.pictures((32, 32)), cases.PROMPTS, METADATA)
    torch.testing.assert_close(got, hps(cases.pictures((32, 32)), cases.PROMPTS, METADATA))
    with pytest.raises(ValueError, match="holds no HPS_v2.1_compressed.pt"):
        HPSv2(checkpoint=str(tmp_path), model_name="tiny-h")
    with pytest.raises(ValueError, match="version is 'v3'; use one of v2.0, v2.1"):
        HPSv2("v3")


# ImageReward ----------------------------------------------------------------------------------------------------


def official_image_reward_state():
    """A checkpoint with THUDM's names, in small: the ViT, the text encoder with cross-attention, the head."""
    width, text = cases.VIT["embed_dim"], cases.BERT["hidden_size"]
    vision = {"cls_token": (1, 1, width), "pos_embed": (1, 17, width), "norm": width}
    vision |= {"patch_embed.proj": (width, 3, 8, 8)}
    for i in range(cases.VIT["depth"]):
        vision |= {f"blocks.{i}.norm1": width, f"blocks.{i}.norm2": width}
        vision |= {f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width)}
        vision |= {f"blocks.{i}.mlp.fc1": (4 * width, width), f"blocks.{i}.mlp.fc2": (width, 4 * width)}
    layers = {"embeddings.word_embeddings": (64, text), "embeddings.position_embeddings": (64, text)}
    layers |= {"embeddings.LayerNorm": text}
    inner = cases.BERT["intermediate_size"]
    for i in range(cases.BERT["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        for kind, source in (("attention", text), ("crossattention", width)):
            layers |= {f"{at}.{kind}.self.query": (text, text), f"{at}.{kind}.output.dense": (text, text)}
            layers |= {f"{at}.{kind}.self.{part}": (text, source) for part in ("key", "value")}
            layers |= {f"{at}.{kind}.output.LayerNorm": text}
        layers |= {f"{at}.intermediate.dense": (inner, text), f"{at}.output.dense": (text, inner)}
        layers |= {f"{at}.output.LayerNorm": text}
    shapes = {f"blip.visual_encoder.{k}": v for k, v in vision.items()}
    shapes |= {f"blip.text_encoder.{k}": v for k, v in layers.items()}
    head = {name: tensor.shape for name, tensor in reward_head(text).state_dict().items()}
    state = {f"mlp.layers.{name}": cases.weight(f"mlp.layers.{name}", tuple(shape)) for name, shape in head.items()}
    for name, shape in shapes.items():
        if name.endswith(("cls_token", "pos_embed")):
            state[name] = cases.weight(name, shape)
            continue
        shape = (shape,) if isinstance(shape, int) else shape
        state[f"{name}.weight"] = cases.weight(f"{name}.weight", shape)
        if "embeddings.word" not in name and "embeddings.position" not in name:
            state[f"{name}.bias"] = cases.weight(f"{name}.bias", shape[:1])
    unused = {
        "blip.text_encoder.embeddings.position_ids": torch.arange(64)[None],
        "blip.vision_proj.bias": torch.ones(1),
    }
    return state | unused


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(official_image_reward_state(), folder / "ImageReward.pt")
    BertTokenizer(str(cases.vocabulary(folder))).save_pretrained(folder)
    vision = TINY_VISION
    text = cases.BERT | {"encoder_hidden_size": 32}
    return ImageReward(str(folder), str(folder), vision_config=vision, text_config=text, device="cpu")


@SIZES
def test_image_reward_is_the_official_one(image_reward, size):
    got = image_reward(cases.pictures(size), cases.PROMPTS, METADATA)
    agrees(got, cases.frozen("image_reward")[str(size)])


def test_image_reward_maps_every_official_name():
    parts = transformers_names(official_image_reward_state())
    assert len(parts["vision"]) == 2 * 12 + 2 + 4 and len(parts["head"]) == 10
    assert "encoder.layers.1.self_attn.qkv.bias" in parts["vision"] and "post_layernorm.weight" in parts["vision"]
    with pytest.raises(ValueError, match="holds nothing of ImageReward's vision, text, head"):
        transformers_names({"a": torch.ones(1)})


def test_image_reward_reads_at_most_35_tokens_and_the_picture(image_reward):
    picture = cases.pictures((32, 32))[:1].repeat(2, 1, 1, 1)
    long = " ".join(["cat"] * 33)
    cut, longer = image_reward(picture, [long, f"{long} red bird"], [{}] * 2)
    assert cut == longer
    other = image_reward(1 - picture, [long, long], [{}] * 2)
    assert (other - cut).abs().min() > 1e-3


# PickScore ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny transformers CLIP with the words of OpenAI's."""
    folder = tmp_path_factory.mktemp("pickscore")
    text = {k: v for k, v in TINY_VISION.items() if k not in ("image_size", "patch_size")}
    text |= {"max_position_embeddings": 24, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=TINY_VISION, projection_dim=16))
    model.load_state_dict(cases.fill(model.state_dict()))
    model.save_pretrained(folder)
    words = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    merges = [" ".join(pair) for pair in words.bpe_ranks]
    (folder / "vocab.json").write_text(json.dumps({names.get(k, k): v for k, v in words.encoder.items()}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


@torch.no_grad()
def official_pickscore(folder, pictures):
    """As the model card says: the processor's padding, normalised features, exp(logit_scale) times their product."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    by_pillow = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = by_pillow(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    arrays = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pixels = processor(images=[Image.fromarray(array) for array in arrays], return_tensors="pt")["pixel_values"]
    tokens = tokenizer(cases.PROMPTS, padding=True, truncation=True, max_length=24, return_tensors="pt")
    output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    return output.logits_per_image.diagonal()


@SIZES
def test_pickscore_is_the_official_one(clip_folder, size):
    expected = official_pickscore(clip_folder, cases.pictures(size))
    reward = PickScore(str(clip_folder), device="cpu")
    got = reward(cases.pictures(size), cases.PROMPTS, METADATA)
    assert reward.model.logit_scale.exp() > 10
    scale = reward.model.logit_scale.exp()
    agrees(got / scale, expected / scale)
    plain = PickScore(str(clip_folder), logit_scale=False, device="cpu")
    torch.testing.assert_close(scale * plain(cases.pictures(size), cases.PROMPTS, METADATA), got)


# The aesthetic predictor ----------------------------------------------------------------------------------------


class OfficialHead(nn.Module):
    """The improved predictor's layout: linear layers with dropout between, no activation."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_aesthetic_is_the_head_on_the_normalised_embedding(tiny_open_clip, tmp_path, kind):
    head = OfficialHead(16) if kind == "mlp" else nn.Linear(16, 1)
    head.load_state_dict(cases.fill(head.state_dict()))
    torch.save(head.state_dict(), tmp_path / "aesthetic-model.pth")
    torch.save(tiny_open_clip, tmp_path / "clip.pt")
    options = {"model_name": "tiny-h", "pretrained": str(tmp_path / "clip.pt"), "device": "cpu"}
    pictures = cases.pictures((32, 32))
    got = Aesthetic(str(tmp_path), **options)(pictures, cases.PROMPTS, METADATA)
    model, _, transform = open_clip.create_model_and_transforms("tiny-h", pretrained=str(tmp_path / "clip.pt"))
    arrays = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        embedding = model.eval().encode_image(torch.stack([transform(Image.fromarray(array)) for array in arrays]))
        embedding = embedding / embedding.norm(dim=-1, keepdim=True)
        expected = (head.layers if kind == "mlp" else head).eval()(embedding).squeeze(-1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert got.unique().numel() == 3
    torch.save({"weight": torch.ones(3, 16), "bias": torch.ones(3)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="ends in no single number"):
        Aesthetic(str(tmp_path / "wrong.pth"), **options)


# All of them ----------------------------------------------------------------------------------------------------


def test_a_models_batches_dtype_and_place_change_nothing_that_matters(clip_folder):
    pictures, n = cases.pictures((32, 32)), len(cases.PROMPTS)
    whole = PickScore(str(clip_folder), device="cpu")(pictures, cases.PROMPTS, METADATA)
    options = {"device": "cpu", "batch_size": 2, "offload": True}
    reward = PickScore(str(clip_folder), **options)
    torch.testing.assert_close(reward(pictures, cases.PROMPTS, METADATA), whole)
    half = PickScore(str(clip_folder), dtype="bfloat16", device="cpu")(pictures, cases.PROMPTS, METADATA)
    assert half.dtype == torch.float32 and whole.shape == (n,)
    torch.testing.assert_close(half, whole, rtol=0.1, atol=0.5)
    assert not any(p.requires_grad for p in reward.model.parameters()) and not reward.model.training
    with pytest.raises(ValueError, match="dtype is 'int8'; use float32"):
        PickScore(str(clip_folder), dtype="int8")


@pytest.mark.slow
def test_the_frozen_numbers_are_those_of_the_official_packages(tmp_path):
    output = tmp_path / "official.json"
    command = [sys.executable, str(PARITY / "freeze.py"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "CalledProcessError" in done.stderr:
        pytest.skip("the official packages can't be installed here")
    assert done.returncode == 0, done.stderr
    fresh, frozen = json.loads(output.read_text()), json.loads(cases.FROZEN.read_text())
    for name in ("hps_v2", "image_reward"):
        for size, scores in frozen[name].items():
            assert fresh[name][size] == pytest.approx(scores, abs=1e-5)
