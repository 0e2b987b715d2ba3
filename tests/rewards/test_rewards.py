import inspect
import json
import math
import pickle

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import image_transform
from PIL import Image

from trl_tafs.rewards import REWARDS, RewardError, RewardRefused, RewardSet, load_reward
from trl_tafs.rewards.clip_score import ClipScore
from trl_tafs.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from trl_tafs.rewards.loading import parse_rewards
from trl_tafs.rewards.model import ModelReward
from trl_tafs.rewards.scoring import as_rewards

PROMPTS, METADATA = ["a cat", "a dog", "a cow"], [{"n": 0}, {"n": 1}, {"n": 2}]


def images(batch=3, size=16, seed=0):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def score(rewards, batch=3, **options):
    return RewardSet(rewards, **options)(images(batch), PROMPTS[:batch], METADATA[:batch])


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def returning(values):
    def named(images, prompts, metadata):
        return values

    return named


class Flaky:
    """Raises the first `faults` times."""

    def __init__(self, faults):
        self.faults, self.calls, self.__name__ = faults, 0, "flaky"

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        if self.calls <= self.faults:
            raise TimeoutError("no answer")
        return [1.0] * len(prompts)


# What a reward may return ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.5, -3],
        (1.0, 2.5, -3.0),
        torch.tensor([1.0, 2.5, -3.0]),
        torch.tensor([[1.0], [2.5], [-3.0]]),
        torch.tensor([1.0, 2.5, -3.0], dtype=torch.float64),
        torch.tensor([1.0, 2.5, -3.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.5, -3.0], requires_grad=True),
        np.array([1.0, 2.5, -3.0]),
        [torch.tensor(1.0), torch.tensor(2.5), torch.tensor(-3.0)],
        [np.float32(1), np.float64(2.5), np.int64(-3)],
    ],
    ids=lambda v: type(v).__name__,
)
def test_numbers_of_every_kind_are_rewards(values):
    got = score(returning(values)).values
    assert got.dtype == torch.float64
    assert not got.requires_grad
    assert got.tolist() == [[1.0], [2.5], [-3.0]]


@pytest.mark.parametrize(
    "values", [[None, 2.0, float("nan")], np.array([None, 2.0, np.nan]), torch.tensor([math.nan, 2.0, math.nan])]
)
def test_none_and_nan_are_no_score_and_never_zero(values):
    got = score(returning(values)).values[:, 0]
    assert got.isnan().tolist() == [True, False, True]
    assert got[1] == 2.0


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([1.0, 2.0], r"shape \(2,\) for 3 images"),
        (torch.zeros(3, 2), r"shape \(3, 2\) for 3 images"),
        (torch.tensor(1.0), r"shape \(\) for 3 images"),
        ([], r"shape \(0,\) for 3 images"),
        (np.zeros((2, 3)), r"shape \(2, 3\) for 3 images"),
        (0.5, "returned float '0.5'; it must return 3 numbers"),
        (None, "returned NoneType"),
        (["a", "b", "c"], "it must return 3 numbers"),
        ([[1.0], [2.0, 3.0], [1.0]], "it must return 3 numbers"),
        ([1.0, float("inf"), 2.0], "infinite"),
        (torch.tensor([1.0, -math.inf, 2.0]), "infinite"),
    ],
    ids=repr,
)
def test_anything_else_is_an_error_that_names_the_reward(values, told):
    with pytest.raises(RewardError, match=told) as caught:
        score({"sharpness": returning(values)})
    assert "'sharpness'" in str(caught.value)


def test_metadata_travels_beside_the_rewards():
    assert score(returning(([1, 2, 3], {"boxes": [4, 5, 6]}))).metadata == {"boxes": [4, 5, 6]}
    assert score(brightness).metadata == {}
    both = score({"a": returning(([1, 2, 3], {"x": 1})), "b": brightness})
    assert both.metadata == {"a": {"x": 1}, "b": {}}


def test_a_tuple_of_two_numbers_for_two_images_is_two_rewards():
    assert score(returning((0.25, 0.75)), batch=2).values.flatten().tolist() == [0.25, 0.75]


def test_as_rewards_detaches_and_copies_to_the_cpu():
    assert as_rewards("r", torch.ones(2, requires_grad=True), 2).requires_grad is False


