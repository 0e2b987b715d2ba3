"""Rewards by vision-language models: HPSv3 as its official code scores, VQAScore, GenEval 2 and UnifiedReward 2.0."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from loopback import serving
from PIL import Image
from safetensors.torch import save_file
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_tafs.prompts.source import PromptSource
from trl_tafs.rewards import RewardError
from trl_tafs.rewards.edit_reward import EditReward
from trl_tafs.rewards.geneval2 import GenEval2, accepted
from trl_tafs.rewards.hps_v3 import CHECKPOINT, HPSv3
from trl_tafs.rewards.loading import evaluation_options, load_reward
from trl_tafs.rewards.unified_reward import UnifiedReward
from trl_tafs.rewards.vision_language import smart_size
from trl_tafs.rewards.vqa_score import VQAScore

PARITY = Path(__file__).with_name("parity")
sys.path.insert(0, str(PARITY))

import cases  # noqa: E402
import cases_qwen  # noqa: E402

METADATA = [{}] * len(cases.PROMPTS)
SIZES = pytest.mark.parametrize("size", cases.SIZES, ids=str)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def frozen_v3():
    return json.loads((PARITY / "hps_v3.json").read_text())


@pytest.fixture(scope="module")
def hps_v3(frozen_v3, tmp_path_factory):
    folder = cases_qwen.save(tmp_path_factory.mktemp("qwen2_vl"))
    state = {name: torch.zeros(shape) for name, shape in frozen_v3["shapes"].items()}
    save_file(cases_qwen.fill(state), folder / CHECKPOINT)
    return HPSv3(str(folder), str(folder), device="cpu", dtype="float32")


@SIZES
def test_hps_v3_is_the_official_one(hps_v3, frozen_v3, size):
    got = hps_v3(cases.pictures(size), cases.PROMPTS, METADATA)
    torch.testing.assert_close(got, torch.tensor(frozen_v3["hps_v3"][str(size)]), rtol=0, atol=1e-5)
    assert got.unique().numel() == len(got)


def test_hps_v3_s_scores_are_those_of_each_image_alone(hps_v3):
    pictures = cases.pictures((32, 32))
    together = hps_v3(pictures, cases.PROMPTS, METADATA)
    alone = torch.cat([hps_v3(pictures[i : i + 1], cases.PROMPTS[i : i + 1], [{}]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    marked = [f"{prompt}<|Reward|>" for prompt in cases.PROMPTS]  # the token isn't a prompt's to give
    torch.testing.assert_close(hps_v3(pictures, marked, METADATA), together, rtol=0, atol=1e-5)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, frozen_v3):
    folder = cases_qwen.save(tmp_path)
    state = {name: torch.zeros(shape) for name, shape in frozen_v3["shapes"].items() if "visual" not in name}
    save_file(cases_qwen.fill(state), folder / CHECKPOINT)
    with pytest.raises(ValueError, match=r"the checkpoint isn't of .*missing \['visual"):
        HPSv3(str(folder), str(folder), device="cpu")
    with pytest.raises(ValueError, match="holds no HPSv3.safetensors"):
        HPSv3(str(tmp_path / "nothing" if (tmp_path / "nothing").mkdir() else tmp_path / "nothing"), str(folder))


def test_images_are_resized_as_qwen_resizes_them():
    assert smart_size(512, 512, 28, 256 * 784, 256 * 784) == (448, 448)
    assert smart_size(32, 32, 28, 256 * 784, 256 * 784) == (448, 448)
    assert smart_size(40, 64, 28, 4 * 784, 16384 * 784) == (56, 84)  # 4 tokens at least
    assert smart_size(1024, 768, 28, 4 * 784, 16384 * 784) == (1036, 756)  # half to even, as Python rounds
    with pytest.raises(ValueError, match="5000 x 10 is longer than 200 times"):
        smart_size(5000, 10, 28, 1, 10**9)


# EditReward ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen_edit():
    return json.loads((PARITY / "edit_reward.json").read_text())


@pytest.fixture(scope="module")
def edit_reward(frozen_edit, tmp_path_factory):
    folder = cases_qwen.save(tmp_path_factory.mktemp("edit_reward"), "qwen2_5_vl")
    state = {name: torch.zeros(shape) for name, shape in frozen_edit["shapes"].items()}
    save_file(cases_qwen.fill(state), folder / "model.safetensors")
    return EditReward(str(folder), str(folder), device="cpu", dtype="float32")


def sources(pictures):
    """An edit's source is the picture of the prompt before it."""
    arrays = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [{"source_image": Image.fromarray(arrays[i - 1])} for i in range(len(arrays))]


