import shutil
import warnings

import pytest
import tiny
import torch

from trl_tafs.prompts.encoder import PromptEncoder, cache_note

PROMPTS = ["one", "two", "three", "four"]


def test_the_encoder_gives_each_prompt_its_own_row_and_forgets_the_oldest(pipeline):
    encode = PromptEncoder(pipeline, torch.device("cpu"), guidance_scale=2.0, negative_prompt="six", cache_size=2)
    rows = encode(["one", "two", "one", "three"])
    for i, prompt in enumerate(["one", "two", "one", "three"]):
        own = pipeline.encode_conditioning([prompt], guidance_scale=2.0, negative_prompts="six")
        assert torch.equal(rows.positive.text[i], own.positive.text[0])
        assert torch.equal(rows.negative.text[i], own.negative.text[0])
    assert list(encode.cache) == ["two", "three"]


def test_all_prompts_are_read_before_training_only_for_a_folder(pipeline_folder, tmp_path):
    reads = []

    class Rows:
        def __len__(self):
            return len(PROMPTS)

        def __getitem__(self, index):
            reads.append(index)
            return PROMPTS[index]

    for name, changes in (("plain", {}), ("kept", {"prompt_cache_dir": str(tmp_path / "prompts")})):
        trainer = tiny.trainer(tiny.load(pipeline_folder), tmp_path / name, prompt_function=Rows(), **changes)
        reads.clear()
        trainer.preflight(0)
        assert len(reads) == (1 if name == "plain" else 1 + len(PROMPTS))
    assert len(list((tmp_path / "prompts").rglob("*.safetensors"))) == len(PROMPTS)


def test_the_encoder_forgets_by_weight_too(pipeline):
    encode = PromptEncoder(pipeline, torch.device("cpu"))
    one = encode(["one"])
    weight = sum(value.numel() * value.element_size() for value in vars(one.positive).values() if value is not None)
    bounded = PromptEncoder(pipeline, torch.device("cpu"), cache_bytes=2 * weight)
    assert len(bounded(["one", "two", "three"])) == 3 and list(bounded.cache) == ["two", "three"]
    none = PromptEncoder(pipeline, torch.device("cpu"), cache_bytes=0)
    assert torch.equal(none(["one"]).positive.text, one.positive.text) and not none.cache


def test_a_text_encoder_that_raises_leaves_the_pipeline_as_it_was(pipeline):
    encode = PromptEncoder(pipeline, torch.device("cpu"), offload=True)
    forward, moves = pipeline.text_encoder_3.forward, []
    pipeline.text_encoder_3.to = lambda device: moves.append(str(device))
    pipeline.text_encoder_3.forward = lambda *args, **kwargs: 1 / 0
    try:
        encode(["one"])
    except ZeroDivisionError:
        pass
    assert pipeline.encoding_device is None, "else every later call of the pipeline runs where the encoders were"
    assert len(moves) == 2 and moves[-1] == "cpu", "to the device, and back"
    pipeline.text_encoder_3.forward = forward
    pipeline.encoding_device = torch.device("cpu")
    assert len(encode(["one"])) == 1 and pipeline.encoding_device == torch.device("cpu"), "found and left so"


def test_the_bytes_in_memory_are_counted_as_prompts_come_and_go(pipeline, tmp_path):
    encode = PromptEncoder(pipeline, torch.device("cpu"), cache_size=2, cache_dir=tmp_path)
    for prompts in (["one", "two", "three"], ["one"], ["four", "one"], PROMPTS):
        encode(prompts)
        held = [v for c in encode.cache.values() for v in vars(c.positive).values() if isinstance(v, torch.Tensor)]
        assert encode._bytes == sum(v.numel() * v.element_size() for v in held)


# Room ---------------------------------------------------------------------------------------------------------


def test_a_cache_that_the_disk_has_no_room_for_is_refused_by_the_size_of_one_prompt(tmp_path):
    assert cache_note(2**20, 100, 2**30, tmp_path) is None
    note = cache_note(2 * 2**20 + 2**19, 50_000, 200 * 2**30, tmp_path)
    assert "50,000 prompts of 2.50 MiB are 122.1 GiB" in note and "has 200.0 free" in note
    with pytest.raises(ValueError, match="prompt_cache_dir: 50,000 prompts of 2.50 MiB are .*; .* has 100.0 free"):
        cache_note(2 * 2**20 + 2**19, 50_000, 100 * 2**30, tmp_path)


def test_the_cache_s_room_is_looked_at_after_one_prompt(pipeline, tmp_path, monkeypatch):
    encoder = PromptEncoder(pipeline, torch.device("cpu"), cache_dir=tmp_path / "cache")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10))
    with pytest.raises(ValueError, match="prompt_cache_dir: 2 prompts of"):
        encoder.prepare(["one", "two", "three"])
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    monkeypatch.undo()
    encoder.prepare(["one", "two", "three"])
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3


def test_a_cache_that_cannot_be_written_is_refused_unless_it_is_only_read(pipeline, tmp_path):
    (tmp_path / "file").touch()
    encoder = PromptEncoder(pipeline, torch.device("cpu"), cache_dir=tmp_path / "file" / "cache")
    for prompts in (["one"], []):  # missing ones, and those of a function
        with pytest.raises(ValueError, match="prompt_cache_dir is '.*cache', which can't be written .Not a directory"):
            encoder.prepare(prompts)


def test_a_memory_that_is_too_small_is_told_once(pipeline):
    encoder = PromptEncoder(pipeline, torch.device("cpu"), cache_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt in ("one", "one", "two"):
            encoder([prompt])
    with pytest.warns(UserWarning, match="again that memory had no room for: it holds 1 of them") as told:
        for prompt in ("one", "two", "one"):
            encoder([prompt])
    assert len(told) == 1