# Several rewards ------------------------------------------------------------------------------------------------


def test_rewards_keep_their_names_order_and_weights():
    rewards = RewardSet({"bright": brightness, "jpeg": (jpeg_compressibility, 0.5)})
    assert rewards.names == ("bright", "jpeg")
    assert rewards.weights.tolist() == [1.0, 0.5]
    got = rewards(images(), PROMPTS, METADATA).values
    torch.testing.assert_close(got[:, 0].float(), brightness(images(), PROMPTS, METADATA))
    torch.testing.assert_close(got[:, 1].float(), jpeg_compressibility(images(), PROMPTS, METADATA))


def test_weights_stand_in_the_dict_or_beside_it():
    assert RewardSet({"a": (brightness, 3.0), "b": brightness}).weights.tolist() == [3.0, 1.0]
    assert RewardSet({"a": brightness, "b": brightness}, [0.5, 0.25]).weights.tolist() == [0.5, 0.25]


def test_a_list_takes_the_functions_names_and_numbers_the_repeated():
    rewards = RewardSet([brightness, jpeg_compressibility, brightness, brightness, lambda i, p, m: [0] * len(p)])
    assert rewards.names == ("brightness", "jpeg_compressibility", "brightness_2", "brightness_3", "lambda")


def test_a_reward_sees_images_prompts_and_metadata_as_documented():
    seen = {}

    def spy(images, prompts, metadata):
        seen.update(images=images, prompts=prompts, metadata=metadata)
        return [0.0] * len(prompts)

    score(spy)
    assert seen["images"].shape == (3, 3, 16, 16)
    assert seen["images"].dtype == torch.float32
    assert list(seen["prompts"]) == PROMPTS
    assert list(seen["metadata"]) == METADATA


@pytest.mark.parametrize(
    ("rewards", "weights", "told"),
    [
        ([], None, "no reward given"),
        ({}, None, "no reward given"),
        ({"a": 3}, None, "reward 'a' is 3, not a callable"),
        ("clip_score", None, "not a callable"),
        (None, None, "not a callable"),
        ([brightness], [1.0, 2.0], r"2 reward_weights for 1 rewards \(brightness\)"),
        ({"a": (brightness, 2.0)}, [1.0], r"reward_weights=\[1.0\], and the rewards have weights \(a=2.0\); give one"),
        (
            lambda images, prompts: [],
            None,
            r"reward 'lambda' takes \(images, prompts\), and is called with .im",
        ),
        (
            lambda prompts, completions, **kwargs: [],
            None,
            "is called with .images, prompts, prompt_metadata.: too ",
        ),
        (Flaky, None, "reward 'Flaky' is the class Flaky; give an instance"),
    ],
)
def test_what_is_no_set_of_rewards_is_an_error(rewards, weights, told):
    with pytest.raises(ValueError, match=told):
        RewardSet(rewards, weights)


def test_equal_weights_beside_a_dict_and_callables_of_any_kind_are_taken():
    assert RewardSet({"a": (brightness, 2.0)}, [2.0]).weights.tolist() == [2.0]
    assert RewardSet({"a": (brightness, 1.0)}, [3.0]).weights.tolist() == [3.0]
    RewardSet([lambda *everything: [], lambda images, prompts, metadata, extra=1: [], max])


# Rows -----------------------------------------------------------------------------------------------------------


class Digits:
    """Scores rows with a digit; a digit that is none is malformed."""

    def applies(self, prompt, metadata):
        if "digit" not in metadata:
            return False
        int(metadata["digit"])
        return True

    def __call__(self, images, prompts, metadata):
        return [float(row["digit"]) for row in metadata]


def test_rows_that_a_reward_cannot_score_are_found_before_anything_is_drawn():
    rewards = RewardSet({"digits": Digits(), "bright": brightness})
    rows = [("one", {"digit": 1}), ("two", {"digit": "2"})]
    assert rewards.check_rows(rows) == []
    assert rewards.check_rows([*rows, ("a cat", {})]) == ["reward 'digits' scores 2 of 3 prompts"]
    with pytest.raises(ValueError, match="prompts, row 2 .'x'.: reward 'digits' says invalid literal for int"):
        rewards.check_rows([*rows, ("x", {"digit": "x"})])
    with pytest.raises(ValueError, match="reward 'digits' scores none of the 2 prompts:"):
        rewards.check_rows([("a cat", {}), ("a dog", {})])
    assert rewards.check_rows([]) == [], "rows of a prompt function aren't known"


