"""GenEval: the benchmark's rules on constructed detections, its real prompts, and the detector path."""

import itertools
import json

import open_clip
import pytest
import tiny
import torch
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from trl_tafs.rewards.geneval import COLOR_TEMPLATES, GREY, GenEval, instances, masked_crop
from trl_tafs.rewards.geneval_rules import COCO_NAMES, COLORS, TAGS, Detection, check_row, judge, keep, relations
from trl_tafs.rewards.scoring import RewardRefused, RewardSet

DATA = tiny.ROOT.parent / "shared" / "data" / "geneval"


def at(name, x=50.0, y=50.0, size=20.0, confidence=0.95, color="red"):
    """An object around (x, y); its colour travels in the mask's place."""
    box = (x - size / 2, y - size / 2, x + size / 2, y + size / 2)
    return Detection(name, confidence, box, torch.tensor(COLORS.index(color)))


def colors_of(name, objects):
    return [COLORS[int(item.mask)] for item in objects]


def scores(row, *detections):
    return judge(row, keep(detections, row["tag"]), colors_of)


def one(name, **more):
    return {"class": name, "count": 1, **more}


ROWS = {
    "single_object": {"tag": "single_object", "include": [one("bench")]},
    "two_object": {"tag": "two_object", "include": [one("bench"), one("dog")]},
    "counting": {
        "tag": "counting",
        "include": [{"class": "dog", "count": 3}],
        "exclude": [{"class": "dog", "count": 4}],
    },
    "colors": {"tag": "colors", "include": [one("dog", color="blue")]},
    "position": {"tag": "position", "include": [one("bench"), one("dog", position=["left of", 0])]},
    "color_attr": {"tag": "color_attr", "include": [one("bench", color="red"), one("dog", color="blue")]},
}


@pytest.mark.parametrize(
    ("tag", "detections", "strict", "graded"),
    [
        ("single_object", [at("bench")], 1, 1),
        ("single_object", [at("bench", confidence=0.31)], 1, 1),
        ("single_object", [at("bench", confidence=0.3)], 0, 0),
        ("single_object", [at("bench"), at("bench"), at("dog")], 1, 1),
        ("single_object", [at("dog")], 0, 0),
        ("single_object", [], 0, 0),
        ("two_object", [at("bench"), at("dog")], 1, 1),
        ("two_object", [at("dog")], 0, 0.5),
        ("counting", [at("dog")] * 3, 1, 1),
        ("counting", [at("dog")] * 2, 0, 2 / 3),
        ("counting", [at("dog")] * 4, 0, (1 + 3 / 4) / 2),
        ("counting", [at("dog")] * 3 + [at("dog", confidence=0.89)], 1, 1),
        ("counting", [at("dog", confidence=0.89)] * 3, 0, 0),
        ("colors", [at("dog", color="blue")], 1, 1),
        ("colors", [at("dog", color="red")], 0, 0.5),
        ("colors", [at("dog", color="red"), at("dog", color="blue", confidence=0.9)], 0, 0.5),  # the surest counts
        ("colors", [at("cat", color="blue")], 0, 0),
        ("position", [at("bench", x=80), at("dog", x=20)], 1, 1),
        ("position", [at("bench", x=20), at("dog", x=80)], 0, 0.75),
        ("position", [at("bench", x=52), at("dog", x=48)], 0, 0.75),  # within a tenth of both sizes
        ("position", [at("dog", x=20)], 0, 0.25),
        ("color_attr", [at("bench"), at("dog", color="blue")], 1, 1),
        ("color_attr", [at("bench", color="blue"), at("dog", color="red")], 0, 0.5),
        ("color_attr", [at("bench")], 0, 0.5),
    ],
)
def test_the_rules_of_every_task(tag, detections, strict, graded):
    got = scores(ROWS[tag], *detections)
    assert got[0] == strict and got[1] == pytest.approx(graded)


def test_the_graded_score_is_one_exactly_where_the_strict_one_is():
    choices = [at("dog", x, 50, color=color) for x, color in itertools.product((20, 80), ("red", "blue"))]
    choices += [at("bench", x, 50, color=color) for x, color in itertools.product((20, 80), ("red", "blue"))]
    seen = set()
    for number in range(5):
        for found in itertools.combinations_with_replacement(choices, number):
            for row in ROWS.values():
                strict, graded = scores(row, *found)
                assert 0 <= graded <= 1 and (graded == 1) == (strict == 1)
                seen.add((row["tag"], strict))
    assert seen == {(tag, strict) for tag in TAGS for strict in (0.0, 1.0)}


