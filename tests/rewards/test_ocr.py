"""The OCR reward on drawn lines: what it reads, what it costs to be wrong, which text is asked for."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from trl_tafs.rewards import RewardRefused
from trl_tafs.rewards.ocr import (
    OCR,
    Recognizer,
    _detector,
    ctc_log_probability,
    edit_distance,
    target_text,
    text_similarity,
)


def line(text, size=(160, 32), at=(6, 4)):
    """Black on white, (1, 3, H, W)."""
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text(at, text, fill="black", font=ImageFont.load_default(20))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def ocr():
    return OCR(threads=1)


@pytest.fixture(scope="module")
def likelihood():
    return OCR(kind="ctc", threads=1)


@pytest.mark.parametrize(
    ("prompt", "metadata", "text"),
    [
        ('a sign that says "Open Now", at night', {}, "Open Now"),
        ("a sign that says “Open Now”", {}, "Open Now"),
        ("a sign that says 'Open'", {}, "Open"),
        ("a dog's bone on the cat's bed", {}, None),
        ("a sign", {"text": "Exit"}, "Exit"),
        ('"first" and "second"', {}, "first"),
        ("a street", {}, None),
        ('an empty ""', {}, None),
    ],
)
def test_the_text_that_is_asked_for(prompt, metadata, text):
    assert target_text(prompt, metadata) == text


def test_edit_distance_and_similarity():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3
    assert text_similarity("OPEN now", "open NOW") == 1.0
    assert text_similarity("", "abcd") == 0.0 and text_similarity("", "") == 1.0
    assert text_similarity("abxd", "abcd") == 0.75 == text_similarity("abcd", "abxd")


def test_drawn_lines_are_read_and_the_wrong_ones_cost_their_share(ocr):
    images = torch.cat([line("Hello World"), line("Hello Word"), torch.ones(1, 3, 32, 160), line("Hello World")])
    prompts = ['a sign "Hello World"'] * 3 + ["a sign without words"]
    got = ocr(images, prompts, [{}] * 4)
    assert got[0] == 1.0 and got[1] == pytest.approx(0.9) and got[2] == 0.0 and got[3].isnan()


def test_the_same_text_is_read_as_rapidocr_reads_it():
    image = line("Hello World")
    engine = _detector(1)
    array = (image[0] * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    alone = engine(array[:, :, ::-1], use_det=False, use_rec=True, use_cls=False)
    assert Recognizer(threads=1).read(image) == [alone.txts[0].strip()]


def test_text_within_a_box_and_by_detection(ocr):
    scene = torch.full((1, 3, 192, 256), 0.8)
    scene[:, :, 96:128, 60:220] = line("Hello World")
    box = {"box": [60 / 256, 0.5, 220 / 256, 128 / 192]}
    prompt = ['a wall with "Hello World"']
    assert ocr(scene, prompt, [box]).item() == 1.0
    assert ocr(scene, prompt, [{}]).item() == 1.0
    assert OCR(detect=False, threads=1)(scene, prompt, [{}]).item() < 1.0
    assert OCR(detect=True, threads=1)(scene, prompt, [{}]).item() == 1.0


@pytest.mark.parametrize("package", ["rapidocr", "rapidocr_onnxruntime"])
def test_text_in_a_whole_picture_is_found_without_being_asked_to(package):
    scene = torch.full((1, 3, 512, 512), 0.8)
    scene[:, :, 200:264, 100:420] = torch.nn.functional.interpolate(line("OPEN NOW"), scale_factor=2)
    reward, prompt = OCR(threads=1, package=package), ['a sign that says "OPEN NOW"']
    assert reward(scene, prompt, [{}]).item() == 1.0
    both = reward(scene.repeat(2, 1, 1, 1), prompt * 2, [{}, {"box": [0.1, 0.1, 0.6, 0.2]}])
    assert both.tolist() == [1.0, 0.0], "a box is where the text is sought"


def test_lines_are_read_as_before_and_no_detector_is_made(ocr):
    wide = torch.cat([line("Hello World"), line("Hello Word")])
    fresh = OCR(threads=1)
    expected = OCR(detect=False, threads=1)(wide, ['"Hello World"'] * 2, [{}] * 2)
    assert torch.equal(fresh(wide, ['"Hello World"'] * 2, [{}] * 2), expected) and fresh._detector is None


def test_the_likelihood_grows_with_legibility_before_anything_can_be_read(likelihood):
    clear, prompt = line("Hello"), ['"Hello"']
    ladder = torch.cat([torch.lerp(clear, torch.full_like(clear, 0.9), t) for t in (0.0, 0.95, 1.0)])
    got = likelihood(ladder, prompt * 3, [{}] * 3)
    assert (got <= 0).all() and got[0] > -0.1 and (got.diff() < 0).all()
    other = likelihood(clear, ['"Yellow"'], [{}])
    assert other < got[0] - 0.3


def test_ctc_log_probability_is_the_sum_over_alignments():
    characters = ["", "a", "A", "b"]
    probabilities = torch.tensor([[[0.1, 0.5, 0.2, 0.2], [0.3, 0.1, 0.1, 0.5]]])  # (1, 2, 4)
    got = ctc_log_probability(probabilities, ["a"], characters)
    # "a" by (a, a), (a, blank), (blank, a), upper and lower case together
    expected = torch.tensor(0.7 * 0.2 + 0.7 * 0.3 + 0.1 * 0.2).log()
    torch.testing.assert_close(got[0], expected)
    both = ctc_log_probability(probabilities.repeat(2, 1, 1), ["ab", "A?"], characters)
    torch.testing.assert_close(both, torch.stack([torch.tensor(0.7 * 0.5).log() / 2, expected]))
    assert ctc_log_probability(probabilities, ["?"], characters).isnan().all()
    # two steps can spell "ab", and neither three letters nor "a", blank, "a"
    too_long = ctc_log_probability(probabilities.repeat(3, 1, 1), ["ab", "aba", "aa"], characters)
    assert too_long.isnan().tolist() == [False, True, True]


def test_the_likelihood_of_what_no_line_can_spell_is_no_score(likelihood):
    assert likelihood(line("Hello"), ['"' + "a long sentence " * 10 + '"'], [{}]).isnan().all()
    with pytest.raises(RewardRefused, match=r"images are 64 x 64.*metadata\[\"box\"\]"):
        likelihood(torch.ones(1, 3, 64, 64), ['"Hello"'], [{}])
    assert likelihood(torch.ones(1, 3, 64, 64), ['"Hello"'], [{"box": [0, 0, 1, 0.2]}]).isfinite().all()
    assert OCR(kind="ctc", detect=False, threads=1)(torch.ones(1, 3, 64, 64), ['"Hi"'], [{}]).isfinite().all()


def test_what_cannot_work_is_said():
    with pytest.raises(ValueError, match="kind is 'loss'; use one of edit, ctc"):
        OCR(kind="loss")
    with pytest.raises(ValueError, match="likelihood of one line"):
        OCR(kind="ctc", detect=True)
    with pytest.raises(ValueError, match="no_such_package isn't installed"):
        Recognizer("no_such_package")