def test_a_reward_may_name_the_metadata_that_it_needs():
    def judge(images, prompts, metadata):
        return [row["target"] for row in metadata]

    judge.required_metadata = ("target",)
    RewardSet(judge).check_rows([("a", {"target": 1}), ("b", {"target": 0})])
    with pytest.raises(ValueError, match="eval_prompts, row 1 .'b'. has no target, which reward 'judge' needs"):
        RewardSet(judge).check_rows([("a", {"target": 1}), ("b", {"target": None})], "eval_prompts")


def test_rows_are_not_gone_through_for_rewards_that_score_all():
    def rows():
        raise AssertionError("nobody asks")
        yield

    class Everything(ModelReward):
        score = None

    RewardSet({"bright": brightness, "network": Everything()}).check_rows(rows())


# Retries --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:reward")
@pytest.mark.parametrize(("faults", "retries"), [(0, 0), (1, 1), (2, 3)])
def test_a_reward_that_raises_is_called_again_until_it_answers(faults, retries):
    flaky = Flaky(faults)
    assert score(flaky, max_retries=retries, retry_delay=0.0).values.flatten().tolist() == [1.0, 1.0, 1.0]
    assert flaky.calls == faults + 1


@pytest.mark.filterwarnings("ignore:reward")
@pytest.mark.parametrize("retries", [0, 2])
def test_a_reward_that_goes_on_raising_is_an_error_with_name_cause_and_prompts(retries):
    flaky = Flaky(99)
    with pytest.raises(RewardError) as caught:
        score(flaky, max_retries=retries, retry_delay=0.0)
    assert flaky.calls == retries + 1
    assert isinstance(caught.value.__cause__, TimeoutError)
    for told in ("'flaky'", "TimeoutError: no answer", f"{retries + 1} calls", "'a cat'", "'a cow'"):
        assert told in str(caught.value)


def test_each_retry_warns():
    with pytest.warns(UserWarning, match="'flaky' raised TimeoutError: no answer; it is retried"):
        score(Flaky(1), max_retries=1, retry_delay=0.0)


@pytest.mark.parametrize(("kind", "masked"), [(RewardError, True), (RewardRefused, False)])
def test_a_reward_that_has_given_up_is_not_called_again_and_a_refusal_is_not_masked(kind, masked):
    calls = []

    def quits(images, prompts, metadata):
        calls.append(1)
        raise kind("no use")

    with pytest.raises(kind, match=r"'quits' raised \w+: no use \(1 calls"):
        score(quits, max_retries=3)
    if masked:
        with pytest.warns(UserWarning, match="get no score"):
            assert score(quits, max_retries=3, on_failure="mask").values.isnan().all()
    else:
        with pytest.raises(kind):
            score(quits, max_retries=3, on_failure="mask")
    assert len(calls) == 2


def test_a_wrong_shape_is_not_retried():
    calls = []
    with pytest.raises(RewardError):
        score(lambda i, p, m: calls.append(1) or [0.0], max_retries=3, retry_delay=0.0)
    assert len(calls) == 1


def test_an_interrupt_is_not_retried():
    def interrupted(images, prompts, metadata):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted, max_retries=3)


# Finding rewards ------------------------------------------------------------------------------------------------


def test_rewards_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    assert load_reward("jpeg_compressibility") is jpeg_compressibility
    assert load_reward("trl_tafs.rewards.jpeg:jpeg_compressibility") is jpeg_compressibility
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_judges.py").write_text(
        "def first(images, prompts, metadata):\n    return [1.0] * len(prompts)\n\n\n"
        "class Second:\n    def __call__(self, images, prompts, metadata):\n        return [2.0] * len(prompts)\n"
    )
    got = score({"a": load_reward("my_judges:first"), "b": load_reward("my_judges:Second")})
    assert got.values[0].tolist() == [1.0, 2.0]


