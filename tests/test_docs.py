"""The documents tell the truth: their code runs, their commands parse, their links and names lead somewhere."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from unittest import mock

import pytest
import tiny
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from tiny import ROOT

from trl_tafs import AutoTAFSPipeline, TAFSGRPOConfig, TAFSGRPOTrainer
from trl_tafs.cli.arguments import ScriptArguments, parse_arguments
from trl_tafs.cli.evaluate import evaluation_parser
from trl_tafs.cli.main import COMMANDS as SUBCOMMANDS
from trl_tafs.cli.main import main
from trl_tafs.cli.sample import sampling_parser
from trl_tafs.cli.serve import serving_parser
from trl_tafs.hub import publisher
from trl_tafs.hub.push import PUSHED
from trl_tafs.method.credit import CREDITS
from trl_tafs.method.kernels import KERNELS
from trl_tafs.method.objectives import OBJECTIVES
from trl_tafs.options import decode_dict
from trl_tafs.rewards.loading import reward_label
from trl_tafs.training.checkpoint_files import checkpoints

DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
EXPECTED = {"algorithm", "configuration", "adapters", "rewards", "checkpoints", "extending", "distributed", "learning"}
EXPECTED |= {"new_family", "memory", "scaling", "benchmarks", "evaluation", "watching", "methods", "recipes", "start"}
BLOCK = re.compile(r"(<!-- test: run -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BASE, ADAPTER = "stabilityai/stable-diffusion-3.5-medium", "you/sd35m-red"
FIELDS = {field.name for field in dataclasses.fields(TAFSGRPOConfig)}
ARGUMENTS = {field.name for field in dataclasses.fields(ScriptArguments)}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, *languages):
    """(marked to run, first line's number, code) of each block in one of the languages."""
    text = read(name)
    for match in BLOCK.finditer(text):
        if match[2] in languages:
            yield bool(match[1]), text[: match.start(3)].count("\n"), match[3]


def prose(name):
    return BLOCK.sub("", read(name))


def test_the_documents_are_there():
    assert EXPECTED <= {name.removeprefix("docs/").removesuffix(".md") for name in DOCUMENTS}


# Python -------------------------------------------------------------------------------------------------------


def test_python_compiles_and_imports_what_exists():
    offenders = []
    for name in DOCUMENTS:
        for _, line, code in blocks(name, "python", "py"):
            tree = ast.parse("\n" * line + code, filename=name)
            compile(tree, name, "exec")
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "trl_tafs":
                    module = importlib.import_module(node.module)
                    missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                    offenders += [f"{name}:{node.lineno}: {node.module}.{alias}" for alias in missing]
    assert not offenders


@pytest.fixture
def adapter(pipeline, tmp_path):
    """An adapter where README's training leaves its own."""
    folder = tiny.trainer(pipeline, tmp_path / "logs" / "sd35m-red").save_pretrained()
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def shrink(code, base, adapter):
    """The code with a tiny model at the place of SD3.5-medium, and as few images."""
    changes = {
        f"{BASE}": str(base),
        f'adapter = "{base}", "{ADAPTER}"': f'adapter = "{base}", "{adapter}"',
        '"cuda"': '"cpu"',
        '"height": 512, "width": 512': '"height": 8, "width": 8',
        "height=512, width=512": "height=8, width=8",
        "sample_num_batches_per_epoch=24": "sample_num_batches_per_epoch=2, disable_tqdm=True",
    }
    for old, new in changes.items():
        code = code.replace(old, new)
    return code


RUN = [name for name in DOCUMENTS if any(marked for marked, _, _ in blocks(name, "python"))]


@pytest.fixture
def registries():
    """What a document registers is gone after it, and is registered anew when it is imported again."""
    with mock.patch.dict(CREDITS), mock.patch.dict(OBJECTIVES), mock.patch.dict(KERNELS):
        yield
    for name in [name for name in sys.modules if name.startswith("own_parts_")]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("name", RUN)
def test_marked_python_runs(name, pipeline_folder, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pushed = []
    monkeypatch.setattr(publisher, "prepare_repo", lambda repo_id, **options: repo_id)
    monkeypatch.setattr(publisher, "push_folder", lambda folder, repo_id, **options: pushed.append((folder, repo_id)))
    train = TAFSGRPOTrainer.train
    monkeypatch.setattr(TAFSGRPOTrainer, "train", lambda self: train(self, min(self.config.num_epochs, 2)))
    scope = {"__name__": "__main__"}
    for marked, line, code in blocks(name, "python"):
        if marked:
            source = "\n" * line + shrink(code, pipeline_folder, adapter)
            exec(compile(source, str(ROOT / name), "exec"), scope)
    if name == "README.md":
        assert [repo_id for _, repo_id in pushed] == [ADAPTER]
        assert scope["image"].size == (8, 8)
        assert {path.name for path in (tmp_path / "logs" / "sd35m-red").iterdir()} >= {"adapter", "metrics.jsonl"}
    if name == "docs/checkpoints.md":
        check_the_run_folder(tmp_path / "logs" / "resumed", read(name))


def check_the_run_folder(folder, text):
    """The files that the document lists are those that a run has."""
    found = {path.name for path in checkpoints(folder / "checkpoints")[-1].iterdir()}
    assert all(name in text for name in found), found
    top = {path.name for path in folder.iterdir()}
    assert all(re.search(rf"^{re.escape(name)}(/|\s)", text, re.MULTILINE) for name in top), top
    assert {"config.json", "metrics.jsonl", "checkpoints", "adapter"} <= top


# Commands -----------------------------------------------------------------------------------------------------


def commands(name):
    """The commands of a document's shell blocks, as argument lists."""
    for _, line, code in blocks(name, "bash", "sh", "shell", "console"):
        for command in code.replace("\\\n", " ").splitlines():
            if words := shlex.split(command, comments=True):
                yield f"{name}, block at line {line}", words


def parse_training(options):
    """As `trl-tafs train` and the example do; an unknown flag or value is an error."""
    arguments, config = parse_arguments(list(options))
    assert arguments.prompts
    return config


class Parsed(BaseException):
    """Raised where a command would begin to work."""


def parse_sampling(options):
    if sampling_parser().parse_args(options).adapter.startswith("runs/"):
        return  # of a run that isn't there

    def stop(*args, **kwargs):
        raise Parsed

    with mock.patch.object(AutoTAFSPipeline, "from_pretrained", stop), pytest.raises(Parsed):
        main(["sample", *options])


def flags_of(script):
    """The flags that a script's `add_argument` calls name."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    names = [call.args for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    return {name.value for arguments in names for name in arguments if isinstance(name, ast.Constant)}


def check_script(words):
    script = ROOT / words[0]
    assert script.is_file(), words[0]
    if "parse_arguments" in script.read_text() or "cli.main" in script.read_text():
        parse_training(words[1:])
        return
    unknown = {word.partition("=")[0] for word in words[1:] if word.startswith("--")} - flags_of(script)
    assert not unknown, f"{words[0]} has no {unknown}"


def check_make(words):
    targets = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_command(words):
    """An error where a command would not be understood."""
    if words[0] == "make":
        check_make(words)
    elif words[0] == "python":
        check_script(words[1:])
    elif words[:2] == ["accelerate", "launch"]:
        options = launch_command_parser().parse_args(words[2:])
        check_script([options.training_script, *options.training_script_args])
    elif words[:2] == ["trl-tafs", "train"]:
        parse_training(words[2:])
    elif words[:2] == ["trl-tafs", "sample"]:
        parse_sampling(words[2:])
    elif words[:2] == ["trl-tafs", "evaluate"]:
        options = evaluation_parser().parse_args(words[2:])
        assert {reward_label(item) for item in options.reward}
        decode_dict("reward_options", options.reward_options)
    elif words[:2] == ["trl-tafs", "serve-reward"]:
        decode_dict("options", serving_parser().parse_args(words[2:]).options)
    else:
        assert words[0] == "trl-tafs" and words[1] in SUBCOMMANDS, f"how is {words} to be checked?"


def refused(check, *arguments):
    """What a check says against its arguments, "" where nothing."""
    try:
        check(*arguments)
    except (Exception, SystemExit, pytest.fail.Exception) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.usefixtures("registries")
def test_commands_are_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [(where, words) for name in DOCUMENTS for where, words in commands(name)]
    assert len(found) > 30
    told = {f"{where}: {' '.join(words[:3])}": refused(check_command, words) for where, words in found}
    assert not {command: error for command, error in told.items() if error}


@pytest.mark.parametrize(
    "command",
    [
        "make quickstarts",
        "python examples/nowhere.py",
        "python examples/train_sd3.py --prompts x --train_speed 1",
        "python examples/digits/pretrain.py --nothing 1",
        "accelerate launch --num_processes two examples/train_sd3.py",
        "trl-tafs train --prompts x --objective typo",
        "trl-tafs sample --no_such_flag",
        "trl-tafs evaluate --no_such_flag",
        "trl-tafs serve-reward --no_such_flag",
        "trl-tafs dance",
        "ls",
    ],
)
def test_a_command_that_would_not_work_is_found(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert refused(check_command, shlex.split(command))


@pytest.mark.usefixtures("registries")
def test_yaml_is_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [(name, line, code) for name in DOCUMENTS for _, line, code in blocks(name, "yaml")]
    assert found
    path, told = tmp_path / "given.yaml", {}
    for name, line, code in found:
        path.write_text(code)
        told[f"{name}:{line}"] = refused(parse_training, ["--config", str(path)])
    assert not {place: error for place, error in told.items() if error}


def test_unknown_fields_are_refused_in_python_on_the_command_line_and_in_yaml(tmp_path):
    with pytest.raises(TypeError, match="train_speed"):
        TAFSGRPOConfig(train_speed=1)
    with pytest.raises(ValueError, match="train_speed"):
        parse_training(["--prompts", "prompts.txt", "--train_speed", "1"])
    (tmp_path / "x.yaml").write_text("prompts: prompts.txt\ntrain_speed: 1\n")
    with pytest.raises(ValueError, match="train_speed"):
        parse_training(["--config", str(tmp_path / "x.yaml")])


# Names and links ----------------------------------------------------------------------------------------------


def slug(heading):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken_links(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", file.read_text()), re.MULTILINE) if anchor else []
        if not file.exists() or (anchor and anchor not in map(slug, headings)):
            yield f"{name}: {target}"


def test_relative_links_resolve():
    readmes = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "examples").glob("*/README.md"))]
    assert not [link for name in (*DOCUMENTS, *readmes) for link in broken_links(name)]


def test_functions_named_exist():
    modules = {path.stem: path for path in sorted((ROOT / "trl_tafs").rglob("*.py")) if path.stem[0] != "_"}
    del modules["config"], modules["results"]  # `config.field` is of an object, `results.csv` a file
    pattern = re.compile(rf"`(?:\w+\.)*({'|'.join(modules)})\.([A-Za-z_][\w.]*)`")
    offenders, found = [], 0
    for name in DOCUMENTS:
        for module, path in pattern.findall(prose(name)):
            if path in ("py", "md", "json", "yaml"):
                continue
            found += 1
            file = modules[module].relative_to(ROOT).with_suffix("")
            item = importlib.import_module(".".join(file.parts))
            for part in path.split("."):
                item = getattr(item, part, None)
            offenders += [f"{name}: {module}.{path}"] if item is None else []
    assert found > 10 and not offenders


OTHER_NAMES = {"eval_reward_function", "reward_function", "reward_metadata", "reward_to_go", "eval_reward"}
OTHER_NAMES |= {"reward_std"}  # logged
OTHER_NAMES |= {"reward_funcs", "train_dataset", "eval_dataset", "reward_instruct"}  # GRPOTrainer's, a benchmark's


def test_fields_named_exist():
    pattern = re.compile(r"`(?:--)?((?:train|sample|eval|reward|per_prompt|early|metric_for)_\w+)[`=]")
    named = {(name, field) for name in DOCUMENTS for field in pattern.findall(prose(name))}
    assert not [(name, field) for name, field in sorted(named) if field not in FIELDS | ARGUMENTS | OTHER_NAMES]


def test_no_paths_of_a_machine():
    pattern = re.compile(r"(?<![\w/.<>)\]-])/[a-z]\w*/\S*|~/\S+|/(?:home|Users)/\S+")
    assert not {name: pattern.findall(read(name)) for name in DOCUMENTS if pattern.search(read(name))}
    assert not pattern.search(read("docs/make_configuration.py"))


def test_what_is_pushed_is_what_the_document_lists():
    text = read("docs/adapters.md")
    assert all(f"`{name}`" in text for name in PUSHED)


def test_levels_of_the_documents_are_those_that_are_trained(pipeline):
    given = json.loads("[1.0, 0.75, 0.5, 0.25]")
    assert pipeline.rollout_levels(4, 8, 8).tolist() == [*given, 0.0]
    assert str(given) in read("README.md") and str(given) in read("docs/adapters.md")


# docs/configuration.md ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_configuration():
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_configuration_is_up_to_date(make_configuration):
    assert read("docs/configuration.md") == make_configuration.text(), "run python docs/make_configuration.py"


def test_configuration_has_every_field_under_a_title(make_configuration):
    found = make_configuration.sections()
    assert [name for _, names in found for name in names] == [f.name for f in dataclasses.fields(TAFSGRPOConfig)]
    assert [vars(group)["title"] for group, _ in found][:2] == ["Run", "Sampling"]
    text = read("docs/configuration.md")
    assert all(f"\n| `{name}` |" in text for name in FIELDS | ARGUMENTS)