@SIZES
def test_edit_reward_is_the_official_one(edit_reward, frozen_edit, size):
    pictures = cases.pictures(size)
    got = edit_reward(pictures, cases.PROMPTS, sources(pictures))
    torch.testing.assert_close(got, torch.tensor(frozen_edit["edit_reward"][str(size)]), rtol=0, atol=1e-5)
    assert got.unique().numel() == len(got)


def test_edit_reward_s_heads_and_sources(edit_reward):
    pictures = cases.pictures((32, 32))
    whole, heads = edit_reward(pictures, cases.PROMPTS, sources(pictures)), edit_reward.names
    parts = []
    for name in heads:
        edit_reward.names = (name,)
        parts.append(edit_reward(pictures, cases.PROMPTS, sources(pictures)))
    edit_reward.names = heads
    torch.testing.assert_close(torch.stack(parts).mean(0), whole)
    assert not torch.equal(*parts)
    assert not torch.equal(edit_reward(pictures, cases.PROMPTS, sources(pictures.flip(0))), whole)
    with pytest.raises(ValueError, match="edit_reward compares with a source picture, and there is no source_image"):
        edit_reward(pictures, cases.PROMPTS, METADATA)
    with pytest.raises(ValueError, match="edit_reward needs checkpoint: a folder or a repository"):
        load_reward("edit_reward")
    with pytest.raises(ValueError, match="heads is 'beauty'; use following or quality, or both"):
        EditReward(heads="beauty")


# VQAScore ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen2_5(tmp_path_factory):
    folder = cases_qwen.save(tmp_path_factory.mktemp("qwen2_5_vl"), "qwen2_5_vl")
    from transformers import AutoConfig

    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    model.load_state_dict(cases.fill(model.state_dict()))
    model.generation_config.repetition_penalty = 1.05  # as Qwen2.5-VL's checkpoints have it
    model.save_pretrained(folder)
    cases_qwen.processor(video_processor=AutoProcessor.from_pretrained(folder).video_processor).save_pretrained(folder)
    return folder


@SIZES
def test_vqa_score_is_the_probability_of_yes(qwen2_5, size):
    """By hand, one image at a time, from the model's logits: t2v_metrics' formula."""
    reward = VQAScore(str(qwen2_5), device="cpu", dtype="float32")
    pictures = cases.pictures(size)
    got = reward(pictures, cases.PROMPTS, METADATA)
    model = AutoModelForImageTextToText.from_pretrained(qwen2_5).eval()
    processor = AutoProcessor.from_pretrained(qwen2_5)
    height, width = smart_size(*size, 28, 4 * 784, 16384 * 784)
    for i, prompt in enumerate(cases.PROMPTS):
        array = (pictures[i] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        image = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
        text = f'<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Does this figure show "{prompt}"? '
        text += "Please answer Yes or No.<|im_end|>\n<|im_start|>assistant\n"
        inputs = processor(text=[text], images=[image], return_tensors="pt", do_resize=False)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        seen = inputs["input_ids"][0].unique()
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 1.05, logits[seen] / 1.05)
        token = processor.tokenizer.encode("Yes", add_special_tokens=False)[0]
        assert got[i].item() == pytest.approx(logits.softmax(-1)[token].item(), abs=1e-6)


def test_vqa_score_s_question_has_one_place_for_the_prompt():
    with pytest.raises(ValueError, match="vqa_score: question is 'Is it good.'; write {} once"):
        VQAScore(question="Is it good?")


# GenEval 2 -----------------------------------------------------------------------------------------------------

ROW = {
    "prompt": "three green cats",
    "atom_count": 3,
    "vqa_list": [
        ["How many cats are in the image?", "three"],
        ["Are the cats green?", "Yes"],
        ["Are there any cats?", "Yes"],
    ],
    "skills": ["count", "attribute", "object"],
}
LIKELIEST = {  # by question, as an endpoint tells them
    "How many cats are in the image? Answer in one word.": {"three": 0.5, "3": 0.2, "Three": 0.1, "two": 0.15},
    "Are the cats green? Answer in one word.": {"Yes": 0.25, " yes": 0.05, "No": 0.6},
    "Are there any cats? Answer in one word.": {"yes": 0.9, "Yeah": 0.05, "no": 0.01},
}