def test_files_of_one_name_are_different_rewards_and_none_is_a_library(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))  # and restores the path
    for folder, value in (("a", 1), ("b", 2)):
        for name in ("judge", "datasets"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.py").write_text(
                f"from dataclasses import dataclass\nfrom beside_{folder} import VALUE\n\n\n@dataclass\nclass Judge:\n"
                "    scale: float = 1.0\n\n    def __call__(self, images, prompts, metadata):\n"
                "        return [self.scale * VALUE] * len(prompts)\n"
            )
        (tmp_path / folder / f"beside_{folder}.py").write_text(f"VALUE = {value}\n")
    for name in ("judge", "datasets"):
        judges = [load_reward(str(tmp_path / folder / f"{name}.py:Judge")) for folder in ("a", "b")]
        judges += [pickle.loads(pickle.dumps(judge)) for judge in judges]
        assert score(dict(enumerate(judges))).values[0].tolist() == [1.0, 2.0, 1.0, 2.0]
    again = load_reward(str(tmp_path / "a" / "judge.py:Judge"))
    assert type(again) is type(load_reward(str(tmp_path / "b" / ".." / "a" / "judge.py:Judge")))


def test_a_file_that_is_not_there_or_breaks_leaves_no_module_behind(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="none.py:f' can't be imported: there is no file"):
        load_reward(str(tmp_path / "none.py:f"))
    (tmp_path / "broken.py").write_text("import no_such_module")
    for _ in range(2):
        with pytest.raises(ValueError, match="No module named 'no_such_module'"):
            load_reward(str(tmp_path / "broken.py:f"))


@pytest.mark.parametrize("name", ["clip", "no_such_reward", "no_such_module:f", "trl_tafs.rewards.jpeg:f", ""])
def test_a_reward_that_is_not_there_is_an_error_that_names_it(name):
    with pytest.raises(ValueError) as caught:
        load_reward(name)
    assert repr(name) in str(caught.value)
    if ":" not in name:
        assert all(known in str(caught.value) for known in REWARDS)


def test_every_named_reward_can_be_imported():
    for path in REWARDS.values():
        module, _, attribute = path.partition(":")
        assert callable(getattr(__import__(module, fromlist=[attribute]), attribute))


def test_rewards_with_weights_from_the_command_line():
    got = parse_rewards(["jpeg_compressibility=0.5", "trl_tafs.rewards.jpeg:jpeg_incompressibility"])
    assert got == {
        "jpeg_compressibility": (jpeg_compressibility, 0.5),
        "jpeg_incompressibility": (jpeg_incompressibility, 1.0),
    }
    assert parse_rewards(["jpeg_compressibility=-2e-1"])["jpeg_compressibility"][1] == -0.2


@pytest.mark.parametrize(
    ("items", "told"),
    [
        (["jpeg_compressibility=high"], "'high' is no number; write NAME=WEIGHT"),
        (["jpeg_compressibility=1", "jpeg_compressibility=2"], "twice"),
        (["sharpness=1"], "no reward 'sharpness'"),
    ],
)
def test_a_wrong_reward_on_the_command_line_is_an_error(items, told):
    with pytest.raises(ValueError, match=told):
        parse_rewards(items)


# JPEG -----------------------------------------------------------------------------------------------------------


def test_jpeg_size_grows_with_the_noise_and_compressibility_is_its_negative():
    flat, noise = torch.full((3, 64, 64), 0.5), images(1, 64)[0]
    ladder = torch.stack([flat + share * (noise - flat) for share in (0.0, 0.1, 0.5, 1.0)])
    sizes = jpeg_incompressibility(ladder, ["p"] * 4, [{}] * 4)
    assert sizes.shape == (4,)
    assert (sizes.diff() > 0).all()
    assert 0 < sizes[0] < 1.5
    assert 4 < sizes[3] < 15  # kilobytes of 64 x 64 noise at quality 95
    assert torch.equal(jpeg_compressibility(ladder, ["p"] * 4, [{}] * 4), -sizes)


def test_jpeg_size_is_that_of_the_image_pillow_writes(tmp_path):
    image = images(1, 32)
    pixels = (image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "image.jpg", quality=95)
    size = jpeg_incompressibility(image, ["p"], [{}]).item()
    assert size == pytest.approx((tmp_path / "image.jpg").stat().st_size / 1000)


