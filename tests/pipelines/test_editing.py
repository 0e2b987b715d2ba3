"""Prompts with source pictures: what a family edits is what the stock pipeline edits, bit for bit."""

import json
import os
import pickle
import subprocess
import sys

import datasets
import editing_run
import families
import pytest
import tiny
import torch
from datasets import Dataset
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from families import FAMILIES
from loopback import LIMIT, serving
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLVideoProcessor

import trl_tafs
from trl_tafs.cli.sample import _draw, sampling_parser
from trl_tafs.method.kernels import Annealed
from trl_tafs.method.objectives import ClippedObjective
from trl_tafs.pipelines.pictures import Picture, PicturedPrompt
from trl_tafs.prompts.encoder import PromptEncoder
from trl_tafs.prompts.sets import load_prompts
from trl_tafs.prompts.source import PromptSource
from trl_tafs.rewards import RewardRefused
from trl_tafs.rewards.pixel_faithfulness import PixelFaithfulness
from trl_tafs.rewards.remote import RemoteReward
from trl_tafs.rewards.server import make_app

sys.path.insert(0, str(tiny.ROOT / "tests" / "rewards" / "parity"))

import cases_qwen  # noqa: E402

PROMPTS = ["a photo of red cat", "two blue dog"]


def picture(seed, size=(24, 16)):
    """A picture (width, height) of noise."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def pictured(several):
    """The prompts with pictures each."""
    return [PicturedPrompt(text, map(Picture, own)) for text, own in zip(PROMPTS, several, strict=True)]


# How each stock pipeline is given the pictures of two prompts: its own for each, or the same for both.
EDITORS = {
    "flux-kontext": [[picture(0)], [picture(1)]],
    "flux2": [[picture(0, (64, 64)), picture(1, (64, 98))]] * 2,
    "flux2-klein": [[picture(2, (70, 64))]] * 2,
}


def call_image(name, several):
    return [own[0] for own in several] if name == "flux-kontext" else list(several[0])


CASES = [(name, g) for name in EDITORS for g in (1.0, FAMILIES[name].guidance) if g is not None]


@pytest.mark.parametrize(("name", "guidance"), CASES)
def test_an_edit_is_what_the_stock_pipeline_edits(name, guidance):
    mine, several = families.ours(families.stock(name), name), EDITORS[name]
    height, width = FAMILIES[name].wide
    x = torch.randn(2, *mine.latent_shape(height, width), generator=torch.Generator().manual_seed(1))
    options = {"height": height, "width": width, "guidance_scale": guidance, "latents": x}
    options["max_sequence_length"] = families.LENGTH
    torch.manual_seed(3)
    ours = mine.annealed_rollout(pictured(several), **options).final
    torch.manual_seed(3)
    without = mine.annealed_rollout(PROMPTS, **options).final
    pipe = families.stock(name)
    pipe.scheduler = mine.annealed_scheduler()
    arguments = mine.call_arguments(4, guidance) | mine.size_arguments(height, width)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [""] * 2
    latents = x.permute(0, 3, 1, 2) if hasattr(mine, "_patchify_latents") else x.flatten(1, 2)
    torch.manual_seed(3)
    theirs = pipe(
        image=call_image(name, several),
        prompt=list(PROMPTS),
        height=height,
        width=width,
        latents=latents.clone(),
        output_type="pt",
        max_sequence_length=families.LENGTH,
        **arguments,
    ).images
    assert torch.equal(mine.decode_latents(ours), theirs)
    assert (ours - without).abs().max() > 1e-3, "the picture says nothing"


@pytest.mark.parametrize("name", EDITORS)
def test_an_edit_s_ratio_is_exactly_one_on_policy(name):
    mine = families.ours(families.stock(name), name)
    encode = PromptEncoder(mine, torch.device("cpu"), max_sequence_length=families.LENGTH)
    conditioning = encode(pictured(EDITORS[name]))
    generator = torch.Generator().manual_seed(1)
    rollout = mine.annealed_rollout(conditioning=conditioning, height=16, width=16, generator=generator)
    rows = ClippedObjective(Annealed(), 0.1).items(rollout, torch.ones_like(rollout.log_probs))
    for step in range(3):
        part = rows[step::3]
        assert torch.equal(mine.log_prob(part, conditioning[part.sample]), part.old_log_prob)


# Qwen-Image-Edit -------------------------------------------------------------------------------------------------


def qwen_edit(kind, monkeypatch):
    """A tiny Qwen-Image-Edit, stock, with a text encoder that sees; its megapixel is 32 x 32."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        real = module.calculate_dimensions
        small = lambda area, ratio, real=real: real(max(area // 1024, 1024), ratio)  # noqa: E731
        monkeypatch.setattr(module, "calculate_dimensions", small)
    torch.manual_seed(0)
    base = families.stock("qwen-image")
    ids = cases_qwen.token_ids()
    vocabulary = {name: ids.pop(name) for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    text = cases_qwen.TEXT | vocabulary
    config = Qwen2_5_VLConfig(text_config=text, vision_config=cases_qwen.VISION_2_5, **ids)
    processor = cases_qwen.processor(video_processor=Qwen2VLVideoProcessor())
    transformer = type(base.transformer).from_config(dict(base.transformer.config) | {"joint_attention_dim": 32})
    for parameter in transformer.parameters():
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    pipe = kind(
        scheduler=base.scheduler,
        vae=base.vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=transformer.eval().requires_grad_(False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize(
    ("kind", "several"),
    [
        (QwenImageEditPipeline, [picture(0)]),
        (QwenImageEditPlusPipeline, [picture(0), picture(1, (40, 20))]),
    ],
    ids=["edit", "plus"],
)
def test_qwen_image_edits_as_the_stock_pipeline_does(kind, several, guidance, monkeypatch):
    pipe = qwen_edit(kind, monkeypatch)
    mine = trl_tafs.AutoTAFSPipeline.from_pipe(pipe)
    prompts = [PicturedPrompt(PROMPTS[0], map(Picture, several))]
    x = torch.randn(1, *mine.latent_shape(16, 24), generator=torch.Generator().manual_seed(1))
    options = {"height": 16, "width": 24, "guidance_scale": guidance, "latents": x}
    torch.manual_seed(3)
    ours = mine.annealed_rollout(prompts, **options).final
    pipe.scheduler = mine.annealed_scheduler()
    arguments = mine.call_arguments(4, guidance) | {"height": 16, "width": 24, "output_type": "pt"}
    images = several[0] if kind is QwenImageEditPipeline else several  # a list would reach Edit's text encoder as it is
    torch.manual_seed(3)
    theirs = pipe(image=images, prompt=PROMPTS[0], latents=x.flatten(1, 2), **arguments).images
    assert torch.equal(mine.decode_latents(ours), theirs)
    swapped = [PicturedPrompt(str(p), [Picture(picture(9))] * len(p.pictures)) for p in prompts]
    torch.manual_seed(3)
    assert (mine.annealed_rollout(swapped, **options).final - ours).abs().max() > 1e-3, "the picture says nothing"
    with pytest.raises(ValueError, match=f"the prompt 'a' has no source_image, and {kind.__name__} edits pictures"):
        mine.encode_conditioning(["a"])


@pytest.mark.parametrize("kind", [QwenImageEditPipeline, QwenImageEditPlusPipeline])
def test_qwen_image_s_edits_are_trained(kind, tmp_path, monkeypatch):
    pipe = qwen_edit(kind, monkeypatch)
    several = kind is QwenImageEditPlusPipeline
    rows = [
        {"prompt": text, "source_images": [picture(i), picture(i + 2)]}
        if several
        else (text, {"source_image": picture(i)})
        for i, text in enumerate(PROMPTS)
    ]
    settings = {"height": 16, "width": 16, "num_generations": 4, "sample_batch_size": 4, "train_batch_size": 4}
    mine = trl_tafs.AutoTAFSPipeline.from_pipe(pipe)
    trainer = tiny.trainer(mine, tmp_path, PixelFaithfulness(), rows, num_epochs=1, **settings)
    trainer.train()
    lora = {n: p for n, p in mine.transformer.named_parameters() if "lora_B" in n}
    assert any(weight.abs().sum() > 0 for weight in lora.values())
    mine.transformer.delete_adapters("default")
    qwen_edit(kind, monkeypatch).load_lora_weights(tmp_path / "adapter")
    told = "image=[load_image(" if several else "image=load_image("
    assert told in (tmp_path / "adapter" / "README.md").read_text()


# Training --------------------------------------------------------------------------------------------------------


def rows(folder, count=2, **changes):
    """Prompts with a picture each, in files."""
    made = []
    for i in range(count):
        picture(i, (16, 16)).save(folder / f"{i}.png")
        made.append({"prompt": PROMPTS[0], "source_image": str(folder / f"{i}.png"), "number": i} | changes)
    return made


def faithful(images, prompts, metadata):
    """The package's reward, after a look at what it is given."""
    assert {type(prompt) for prompt in prompts} == {str} and all(row["source_image"].mode == "RGB" for row in metadata)
    return PixelFaithfulness()(images, prompts, metadata)


def editing_trainer(folder, prompts, **changes):
    mine = families.ours(families.stock("flux-kontext"), "flux-kontext")
    settings = {"height": 16, "width": 16, "max_sequence_length": families.LENGTH, "num_generations": 4}
    settings |= {"sample_batch_size": 4, "train_batch_size": 4, "train_timestep_fraction": 1.0}
    return tiny.trainer(mine, folder, reward=faithful, prompt_function=prompts, **(settings | changes))


def trained(trainer):
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.sd_pipeline.transformer.named_parameters() if "lora_" in n}


def test_an_edit_is_trained_resumed_and_sees_the_picture_of_its_prompt(tmp_path):
    made = rows(tmp_path)
    whole = trained(editing_trainer(tmp_path / "whole", made))
    first = editing_trainer(tmp_path / "half", made, num_epochs=1)
    trained(first)
    rest = editing_trainer(tmp_path / "half", made, resume_from="auto")
    assert all(torch.equal(weight, whole[name]) for name, weight in trained(rest).items())
    assert any(weight.abs().sum() > 0 for name, weight in whole.items() if "lora_B" in name)
    swapped = [row | {"source_image": other["source_image"]} for row, other in zip(made, made[::-1], strict=True)]
    other = trained(editing_trainer(tmp_path / "swapped", swapped))
    assert any(not torch.equal(weight, whole[name]) for name, weight in other.items())
    card = (tmp_path / "whole" / "adapter" / "README.md").read_text()
    assert "| prompt | source | before | after |" in card and "![source](images/source_0.png)" in card
    assert 'image=load_image("images/source_0.png")' in card and "max_area=256" in card
    assert Image.open(tmp_path / "whole" / "adapter" / "images" / "source_0.png").size[0] >= 16


def test_a_cached_edit_is_known_by_its_picture_s_content(tmp_path):
    mine = families.ours(families.stock("flux-kontext"), "flux-kontext")
    options = {"max_sequence_length": families.LENGTH, "cache_dir": tmp_path / "cache"}
    encode = PromptEncoder(mine, torch.device("cpu"), **options)
    picture(0).save(tmp_path / "a.png")
    picture(0).save(tmp_path / "b.bmp")
    same = [PicturedPrompt("a", [Picture(tmp_path / name)]) for name in ("a.png", "b.bmp")]
    other = PicturedPrompt("a", [Picture(picture(1))])
    encode.prepare([*same, other, "a"])
    assert len(list((tmp_path / "cache").iterdir())) == 3 and same[0] == same[1] != other != "a"
    encoded = encode([same[0], other])
    assert torch.equal(encoded.positive.text[0], encoded.positive.text[1])
    assert not torch.equal(encoded.positive.pictures[0], encoded.positive.pictures[1])
    for component in ("text_encoder", "text_encoder_2"):
        mine.register_modules(**{component: None})
    again = PromptEncoder(mine, torch.device("cpu"), **options)([same[1], other])
    assert torch.equal(again.positive.pictures, encoded.positive.pictures)
    assert again.positive.picture_grids == encoded.positive.picture_grids == ((4, 6),)


def test_the_ways_to_give_a_picture(tmp_path):
    image = picture(0)
    image.save(tmp_path / "a.png")
    stored = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    given = [image, str(tmp_path / "a.png"), tmp_path / "a.png", stored]
    found = [PromptSource([{"prompt": "a", "source_image": one}]).groups(0, 1)[0] for one in given]
    assert {prompt.digest for prompt, _ in found} == {Picture(image).digest}
    assert all(row["source_image"].tobytes() == image.tobytes() for _, row in found)
    several = PromptSource([("a", {"source_images": [image, picture(1)]})]).groups(0, 1)[0]
    assert len(several[0].pictures) == 2 and [type(one) for one in several[1]["source_images"]] == [Image.Image] * 2
    rgba = image.convert("RGBA")
    assert Picture(rgba).digest == Picture(image).digest and Picture(rgba).image().mode == "RGB"
    dataset = Dataset.from_list([{"prompt": "a", "source_image": stored}])
    for features in (dataset, dataset.cast_column("source_image", datasets.Image())):
        source = PromptSource(features)
        assert source.names_pictures and source.known()[0] == found[0][0] == source.groups(0, 1)[0][0]
    copied = pickle.loads(pickle.dumps(found[0][0]))
    assert copied == found[0][0] and copied.pictures[0].digest == Picture(image).digest
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "source_image": "a.png"}))
    assert PromptSource(load_prompts(str(tmp_path / "rows.jsonl"))).groups(0, 1)[0][0] == found[0][0]


def test_bad_pictures_are_one_line_before_anything_is_drawn(tmp_path):
    made = rows(tmp_path)
    picture(3, (32, 16)).save(tmp_path / "wide.png")
    (tmp_path / "torn.png").write_bytes(b"no picture")
    for changed, told in (
        ({"source_image": str(tmp_path / "gone.png")}, "prompts, row 1: the source picture .*gone.png can't be read"),
        ({"source_image": str(tmp_path / "torn.png")}, "prompts, row 1: the source picture .*torn.png can't be read"),
        ({"source_image": str(tmp_path / "wide.png")}, "row 1 has source pictures of 16 x 32 pixels, row 0 of 16 x 16"),
        ({"source_image": 7}, "prompts, row 1: a source picture is int; give a path or a PIL image"),
        ({"source_image": None}, "prompts, row 1 has source pictures of none pixels, row 0 of 16 x 16"),
        ({"source_images": [picture(0)]}, "row 1: a prompt has both source_image and source_images; give one"),
        ({"source_image": None, "source_images": [picture(0)] * 2}, "row 1 has 2 source pictures, and .* takes 1"),
        ({"source_image": None, "source_images": "a.png"}, "source_images is str; give a list of pictures"),
    ):
        with pytest.raises(ValueError, match=told):
            editing_trainer(tmp_path / "run", [made[0], made[1] | changed])
    flux = families.ours(families.stock("flux-dev"), "flux-dev")
    with pytest.raises(ValueError, match="prompts, row 0 has a source picture, and FluxPipeline edits none; take a"):
        tiny.trainer(flux, tmp_path / "run", prompt_function=made, height=16, width=16)
    with pytest.raises(ValueError, match="the prompt 'a' with 1 picture .* and FluxPipeline edits none"):
        flux.encode_conditioning([PicturedPrompt("a", [Picture(picture(0))])])
    with pytest.raises(ValueError, match="row 0 .*: reward 'pixel_faithfulness' says .* compares with a source"):
        tiny.trainer(flux, tmp_path / "run", reward=PixelFaithfulness(), prompt_function=["a"], height=16, width=16)
    assert not (tmp_path / "run" / "checkpoints").exists()
    kontext = families.ours(families.stock("flux-kontext"), "flux-kontext")
    with pytest.raises(ValueError, match="source pictures of other sizes .* can't be one batch"):
        PromptEncoder(kontext, torch.device("cpu"), max_sequence_length=families.LENGTH)(
            [PicturedPrompt("a", [Picture(picture(0))]), PicturedPrompt("a", [Picture(picture(0, (16, 16)))])]
        )


# The reward ------------------------------------------------------------------------------------------------------


def test_pixel_faithfulness_is_one_minus_the_mean_difference():
    source = Image.new("RGB", (8, 8), (255, 0, 0))
    images = torch.zeros(3, 3, 8, 8)
    images[0, 0] = 1  # the source itself
    images[2, 0, :, :4] = 1  # its left half
    half = torch.zeros(8, 8)
    half[:, 4:] = 1
    metadata = [{"source_image": source}] * 2 + [{"source_images": [source], "edit_mask": half}]
    assert PixelFaithfulness()(images, ["a"] * 3, metadata).tolist() == pytest.approx([1.0, 2 / 3, 1.0])
    assert PixelFaithfulness()(images[2:], ["a"], [{"source_image": source}]).item() == pytest.approx(1 - 1 / 6)
    assert PixelFaithfulness()(images[:1], ["a"], [{"source_image": source, "edit_mask": torch.ones(8, 8)}]).isnan()
    larger = source.resize((16, 24))
    assert PixelFaithfulness(blur=3)(images[:1], ["a"], [{"source_image": larger}]).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="blur is 2; use an odd number"):
        PixelFaithfulness(blur=2)