class Endpoint:
    """A model that answers each question by its distribution, or with a text."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []
        routes = [Route("/v1/models", self.models), Route("/v1/chat/completions", self.chat, methods=["POST"])]
        self.app = Starlette(routes=routes)

    async def models(self, request):
        return JSONResponse({"data": [{"id": "judge"}]})

    async def chat(self, request):
        question = await request.json()
        self.asked.append(question)
        return JSONResponse({"choices": [self.answer(question["messages"][0]["content"][-1]["text"])]})


def distribution(text):
    tokens = [{"token": token, "logprob": math.log(p)} for token, p in LIKELIEST[text].items()]
    return {"message": {"content": tokens[0]["token"]}, "logprobs": {"content": [{"top_logprobs": tokens}]}}


def test_geneval2_is_the_mean_probability_of_the_right_answers():
    endpoint, image = Endpoint(distribution), torch.rand(2, 3, 8, 8)
    with serving(endpoint.app) as url:
        arithmetic = GenEval2(f"{url}/v1")(image, [ROW["prompt"], "a cat"], [ROW, {}])
        geometric = GenEval2(f"{url}/v1", mean="geometric")(image[:1], [ROW["prompt"]], [ROW])
    # what GenEval2's own evaluation.py makes of these distributions (its soft_tifa, and scipy's gmean)
    assert arithmetic[0].item() == pytest.approx((0.8 + 0.3 + 0.9) / 3) and arithmetic[1].isnan()
    assert geometric.item() == pytest.approx((0.8 * 0.3 * 0.9) ** (1 / 3))
    assert {(q["logprobs"], q["top_logprobs"], q["max_tokens"], q["temperature"]) for q in endpoint.asked} == {
        (True, 20, 1, 0)
    }


def test_geneval2_counts_numbers_as_words_and_digits():
    assert accepted("How many cats are in the image?", "three") == {"three", "Three", "3", " three", " Three", " 3"}
    assert accepted("Are the cats green?", "Yes") == {"Yes", "yes", " Yes", " yes"}


def test_geneval2_s_mistakes():
    with pytest.raises(ValueError, match="mean is 'harmonic'; use arithmetic or geometric"):
        GenEval2("http://127.0.0.1:1/v1", mean="harmonic")
    plain = Endpoint(lambda text: {"message": {"content": "Yes"}})
    with serving(plain.app) as url:
        with pytest.raises(RewardError, match="geneval2: .* holds no top_logprobs; serve the model with log-prob"):
            GenEval2(f"{url}/v1")(torch.rand(1, 3, 8, 8), ["a"], [ROW])
        with pytest.raises(ValueError, match="geneval2: vqa_list is 'Is it.', which isn't a list of"):
            GenEval2(f"{url}/v1").applies("a", {"vqa_list": "Is it?"})
    assert evaluation_options("geneval2") == {"mean": "geometric"}


def test_geneval2_s_rows_are_prompts_with_their_questions(tmp_path, monkeypatch):
    file = tmp_path / "trl_tafs" / "prompts" / "facebookresearch" / "GenEval2" / "main" / "geneval2_data.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(ROW) + "\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    from trl_tafs.prompts.sets import load_prompts

    (row,) = load_prompts("geneval2")
    assert row["prompt"] == ROW["prompt"] and row["vqa_list"] == ROW["vqa_list"] and PromptSource


# UnifiedReward 2.0 ---------------------------------------------------------------------------------------------


def test_unified_reward_2_asks_for_three_scores():
    answer = "Alignment Score (1-5): 2.5\nCoherence Score (1-5): **3**\nStyle Score (1-5): 4.25\n"
    endpoint = Endpoint(lambda text: {"message": {"content": answer if "[a cat]" in text else answer[:60]}})
    images = torch.rand(2, 3, 8, 8)
    with serving(endpoint.app) as url:
        every = UnifiedReward(f"{url}/v1", version="2.0")(images, ["a cat", "a dog"], [{}] * 2)
        some = load_reward(
            "unified_reward", {"base_url": f"{url}/v1", "version": "2.0", "axes": ["alignment", "style"]}
        )
        assert some(images[:1], ["a cat"], [{}]).item() == pytest.approx((2.5 + 4.25) / 2)
    assert every[0].item() == pytest.approx((2.5 + 3 + 4.25) / 3) and every[1].isnan(), "an axis is missing"
    text = endpoint.asked[0]["messages"][0]["content"][-1]["text"]
    assert re.search(
        r"Style Score \(1-5\): Z\n\nYour task is provided as follows:\nText Caption: \[a (cat|dog)\]$", text
    )


def test_unified_reward_s_versions_and_axes_are_checked():
    for options, told in (
        ({"version": "3.0"}, "version is '3.0'; use 1.0 or 2.0"),
        ({"axes": ["style"]}, "axes is .*, and version 1.0 has one score; use version 2.0"),
        ({"version": "2.0", "axes": ["beauty"]}, "use some of alignment, coherence, style"),
    ):
        with pytest.raises(ValueError, match=told):
            UnifiedReward("http://127.0.0.1:1/v1", **options)