def test_at_most_sixteen_objects_of_a_class_the_surest():
    crowd = [at("dog", confidence=0.4 + i / 100) for i in range(20)] + [at("cat")]
    found = keep(crowd, "two_object")
    assert len(found["dog"]) == 16 and len(found["cat"]) == 1
    assert [d.confidence for d in found["dog"]] == sorted((d.confidence for d in crowd[4:20]), reverse=True)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-40, 0), {"left of"}),
        ((40, 0), {"right of"}),
        ((0, -40), {"above"}),
        ((0, 40), {"below"}),
        ((30, 30), {"right of", "below"}),
        ((3, 0), set()),
        ((0, 0), set()),
        ((40, 12), {"right of"}),
    ],
)
def test_relations_of_boxes(offset, expected):
    assert relations(at("dog", 50 + offset[0], 50 + offset[1]), at("bench")) == expected
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(at("bench"), at("dog", 50 + offset[0], 50 + offset[1])) == {opposite[name] for name in expected}


def perfect(row):
    """Detections that meet a row: what it includes, placed as it says."""
    places, found = [], []
    for requirement in row["include"]:
        x, y = (50.0, 50.0) if not places else (50.0, 200.0 * len(places))
        if requirement.get("position"):
            relation, target = requirement["position"]
            dx, dy = {"left of": (-90, 0), "right of": (90, 0), "above": (0, -90), "below": (0, 90)}[relation]
            x, y = places[target][0] + dx, places[target][1] + dy
        places.append((x, y))
        color = requirement.get("color") or "red"
        found += [at(requirement["class"], x, y, color=color) for _ in range(requirement["count"])]
    return found


@pytest.mark.parametrize("name", ["evaluation_metadata.jsonl", "test_metadata.jsonl"])
def test_the_benchmarks_own_rows(name):
    if not (DATA / name).is_file():
        pytest.skip("the prompt sets are not part of the project")
    rows = [json.loads(line) for line in (DATA / name).read_text().splitlines()]
    assert {row["tag"] for row in rows} == set(TAGS)
    for row in rows:
        check_row(row)
        objects = perfect(row)
        assert scores(row, *objects) == (1.0, 1.0), row
        assert scores(row, *objects[:-1])[0] == 0, row
        wrong = [at(d.name, d.box[0], d.box[1], color="green" if int(d.mask) != 3 else "red") for d in objects]
        if "color" in row["include"][0]:
            assert scores(row, *wrong)[0] == 0, row
    assert (DATA / "object_names.txt").read_text().split("\n")[:80] == list(COCO_NAMES)


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ([one("unicorn")], "no class 'unicorn'"),
        ([one("dog", color="beige")], "no colour 'beige'; use one of red, orange"),
        ([{"class": "dog", "count": 0}], "a count must be at least 1, got 0"),
        ([one("dog", position=["above", 0])], "refers to an earlier requirement"),
    ],
)
def test_a_row_that_cannot_be_judged_is_an_error(include, message):
    with pytest.raises(ValueError, match=message):
        check_row({"tag": "colors", "include": include})
    row, calls = {"tag": "colors", "include": include}, []

    def judged(images, prompts, metadata):
        calls.append(1)
        check_row(metadata[0])

    with pytest.raises(RewardRefused, match=message):  # another try finds the same row
        RewardSet(judged, max_retries=3, on_failure="mask")(torch.rand(1, 3, 8, 8), ["a"], [row])
    assert len(calls) == 1


# The detector ---------------------------------------------------------------------------------------------------


def test_instances_are_the_surest_pairs_of_query_and_class():
    class_logits = torch.full((2, 4), -10.0)
    class_logits[0, 1], class_logits[1, 2] = 10.0, 5.0
    masks = torch.full((2, 8, 8), -20.0)
    masks[0, 2:6, 1:4] = 20.0
    masks[1, :, 6:] = 0.5
    found = instances(class_logits, masks, (16, 16), ["a", "b", "c"])
    best, second = found[:2]
    assert (best.name, second.name) == ("b", "c") and best.confidence > 0.95
    assert best.box[0] == pytest.approx(2, abs=1) and best.box[3] == pytest.approx(12, abs=1)
    assert best.mask.shape == (16, 16) and best.mask[8, 4] and not best.mask[0, 0]
    assert second.confidence == pytest.approx(torch.tensor(0.5).sigmoid().item(), abs=0.05)


