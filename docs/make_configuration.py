"""Write docs/configuration.md from the help texts of `TAFSGRPOConfig` and of the command line's own arguments.

python docs/make_configuration.py            # write it
python docs/make_configuration.py --check    # say whether it is up to date, exit 1 where it isn't
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from pathlib import Path

from trl_tafs import presets
from trl_tafs.cli.arguments import ScriptArguments
from trl_tafs.config import TAFSGRPOConfig
from trl_tafs.output.markdown import table

TARGET = Path(__file__).with_name("configuration.md")
COMPUTED = {"exp_name": "the script's name"}  # defaults that are another on every machine
INTRO = """\
# Configuration

Written by `python docs/make_configuration.py` from the help texts in the files `options.py`, each beside what it
configures; change them there.

Every field of `TAFSGRPOConfig` can be set in Python, on the command line and in YAML. What is given on the command line
counts more than what is in the file. An unknown field is an error in all three, as is a value of another type, a number
that isn't finite, or one that can't work: one line names the field, the value and what it can be.

```python
from trl_tafs import TAFSGRPOConfig

config = TAFSGRPOConfig(run_name="first", sample_num_steps=4, project_kwargs={"project_dir": "runs/first"})
```

```bash
trl-tafs train --prompts prompts.txt --run_name first --sample_num_steps 4 \\
    --project_kwargs '{"project_dir": "runs/first"}' --eval_num_steps 4 8 --train_gradient_checkpointing True
```

```yaml
# trl-tafs train --config first.yaml
prompts: prompts.txt
run_name: first
sample_num_steps: 4
project_kwargs: {project_dir: runs/first}
eval_num_steps: [4, 8]
train_gradient_checkpointing: true
```

Lists take their items one after the other, mappings are JSON. In YAML, write `mixed_precision: "no"` with its quotes.
A run's `training_settings.json`, published beside its adapter, and its `config.json` are configurations too:
`--config training_settings.json`, or `TAFSGRPOConfig.from_settings(path)`, is a new run with the same settings, given
the same number of processes.
Names are `DDPOConfig`'s and `GRPOConfig`'s where these have one. Defaults are the paper's where it gives them; the
text says so.
"""


def sections() -> list[tuple[type, list[str]]]:
    """The groups of options that `TAFSGRPOConfig` inherits, each with its own fields, in the order of the fields."""
    groups = [group for group in reversed(TAFSGRPOConfig.__mro__) if "title" in vars(group)]
    return [(group, [name for name in inspect.get_annotations(group) if name != "title"]) for group in groups]


def fields_table(cls: type, names: list[str]) -> str:
    """Name, type, default and help text of each field."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types = inspect.get_annotations(cls)  # as written; a parser that was made of the class puts types into its fields
    shown = [fields[name] for name in names]
    rows = [(f"`{f.name}`", f"`{types[f.name]}`", default(f), f.metadata["help"]) for f in shown]
    return table(["Field", "Type", "Default", "What"], rows)


def default(field: dataclasses.Field) -> str:
    """The default as it is written in Python."""
    if field.name in COMPUTED:
        return COMPUTED[field.name]
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return f"`{field.default!r}`".replace("'", '"')


def preset_rows() -> str:
    """Each preset with the options that set it apart."""
    shown = {name: [f"`{k}={v!r}`" for k, v in options.items()] for name, options in presets.PRESETS.items()}
    rows = [(f"`{name}`", ", ".join(options), presets.DIFFERENCES.get(name, "")) for name, options in shown.items()]
    return table(["Preset", "Options", "Differs from its source in"], rows)


def text() -> str:
    """The whole document."""
    parts = [INTRO]
    for group, names in sections():
        parts.append(f"## {vars(group)['title']}\n\n{fields_table(group, names)}\n")
    names = [field.name for field in dataclasses.fields(ScriptArguments)]
    parts.append(
        "## Command line only\n\nOf `trl-tafs train` and `examples/train_sd3.py`, beside all of the above and "
        f"`--config FILE.yaml`.\n\n{fields_table(ScriptArguments, names)}\n"
    )
    parts.append(
        "## Presets\n\n`TAFSGRPOConfig.from_preset(name, ...)`, `--preset NAME`: the methods of the papers, whose "
        "options you can still change. Where each value is from stands beside it in `trl_tafs/presets.py`; how they "
        f"compare: [benchmarks.md](benchmarks.md). Steps, log-probabilities, losses, gradients and advantages are "
        "tested against the public code's (`tests/method/test_preset_parity.py`); the last column says what differs."
        f"\n\n{preset_rows()}\n"
    )
    return "\n".join(parts)


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the document is out of date")
    if parser.parse_args().check:
        current = TARGET.exists() and TARGET.read_text() == text()
        print(f"{TARGET.name} is {'up to date' if current else 'out of date: run python docs/make_configuration.py'}")
        return 0 if current else 1
    TARGET.write_text(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