# Evaluation ------------------------------------------------------------------------------------------------------


def test_an_evaluation_shows_the_source_and_goes_on_from_what_is_there(tmp_path):
    mine = families.ours(families.stock("flux-kontext"), "flux-kontext")
    options = {"num_steps": (2,), "sizes": [(16, 16)], "max_sequence_length": families.LENGTH, "batch_size": 2}
    results = trl_tafs.evaluate({"base": mine}, rows(tmp_path), PixelFaithfulness(), tmp_path / "out", **options)
    assert 0 < results.rows[0].metrics["pixel_faithfulness"].mean < 1
    again = trl_tafs.evaluate({"base": mine}, rows(tmp_path), PixelFaithfulness(), tmp_path / "out", **options)
    assert again.rows[0].metrics == results.rows[0].metrics
    with pytest.raises(ValueError, match="holds an evaluation with"):
        trl_tafs.evaluate({"base": mine}, rows(tmp_path)[::-1], PixelFaithfulness(), tmp_path / "out", **options)


@pytest.mark.slow
def test_two_processes_edit_as_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    paths = os.pathsep.join([str(tiny.ROOT / "tests"), str(tiny.ROOT)])
    (tmp_path / "two").mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "1"}
    script = [str(tiny.ROOT / "tests" / "editing_run.py"), str(tmp_path / "two")]
    done = subprocess.run([*command, *script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / "two" / f"result_{rank}.pt", weights_only=False) for rank in range(2))
    one = editing_run.run(tmp_path / "one", 4)
    assert (first["world"], one["world"]) == (2, 1)
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
    assert [r for _, r in first["curve"]] == pytest.approx([r for _, r in one["curve"]], abs=1e-5)
    assert len(list((tmp_path / "two" / "prompts").iterdir())) == 2, "each process encoded its share"