def test_the_surroundings_of_an_object_are_grey():
    image = torch.rand(3, 16, 16)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:8, 4:8] = True
    crop = masked_crop(image, Detection("dog", 1.0, (2.0, 2.0, 10.0, 12.0), mask))
    assert crop.shape == (3, 10, 8)
    torch.testing.assert_close(crop[:, 2:6, 2:6], image[:, 4:8, 4:8])
    assert crop[:, 0, 0].tolist() == pytest.approx([GREY] * 3)


@pytest.fixture(scope="module")
def geneval(tmp_path_factory):
    """The whole path on random weights: a small Swin Mask2Former with COCO's 80 classes, and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("geneval")
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=4, dim_feedforward=32, encoder_feedforward_dim=32, num_queries=10, num_labels=80,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).eval().save_pretrained(folder)
    clip = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "tiny-colours.json").write_text(json.dumps(clip))
    open_clip.add_model_config(folder / "tiny-colours.json")
    options = {"clip": "tiny-colours", "clip_pretrained": None, "shortest_edge": 64, "longest_edge": 128}
    return GenEval(detector=str(folder), device="cpu", **options)


def test_the_whole_path_on_a_random_detector(geneval):
    torch.manual_seed(1)
    images = torch.rand(4, 3, 48, 64)
    rows = [ROWS["single_object"], ROWS["color_attr"], ROWS["counting"], {}]
    got = geneval(images, ["a photo"] * 4, rows)
    assert got[:3].isfinite().all() and got[3].isnan() and ((got[:3] >= 0) & (got[:3] <= 1)).all()
    detections = geneval.detect(images)
    assert len(detections) == 4 and all(0 < len(found) <= 100 for found in detections)
    for item in detections[0]:
        left, top, right, bottom = item.box
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 48 and item.mask.shape == (48, 64)
        assert item.mask[int(top) : int(bottom), int(left) : int(right)].sum() == item.mask.sum()


def test_the_detectors_own_objects_meet_a_row_that_asks_for_them(geneval, monkeypatch):
    torch.manual_seed(1)
    image = torch.rand(1, 3, 48, 64)
    monkeypatch.setattr("trl_tafs.rewards.geneval_rules.THRESHOLD", 0.0)
    found = geneval.detect(image)[0]
    surest = max(found, key=lambda d: d.confidence)
    color = geneval.colors(image[0], surest.name, [surest])[0]
    row = {"tag": "colors", "include": [one(surest.name, color=color)]}
    assert geneval(image, ["a photo"], [row]).item() == 1.0
    other = {"tag": "colors", "include": [one(surest.name, color=COLORS[(COLORS.index(color) + 1) % 10])]}
    assert geneval(image, ["a photo"], [other]).item() == 0.5
    monkeypatch.setattr(geneval, "graded", False)
    assert geneval(image, ["a photo"], [other]).item() == 0.0


def test_the_detectors_input_is_that_of_transformers(geneval):
    from transformers import Mask2FormerImageProcessor

    torch.manual_seed(2)
    images = (torch.rand(1, 3, 48, 48) * 255).round() / 255
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32)
    theirs = processor(images=[(images[0] * 255).to(torch.uint8)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(geneval.preprocess(images)[0], theirs, rtol=0, atol=2.1 / 255 / 0.22)
    wide, size = geneval.preprocess(torch.rand(1, 3, 48, 64))  # padded as the benchmark does, where theirs stretches
    assert size == (64, 85) and wide.shape[2:] == (64, 96) and (wide[..., 85:] == 0).all()


def test_colours_are_those_of_a_zero_shot_classifier(geneval):
    weights = geneval._color_embeddings("dog")
    assert weights.shape == (10, 16)
    texts = [template.format(color="blue", name="dog") for template in COLOR_TEMPLATES]
    assert texts[1] == "a photo of a blue-colored dog"
    with torch.no_grad():
        mean = F.normalize(geneval.clip.encode_text(geneval.tokenizer(texts)), dim=-1).mean(0)
    torch.testing.assert_close(weights[COLORS.index("blue")], F.normalize(mean, dim=-1))
