"""A user's mistakes: each is one line that names the mistake and the remedy, before a model is loaded; no traceback."""

import json
import os
import sys

import pytest

from trl_tafs.cli.arguments import PromptOptions
from trl_tafs.cli.main import main
from trl_tafs.cli.sample import sampling_parser
from trl_tafs.method.levels import LEVELS
from trl_tafs.method.options import MethodOptions

PROMPTS = "--prompts {folder}/prompts.txt"
MODEL = "--pretrained_model {model} --dtype float32"
SAMPLE = f"none {MODEL} --prompt seven"
EVALUATE = f"{MODEL} {PROMPTS} --reward jpeg_compressibility --output_dir {{folder}}/out"
YAML = {
    "broken": "seed: [1\n",
    "tab": "seed:\n\t1\n",
    "list": "- seed\n",
    "text": "seed\n",
    "empty": "# nothing\n",
    "twice": "seed: 1\nlogdir: x\nseed: 2\n",
    "unknown": "num_epoch: 3\n",
    "hyphen": "num-epochs: 3\n",
    "number": "3: 4\n",
    "bool": "mixed_precision: no\n",
    "float": "seed: 1.5\n",
    "none": "num_epochs: null\n",
    "word": "num_epochs: many\n",
    "date": "run_name: 2024-01-01\n",
    "no_date": "run_name: 2024-13-45\n",
    "mapping": "reward: {clip_score: 1.0}\n",
    "inner": "reward: [clip_score: 1.0]\n",
    "nan": "beta: .nan\n",
    "nan_list": "reward_weights: [1e-3, .nan]\n",
    "nested": "tracker_kwargs: " + "[" * 500 + "]" * 500 + "\n",
    "deep": "tracker_kwargs: " + "{a: " * 40 + "1" + "}" * 40 + "\n",
    "env": "env: PATH\n",
    "tag": "seed: !!python/object/apply:os.system ['true']\n",
    "import": "import: {folder}/nowhere.py\n",
    "preset": "preset: pape\n",
    "anchor": "seed: *nothing\n",
    "settings": '{"num_processes": 1, "levels": [1.0], "sede": 1}',
}
MODULES = {
    "raises": "import os\n\nraise RuntimeError('not today')\n",
    "syntax": "def f(:\n",
    "missing": "import no_such_library\n",
    "leaves": "import sys\nsys.exit(3)\n",
    "things": "class Pipeline:\n    pass\n\nclass Reward:\n    def __init__(self, scale):\n        self.scale = scale\n"
    "    def __call__(self, *args):\n        return []\n\nnumber = 3\n",
}

