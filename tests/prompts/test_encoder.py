import tiny
import torch

from trl_tafs.prompts.encoder import PromptEncoder

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
