"""The command line: what it prints, what it refuses."""

import json

import pytest
import tiny
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from trl_tafs.cli.arguments import ScriptArguments, load_pipeline, load_rewards, parse_arguments
from trl_tafs.cli.main import main
from trl_tafs.cli.sample import _draw, sampling_parser
from trl_tafs.prompts.sets import load_prompts


def test_usage_lists_the_commands(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("train", "sample", "env"))
    assert main(["env"]) == 0
    assert "diffusers" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv"])
def test_prompts_from_files(tmp_path, suffix):
    path = tmp_path / f"prompts.{suffix}"
    rows = [{"prompt": "one", "digit": 1}, {"prompt": "two", "digit": 2}]
    path.write_text(
        {
            "txt": "one\n\ntwo\n",
            "jsonl": "\n".join(map(json.dumps, rows)),
            "json": json.dumps(rows),
            "csv": "prompt,digit\none,1\ntwo,2\n",
        }[suffix]
    )
    loaded = load_prompts(str(path))
    assert [row if isinstance(row, str) else row["prompt"] for row in loaded] == ["one", "two"]


def test_real_prompt_sets_are_read():
    folder = tiny.ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the prompt sets are not part of the project")
    for name in ("geneval/test_metadata.jsonl", "ocr/test.txt", "pickapic/test.txt"):
        source = tiny.TAFSGRPOTrainer.__init__.__globals__["PromptSource"](load_prompts(str(folder / name)))
        assert len({prompt for prompt, _ in source.groups(0, 50)}) > 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompts is needed"),
        (["--prompts", "nowhere.txt"], "no prompt file nowhere.txt"),
        (["--prompts", "{file}", "--reward", "pickscores=1"], "no reward 'pickscores'"),
        (["--prompts", "{file}", "--reward", "clip_score=high"], "'high' is no number"),
        (["--prompts", "{file}", "--sample_num_steps", "1"], "sample_num_steps is 1"),
        (["--prompts", "{file}", "--no_such_field", "1"], "no_such_field"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "prompts.txt").write_text("one\n")
    code = main(["train", *(a.format(file=tmp_path / "prompts.txt") for a in arguments)])
    error = capsys.readouterr().err
    assert code in (1, 2) and message in error and error.count("\n") == 1


def test_options_reach_the_rewards_of_both_lists(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "class Scaled:\n    def __init__(self, scale=1.0):\n        self.scale = scale\n"
        "    def __call__(self, images, prompts, metadata):\n        return self.scale * images.mean((1, 2, 3))\n"
        "class Other(Scaled):\n    pass\n"
    )
    options = {"Scaled": {"scale": 3.0}, "Other": {"scale": 4.0}}
    arguments = ScriptArguments(
        reward=[f"{file}:Scaled=0.5"],
        eval_reward=[f"{file}:Other", f"{file}:Scaled"],
        reward_options=json.dumps(options),
    )
    training, held_out = load_rewards(arguments)
    assert {name: (reward.scale, weight) for name, (reward, weight) in training.items()} == {"Scaled": (3.0, 0.5)}
    assert {name: reward.scale for name, (reward, _) in held_out.items()} == {"Other": 4.0, "Scaled": 3.0}
    with pytest.raises(ValueError, match="reward_options are for Scaled, Other; the rewards are Scaled"):
        load_rewards(ScriptArguments(reward=[f"{file}:Scaled"], reward_options=options))


def test_one_value_for_a_list_in_yaml_is_a_list_of_it(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "quantized_components: text_encoder\nreward: clip_score=1.0\neval_reward: jpeg_compressibility\n"
        "lora_target_modules: attn.to_k\neval_samplers: ode\neval_num_steps: 8\nreward_weights: 0.5\n"
    )
    arguments, config = parse_arguments(["--config", str(file)])
    assert arguments.quantized_components == ["text_encoder"] and arguments.reward == ["clip_score=1.0"]
    assert arguments.eval_reward == ["jpeg_compressibility"] and config.lora_target_modules == ["attn.to_k"]
    assert (config.eval_samplers, config.eval_num_steps, config.reward_weights) == (["ode"], [8], [0.5])
    file.write_text("reward: [clip_score=1.0, ocr]\nprompts: prompts.txt\n")
    arguments, config = parse_arguments(["--config", str(file), "--quantized_components", "vae"])
    assert arguments.reward == ["clip_score=1.0", "ocr"] and arguments.prompts == "prompts.txt"
    assert arguments.quantized_components == ["vae"] and config.lora_target_modules is None