COMMANDS = [  # (command, exit code, what is said)
    ("trian", 2, "there is no command 'trian'; did you mean 'train'?"),
    ("--train", 2, "there is no command '--train'; did you mean 'train'?"),
    ("serve", 2, "there is no command 'serve'"),
    ("env now", 2, "unknown argument 'now'"),
    ("env --json", 2, "unknown option '--json'"),
    # train: the command line
    ("train", 1, "--prompts is needed"),
    ("train prompts.txt", 2, "unknown argument 'prompts.txt'"),
    ("train --num_epoch 3", 2, "unknown option '--num_epoch'; did you mean '--num_epochs'?"),
    ("train --sample_num_step=3", 2, "'--sample_num_step'; did you mean '--sample_num_steps'?"),
    ("train --seed", 2, "--seed: expected one argument"),
    ("train --seed x", 2, "--seed: invalid int value: 'x'"),
    ("train --seed 1.5", 2, "--seed: invalid int value: '1.5'"),
    ("train --seed -1", 1, "seed is -1; it must be at least 0"),
    ("train --seed 99999999999999999999999999", 1, "seed is 99999999999999999999999999; it must be an integer"),
    ("train --beta nan", 1, "beta is nan; it must be a finite number or None"),
    ("train --nft_beta inf", 1, "nft_beta is inf; it must be a finite number"),
    ("train --reward_weights 1 nan", 1, "reward_weights[1] is nan"),
    ("train --reward_weights 0 0", 1, "reward_weights is [0.0, 0.0]"),
    ("train --train_use_ema maybe", 2, "--train_use_ema"),
    ("train --objective forwards", 1, "did you mean 'forward'?"),
    ("train --sample_kernel anealed", 1, "did you mean 'annealed'?"),
    ("train --step_credit rewards_to_go", 1, "did you mean 'reward_to_go'?"),
    ("train --preset flow_gpro", 1, "did you mean 'flow_grpo'?"),
    ("train --quantization nf8", 1, "quantization is 'nf8'; use nf4 or int8"),
    ("train --logdir=", 1, "logdir is ''"),
    ("train --project_kwargs x", 1, "project_kwargs isn't JSON"),
    ("train --project_kwargs [1]", 1, "project_kwargs must be a mapping"),
    ("train --project_kwargs total_limit=-1", 1, "project_kwargs isn't JSON"),
    ('train --project_kwargs {{"total_limit":-1}}', 1, "project_kwargs['total_limit'] is -1; it must be at least 1"),
    ('train --project_kwargs {{"total_limits":1}}', 1, "did you mean 'total_limit'?"),
    ('train --tracker_kwargs {{"wandb":3}}', 1, "tracker_kwargs['wandb'] is 3; it must be a mapping"),
    ('train --sampler_kwargs {{"a":NaN}}', 1, "sampler_kwargs['a'] is nan; it must be a finite number"),
    ('train --sampler_kwargs {{"a":1,"a":2}}', 1, "a key stands twice"),
    ("train --reward_options x", 1, "reward_options isn't JSON"),
    ("train --eval_num_steps 4 --eval-num-steps 8", 2, "--eval_num_steps is given more than once"),
    ("train --reward a --reward b", 2, "--reward is given more than once"),
    # train: files of options
    ("train --config", 2, "--config: expected one argument"),
    ("train --config {folder}/nowhere.yaml", 2, "nowhere.yaml can't be read: [Errno 2] No such file"),
    ("train --config {folder}", 2, "can't be read: [Errno 21] Is a directory"),
    ("train --config {folder}/latin.yaml", 2, "latin.yaml can't be read: {folder}/latin.yaml, line 2: byte 0xe9"),
    ("train --config {yaml}/broken.yaml", 2, "broken.yaml, line 2 can't be read"),
    ("train --config={yaml}/tab.yaml", 2, "tab.yaml, line 2 can't be read"),
    ("train --config {yaml}/list.yaml", 2, "list.yaml holds a list; write a line `name: value`"),
    ("train --config {yaml}/text.yaml", 2, "text.yaml holds a str"),
    ("train --config {yaml}/empty.yaml", 2, "empty.yaml is empty"),
    ("train --config {yaml}/twice.yaml", 2, "twice.yaml, line 3 can't be read: 'seed' stands twice"),
    ("train --config {yaml}/unknown.yaml", 2, "no option 'num_epoch'; did you mean 'num_epochs'?"),
    ("train --config {yaml}/hyphen.yaml", 2, "no option 'num-epochs'; did you mean 'num_epochs'?"),
    ("train --config {yaml}/number.yaml", 2, "there is no option 3"),
    ("train --config {yaml}/bool.yaml", 1, "mixed_precision is False; it must be text (in YAML, in quotes)"),
    ("train --config {yaml}/float.yaml", 1, "seed is 1.5; it must be an integer"),
    ("train --config {yaml}/none.yaml", 1, "num_epochs is None; it must be an integer"),
    ("train --config {yaml}/word.yaml", 2, "invalid int value: 'many'"),
    ("train --config {yaml}/date.yaml", 1, "run_name is datetime.date(2024, 1, 1); it must be text"),
    ("train --config {yaml}/no_date.yaml", 2, "no_date.yaml can't be read: month must be in 1..12"),
    ("train --config {yaml}/mapping.yaml", 1, "reward is {{'clip_score': 1.0}}; it must be a list"),
    ("train --config {yaml}/inner.yaml", 1, "reward[0] is {{'clip_score': 1.0}}; it must be text"),
    ("train --config {yaml}/nan.yaml", 1, "beta is nan"),
    ("train --config {yaml}/nan_list.yaml", 1, "reward_weights[1] is nan"),
    ("train --config {yaml}/nested.yaml", 2, "nested.yaml can't be read"),
    ("train --config {yaml}/deep.yaml", 1, "is nested more than 32 deep"),
    ("train --config {yaml}/env.yaml", 2, "env is 'PATH'; it must be a mapping"),
    ("train --config {yaml}/tag.yaml", 2, "could not determine a constructor"),
    ("train --config {yaml}/anchor.yaml", 2, "found undefined alias"),
    ("train --config {yaml}/import.yaml", 1, "--import {folder}/nowhere.py can't be imported: there is no file"),
    ("train --config {yaml}/preset.yaml", 1, "did you mean 'paper'?"),
    ("train --config {yaml}/settings.yaml", 1, "there is no option 'sede'; did you mean 'seed'?"),
    # train: what is imported
    ("train --import {folder}/nowhere.py", 1, "can't be imported: there is no file"),
    ("train --import no_such_module", 1, "ModuleNotFoundError: No module named 'no_such_module'"),
    ("train --import {modules}/raises.py", 1, "can't be imported: RuntimeError: not today, line 3"),
    ("train --import {modules}/syntax.py", 1, "can't be imported: SyntaxError"),
    ("train --import {modules}/leaves.py", 1, "can't be imported: SystemExit: 3, line 2"),
    ("train --import {modules}/things.py --objective mine", 1, "objective is 'mine'; use one of"),
    # train: prompts and rewards
    ("train --prompts {folder}/nowhere.txt", 1, "there is no prompt file"),
    ("train --prompts genevla", 1, "did you mean 'geneval'?"),
    ("train --prompts flow_grpo/ocr_trian", 1, "did you mean 'flow_grpo/ocr_train'?"),
    (f"train {PROMPTS} --reward pickscores", 1, "no reward 'pickscores'; use one of"),
    (f"train {PROMPTS} --reward pickscores", 1, "did you mean 'pickscore'?"),
    (f"train {PROMPTS} --reward clip_score=high", 1, "'high' is no number"),
    (f"train {PROMPTS} --reward clip_score=inf", 1, "a weight must be finite"),
    (f"train {PROMPTS} --reward jpeg_compressibility jpeg_compressibility", 1, "names 'jpeg_compressibility' twice"),
    (f"train {PROMPTS} --reward {{modules}}/raises.py:f", 1, "can't be imported: RuntimeError: not today, line 3"),
    (f"train {PROMPTS} --reward {{modules}}/missing.py:f", 1, "No module named 'no_such_library', line 1"),
    (f"train {PROMPTS} --reward {{modules}}/things.py:Rewards", 1, "did you mean 'Reward'?"),
    (f"train {PROMPTS} --reward {{modules}}/things.py:Reward", 1, "can't be made: TypeError"),
    (f"train {PROMPTS} --reward {{modules}}/things.py:", 1, "write 'module:name' or 'file.py:name'"),
    (f"train {PROMPTS} --reward http://", 1, "an address must be http://host:port"),
    (f"train {PROMPTS} --reward http://127.0.0.1:9", 1, "no reward server answers"),
    (f'train {PROMPTS} --reward_options {{{{"a":{{{{}}}}}}}}', 1, "reward_options are for a; the rewards are"),
    # train: the model
    (f"train {PROMPTS} --reward jpeg_compressibility --pretrained_model {{folder}}/x", 1, "/x can't be loaded"),
    (f"train {PROMPTS} --reward jpeg_compressibility --pretrained_model {{folder}}", 1, "can't be loaded"),
    (f"train {PROMPTS} --reward jpeg_compressibility --pipeline_class {{modules}}/things.py:number", 1, "is 3, no"),
    (f"train {PROMPTS} --reward jpeg_compressibility --pipeline_class {{modules}}/things.py:Pipeline", 1, "no TAFS pi"),
    (f"train {PROMPTS} --reward jpeg_compressibility --pipeline_class {{modules}}/things.py:Pipelin", 1, "did you"),
    (f"train {PROMPTS} --reward jpeg_compressibility --quantization nf4", 1, 'pip install "trl_tafs[8bit]"'),
    (f"train {PROMPTS} --train_use_8bit_adam True", 1, 'pip install "trl_tafs[8bit]"'),
    # sample
    ("sample", 2, "the following arguments are required: --prompt, --pretrained_model, adapter"),
    (f"sample {SAMPLE} --num_step 3", 2, "did you mean '--num_steps'?"),
    (f"sample {SAMPLE} --num_steps 0", 2, "--num_steps is 0; it must be at least 1"),
    (f"sample {SAMPLE} --height -8", 2, "--height is -8"),
    (f"sample {SAMPLE} --seed -1", 2, "--seed is -1"),
    (f"sample {SAMPLE} --guidance_scale nan", 1, "guidance_scale is nan; it must be a finite number"),
    (f"sample {SAMPLE} --sampler ddim", 2, "invalid choice: 'ddim'"),
    (f"sample {SAMPLE} --dtype fp16", 2, "invalid choice: 'fp16'"),
    (f"sample {SAMPLE} --quantization x", 1, "use nf4 or int8"),
    (f"sample {SAMPLE} --negative_prompt x", 1, "without guidance it has no effect"),
    (f"sample {SAMPLE} --output {{folder}}/x.jpg", 1, "a name that ends in .png"),
    (f"sample {SAMPLE} --output {{folder}}/folder.png", 1, "folder.png is a folder"),
    (f"sample {SAMPLE} --output {{folder}}/prompts.txt/x.png", 1, "--output is '{folder}/prompts.txt', which can't be"),
    (f"sample {SAMPLE} --output /proc/x.png", 1, "--output is '/proc', which can't be written"),
    (f"sample {SAMPLE} --pipeline_class nowhere.py:A", 1, "there is no file nowhere.py"),
    (f"sample {SAMPLE} --import nowhere.py", 1, "there is no file nowhere.py"),
    (f"sample {{folder}} {MODEL} --prompt x", 1, "the folder holds no pytorch_lora_weights.safetensors"),
    (f"sample {{folder}}/no/where {MODEL} --prompt x", 1, "the adapter {folder}/no/where can't be loaded"),
    (f"sample {{folder}}/torn {MODEL} --prompt x --output {{folder}}/a.png", 1, "(4 bytes) is torn"),
    ("sample none --pretrained_model {folder}/x --prompt x", 1, "the model {folder}/x can't be loaded"),
    (f"sample {SAMPLE} --height 7 --output {{folder}}/a.png", 1, "height and width must be multiples of"),
    # evaluate
    ("evaluate", 2, "the following arguments are required"),
    (f"evaluate none {EVALUATE} --sampler ddim", 2, "invalid choice: 'ddim'"),
    (f"evaluate none {EVALUATE} --num_steps 4 0", 2, "--num_steps is 0"),
    (f"evaluate none {EVALUATE} --batch_size 0", 2, "--batch_size is 0"),
    (f"evaluate none {EVALUATE} --max_prompts 0", 2, "--max_prompts is 0"),
    (f"evaluate none {EVALUATE} --size 8", 1, "--size '8' isn't HEIGHTxWIDTH"),
    (f"evaluate none {EVALUATE} --size 0x8", 1, "--size '0x8' isn't HEIGHTxWIDTH"),
    (f"evaluate none none {EVALUATE}", 1, "an adapter is named twice"),
    (f"evaluate {{folder}} {EVALUATE} --push", 1, "is local; push it first"),
    (f"evaluate {{folder}} {EVALUATE}", 1, "the folder holds no pytorch_lora_weights.safetensors"),
    (f"evaluate none {EVALUATE} --reward_options [", 1, "reward_options isn't JSON"),
    (f"evaluate none {EVALUATE} --reward a --reward b", 2, "--reward is given more than once"),
    (f"evaluate none {EVALUATE}/../prompts.txt", 1, "--output_dir is '{folder}/out/../prompts.txt', which"),
    (f"evaluate none {EVALUATE} --size 7x7", 1, "height and width must be multiples of"),
    # serve-reward
    ("serve-reward", 2, "the following arguments are required: name"),
    ("serve-reward clip_scor", 1, "did you mean 'clip_score'?"),
    ("serve-reward jpeg_compressibility --port 99999", 2, "--port is 99999"),
    ("serve-reward jpeg_compressibility --port x", 2, "invalid int value"),
    ("serve-reward jpeg_compressibility --max_images 0", 2, "--max_images is 0"),
    ("serve-reward jpeg_compressibility --host 0.0.0.0", 1, "can be reached from other machines"),
    ("serve-reward jpeg_compressibility --options x", 1, "options isn't JSON"),
    ('serve-reward jpeg_compressibility --options {{"a":1}}', 1, "is a function, which takes no options"),
    ('serve-reward remote --options {{"endpoint":"http://h"}}', 1, "did you mean 'endpoints'?"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory, pipeline_folder):
    """Folders with files of every kind of mistake, by the names that the commands have for them."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("yaml", "modules", "folder.png", "torn"):
        (folder / name).mkdir()
    (folder / "prompts.txt").write_text("seven\n")
    (folder / "latin.yaml").write_bytes("seed: 1\nlogdir: caf\xe9\n".encode("latin-1"))
    (folder / "torn" / "pytorch_lora_weights.safetensors").write_bytes(b"torn")
    for name, text in YAML.items():
        (folder / "yaml" / f"{name}.yaml").write_text(text.replace("{folder}", str(folder)))
    for name, text in MODULES.items():
        (folder / "modules" / f"{name}.py").write_text(text)
    return {"folder": folder, "yaml": folder / "yaml", "modules": folder / "modules", "model": pipeline_folder}


@pytest.mark.parametrize(
    ("command", "code", "told"), COMMANDS, ids=[f"{i}-{c[0][:40]}" for i, c in enumerate(COMMANDS)]
)
def test_a_mistake_is_one_line_that_names_it(command, code, told, places, capsys, monkeypatch):
    monkeypatch.chdir(places["folder"])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    words = [word.format(**places) for word in command.split()]
    assert main(words) == code
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("trl-tafs")]
    assert len(lines) == 1 and "Traceback" not in said, said
    assert told.format(**places) in lines[0]


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("uvicorn", "serve-reward jpeg_compressibility", "server"),
        ("starlette", "serve-reward jpeg_compressibility", "server"),
        ("onnxruntime", f"train {PROMPTS} --reward ocr", "ocr"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(package, command, extra, places, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as Python marks what isn't there
    assert main([word.format(**places) for word in command.split()]) == 1
    said = capsys.readouterr().err
    assert f'needs {package}: pip install "trl_tafs[{extra}]"' in said and said.count("\n") == 1


def test_an_interrupt_is_one_line_and_130(places, capsys, tmp_path):
    module = tmp_path / "stops.py"
    module.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    assert main(["train", "--import", str(module)]) == 130
    assert capsys.readouterr().err == "trl-tafs train: interrupted\n"


def test_help_is_no_mistake_and_has_every_group_under_its_title(capsys):
    assert main(["train", "--help-all"]) == 0
    shown = capsys.readouterr().out
    titles = ("Script:", "Run:", "Sampling:", "Images and models:", "Rewards:", "Credit:", "Objective:", "Hub:")
    where = [shown.index(f"\n{title}") for title in titles]
    assert where == sorted(where) and shown.index("--sample_kernel") > shown.index("\nSampling:")


def test_a_fault_that_is_no_mistake_is_shown_whole(places, tmp_path):
    """A ValueError of someone else's code, in the work, keeps its traceback."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from trl_tafs import TAFSStableDiffusion3Pipeline\n\nclass Mine(TAFSStableDiffusion3Pipeline):\n"
        "    def encode_prompt(self, *args, **kwargs):\n        raise ValueError('a bug')\n"
    )
    command = f"sample {SAMPLE} --height 8 --width 8 --output {tmp_path}/a.png --pipeline_class {file}:Mine"
    with pytest.raises(ValueError, match="a bug"):
        main(command.format(**places).split())


def test_one_command_reads_what_python_reads(tmp_path):
    """Numbers that YAML takes for text, in lists too."""
    from trl_tafs.cli.arguments import parse_arguments

    file = tmp_path / "config.yaml"
    file.write_text(
        "train_learning_rate: 1e-4\nreward_weights: [1e-1, 2, 0.5]\neval_num_steps: ['4', 8]\nheight: '64'\n"
    )
    _, config = parse_arguments(["--config", str(file)])
    assert (config.train_learning_rate, config.reward_weights, config.height) == (1e-4, [0.1, 2.0, 0.5], 64)
    assert config.eval_num_steps == [4, 8] and all(type(w) is float for w in config.reward_weights)
    file.write_text(json.dumps({"env": {"A_TEST": 7}, "seed": 3}))
    assert parse_arguments(["--config", str(file)])[1].seed == 3 and os.environ.pop("A_TEST") == "7"


def test_the_command_line_offers_the_levels_that_there_are():
    assert PromptOptions().levels == MethodOptions().sample_levels
    (action,) = [action for action in sampling_parser()._actions if action.dest == "levels"]
    assert tuple(action.choices) == LEVELS and action.default == MethodOptions().sample_levels