# CLIP -----------------------------------------------------------------------------------------------------------

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory):
    """open_clip's registry knows a tiny architecture."""
    path = tmp_path_factory.mktemp("open_clip") / "tiny-clip.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    return "tiny-clip"


@pytest.fixture(scope="module")
def clip_score(tiny_clip):
    torch.manual_seed(0)
    return ClipScore(tiny_clip, pretrained=None, device="cpu")


def smooth(batch, height, width, seed=0):
    """Pictures rather than noise, in steps of 1/255, so that both paths see the same pixels."""
    coarse = torch.rand(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (fine * 255).round() / 255


def by_open_clip(model, pictures):
    settings = get_model_preprocess_cfg(model)
    transform = image_transform(
        model.visual.image_size, is_train=False, mean=settings["mean"], std=settings["std"],
        resize_mode=settings.get("resize_mode"), interpolation=settings.get("interpolation"),
    )  # fmt: skip
    arrays = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return torch.stack([transform(Image.fromarray(array)) for array in arrays])


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 96), (16, 16), (64, 96), (90, 64)], ids=str)
def test_clip_preprocessing_on_the_tensor_is_open_clips_on_the_picture(clip_score, size):
    pictures = smooth(2, *size)
    got, expected = clip_score.preprocess(pictures), by_open_clip(clip_score.model, pictures)
    assert got.shape == expected.shape == (2, 3, 32, 32)
    torch.testing.assert_close(got, expected, rtol=0, atol=2 / 255 / 0.26)  # the picture is rounded to 8 bits


def test_clip_score_is_the_cosine_of_open_clips_embeddings(clip_score):
    pictures, model = smooth(3, 32, 32), clip_score.model
    with torch.no_grad():
        image = model.encode_image(by_open_clip(model, pictures), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer("tiny-clip")(PROMPTS), normalize=True)
    got = clip_score(pictures, PROMPTS, METADATA)
    torch.testing.assert_close(got, (image * text).sum(1), rtol=0, atol=1e-4)
    assert (got.abs() <= 1).all()
    assert got.unique().numel() == 3


def test_clip_score_does_not_depend_on_the_batch(tiny_clip, clip_score):
    pictures, prompts = smooth(7, 48, 48), [f"picture {i}" for i in range(7)]
    whole = clip_score(pictures, prompts, [{}] * 7)
    torch.manual_seed(0)
    small = ClipScore(tiny_clip, pretrained=None, device="cpu", batch_size=3)(pictures, prompts, [{}] * 7)
    torch.testing.assert_close(small, whole, rtol=0, atol=1e-6)
    one = torch.cat([clip_score(pictures[i : i + 1], prompts[i : i + 1], [{}]) for i in range(7)])
    torch.testing.assert_close(one, whole, rtol=0, atol=1e-6)


def test_clip_score_is_scaled_frozen_and_in_eval_mode(tiny_clip, clip_score):
    torch.manual_seed(0)
    hundred = ClipScore(tiny_clip, pretrained=None, device="cpu", scale=100.0)
    pictures = smooth(3, 32, 32)
    torch.testing.assert_close(hundred(pictures, PROMPTS, METADATA), 100 * clip_score(pictures, PROMPTS, METADATA))
    assert not any(p.requires_grad for p in hundred.model.parameters())
    assert not hundred.model.training


def uses_quick_gelu(model):
    return any(type(module).__name__ == "QuickGELU" for module in model.modules())


@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")
def test_weights_that_were_trained_with_quick_gelu_run_with_it(tiny_clip, tmp_path, monkeypatch):
    weights = tmp_path / "weights.pt"
    torch.save(open_clip.create_model(tiny_clip).state_dict(), weights)
    tag = pretrained._pcfg(url="https://localhost/weights.pt", quick_gelu=True)
    monkeypatch.setitem(pretrained._PRETRAINED, tiny_clip, {"openai": tag})
    monkeypatch.setattr(factory, "download_pretrained", lambda *args, **kwargs: str(weights))
    assert uses_quick_gelu(ClipScore(tiny_clip, pretrained="openai", device="cpu").model)


def test_the_default_clip_score_is_openais_vit_l_14():
    defaults = {name: p.default for name, p in inspect.signature(ClipScore).parameters.items()}
    assert defaults["model_name"].startswith("ViT-L-14")
    assert defaults["pretrained"] == "openai"