def test_a_process_has_its_device_before_a_quantized_base_is_loaded(tmp_path):
    options = ["none", "--pretrained_model", str(tmp_path / "nowhere"), "--prompt", "one"]
    for quantized, set_up in ([], False), (["--quantization", "nf4"], True):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises((ValueError, ImportError), match="nowhere|quantization=nf4 needs bitsandbytes"):
            load_pipeline(sampling_parser().parse_args([*options, *quantized]), "float32")
        assert bool(PartialState._shared_state) is set_up


def test_the_command_samples_with_the_prompt_s_options(pipeline, capsys):
    def draw(*options):
        command = ["none", "--pretrained_model", "base", "--prompt", "a seven", "two", *options]
        return _draw(pipeline, sampling_parser().parse_args(command))

    options = ["--guidance_scale", "3", "--negative_prompt", "a two", "--max_sequence_length", "4"]
    expected = pipeline(
        prompt=["a seven", "two"],
        negative_prompt=["a two", "a two"],
        guidance_scale=3.0,
        max_sequence_length=4,
        annealed=True,
        height=8,
        width=8,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert torch.equal(draw(*options), expected)
    assert not torch.equal(draw(*options[:4]), expected) and not torch.equal(draw(*options[:2], *options[4:]), expected)
    assert main(["sample", "none", "--pretrained_model", "base", "--prompt", "two", *options[2:4]]) == 1
    assert "--negative_prompt is 'a two', and without guidance it has no effect" in capsys.readouterr().err


def test_train_then_sample(pipeline_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "config.yaml").write_text(
        f"pretrained_model: {pipeline_folder}\nlogdir: {tmp_path}\nrun_name: run\nmixed_precision: 'no'\n"
        "num_epochs: 1\nreward: [jpeg_compressibility=0.5]\n"
        "sample_batch_size: 4\nsample_num_batches_per_epoch: 2\ntrain_batch_size: 4\n"
    )
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    assert main(["train", "--config", str(tmp_path / "config.yaml"), *prompts, "--disable_tqdm", "True"]) == 0
    adapter, out = tmp_path / "run" / "adapter", tmp_path / "image.png"
    options = ["--pretrained_model", str(pipeline_folder), "--prompt", "one", "two", "--dtype", "float32"]
    assert main(["sample", str(adapter), *options, "--output", str(out)]) == 0
    assert "2 images in" in capsys.readouterr().out and out.stat().st_size > 0


def test_pictures_of_nan_are_no_result(pipeline, tmp_path, capsys):
    """Of a VAE whose weight is damaged, and of a denoiser whose output overflows."""
    (tmp_path / "prompts.txt").write_text("one\n")
    out = tmp_path / "image.png"
    for part, weight, said in (
        ("vae", "decoder.conv_in.weight", "the VAE (AutoencoderKL, float32) decoded finite latents to NaN or infinity"),
        ("transformer", "proj_out.weight", "the denoiser (SD3Transformer2DModel, float32) made NaN or infinity"),
    ):
        parameter = dict(getattr(pipeline, part).named_parameters())[weight]
        kept = parameter.data.clone()
        parameter.data.fill_(float("inf"))
        pipeline.save_pretrained(tmp_path / part)
        parameter.data.copy_(kept)
        base = ["none", "--pretrained_model", str(tmp_path / part), "--dtype", "float32", "--num_steps", "2"]
        assert main(["sample", *base, "--prompt", "one", "--output", str(out)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert said in error and f"its weight {weight} isn't finite" in error and not out.exists()
        scored = ["--prompts", str(tmp_path / "prompts.txt"), "--reward", "jpeg_compressibility"]
        assert main(["evaluate", *base, *scored, "--output_dir", str(tmp_path / f"{part}-scores")]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"evaluation, annealed_2_8x8: {said}" in error and "what was scored is kept in" in error