def test_a_served_reward_sees_the_source_and_the_command_edits(tmp_path):
    source, images = picture(0, (16, 16)), torch.rand(2, 3, 16, 16)
    metadata = [{"source_image": source}, {"source_images": [source], "note": {"png_base64": 1, "more": 2}}]
    with serving(make_app("pixel_faithfulness", PixelFaithfulness())) as url:
        remote = RemoteReward(url, max_retries=0, timeout=LIMIT, format="raw")
        here = PixelFaithfulness()(images, ["a"] * 2, metadata).double()
        torch.testing.assert_close(remote(images, ["a"] * 2, metadata), here)
        torn = {"png_base64": "bm8="}
        with pytest.raises(RewardRefused, match="a picture among the metadata can't be decoded"):
            remote(images[:1], ["a"], [{"source_image": torn}])
    source.save(tmp_path / "a.png")
    options = ["none", "--pretrained_model", "base", "--height", "16", "--width", "16", "--max_sequence_length", "8"]
    drawn, edit = [], ["--image", str(tmp_path / "a.png")]
    for name, more in (("flux-kontext", []), ("flux-kontext", edit), ("longcat-image", [])):
        mine = families.ours(families.stock(name), name)
        drawn.append(_draw(mine, sampling_parser().parse_args([*options, "--prompt", "a", "two red dog", *more])))
    assert all(images.shape == (2, 3, 16, 16) for images in drawn) and not torch.equal(drawn[0], drawn[1])
    with pytest.raises(ValueError, match="--image has a source picture, and LongCatImagePipeline edits none"):
        _draw(mine, sampling_parser().parse_args([*options, "--prompt", "a", *edit]))
