"""One parser for every command: dataclasses of options under titles, positional ones, YAML, short and long help."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from trl_tafs.cli.parsing import UsageError, check_repeated, read_options
from trl_tafs.options import Options, field_types
from trl_tafs.output.errors import did_you_mean, shown

SCALARS = (str, int, float)


class CommandOptions(Options):
    """A group of a command's options: a dataclass, some of whose fields are positional."""

    positional: ClassVar[dict[str, str | None]] = {}  # field to argparse's nargs
    required: ClassVar[tuple[str, ...]] = ()  # options that have to be given


class Help(argparse.HelpFormatter):
    """Shows each option by one name, and what it takes in short words."""

    def __init__(self, prog: str, indent_increment: int = 2, max_help_position: int = 32, width: int | None = None):
        super().__init__(prog, indent_increment, max_help_position, width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        long = next((word for word in action.option_strings if word.startswith("--")), action.option_strings[0])
        name = f"-h, {long}" if "-h" in action.option_strings else long
        if action.nargs == 0:
            return name
        kind = "|".join(map(str, action.choices)) if action.choices else _kind(action)
        return f"{name} {kind} ..." if action.nargs in ("+", "*") else f"{name} {kind}"


def _kind(action: argparse.Action) -> str:
    if action.metavar:
        return str(action.metavar)
    known = {int: "N", float: "X", str: "TEXT"}
    if getattr(action.type, "__name__", "") == "string_to_bool":
        return "True|False"
    closed = [cell.cell_contents for cell in getattr(action.type, "__closure__", None) or ()]  # of an optional one
    kinds = [kind for kind in (action.type, *closed) if kind in known.keys()]
    return known[kinds[0]] if kinds else action.dest.upper()


def make_parser(kinds: Sequence[type], *, short: Collection[str] = (), **options: Any) -> Any:
    """Return the parser of a command.

    Args:
        kinds: dataclasses with a `title`; what each takes stands under it.
        short: the options that `--help` shows, the others being left to `--help-all`; none: all of them.
        options: of the parser: prog, description, usage, epilog.
    """
    from trl import TrlParser

    class Parser(CommandParser, TrlParser):
        pass

    parser = Parser([_plain(kind) for kind in kinds], **({"add_help": False, "formatter_class": Help} | options))
    parser.short, parser.allow_abbrev = frozenset(short), False
    for kind in kinds:
        for name, nargs in getattr(kind, "positional", {}).items():
            field = {field.name: field for field in dataclasses.fields(kind)}[name]
            given: dict[str, Any] = {"help": field.metadata["help"]} | ({} if nargs is None else {"nargs": nargs})
            parser.add_argument(name, **given)
    required = {name for kind in kinds for name in getattr(kind, "required", ())}
    for action in parser._actions:
        action.required = action.required or action.dest in required
    group = parser.add_argument_group("Help and files")
    group.add_argument("--config", metavar="FILE", help="a YAML file of these options")
    group.add_argument("-h", "--help", action="store_true", help="the options that are needed most")
    group.add_argument("--help-all", action="store_true", help="all options")
    return parser


class CommandParser(argparse.ArgumentParser):
    """What a command's parser does beside TRL's."""

    short: Collection[str] = ()

    def error(self, message: str) -> Any:
        """Raise UsageError; an option is called by its first name."""
        raise UsageError(re.sub(r"(--\w+)(/--[\w-]+)+", r"\1", " ".join(message.split())))

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Take over a file's values; one value for a list becomes a list, not a list of its letters."""
        lists = {action.dest: action.type for action in self._actions if action.nargs in ("+", "*")}
        for name in lists.keys() & values.keys():
            items = [values[name]] if isinstance(values[name], SCALARS) else values[name]
            if isinstance(items, list):  # YAML takes 1e-4 for text
                items = [_converted(item, lists[name]) for item in items]
            values[name] = items
        for action in self._actions:  # positional ones, which a file may give as well
            if not action.option_strings and action.dest in values:
                action.nargs = "?" if action.nargs is None else "*"
        return super().set_defaults_with_config(**values)  # type: ignore[misc]

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; print help and leave where it is asked for; raise UsageError for what is unknown or given twice."""
        words = list(args or ())
        for flag, everything in (("--help-all", True), ("--help", False), ("-h", False)):
            if flag in words:
                print(self.help(everything=everything), end="")
                raise SystemExit(0)
        found, unknown = self.parse_known_args(words, namespace)
        options = [word for action in self._actions for word in action.option_strings]
        if unknown:
            word = unknown[0].partition("=")[0]
            kind = "option" if word.startswith("--") else "argument"
            raise UsageError(f"unknown {kind} {shown(word)}{did_you_mean(word, options) if kind == 'option' else ''}")
        for action in self._actions:
            if action.nargs == "+" and action.option_strings:
                check_repeated(words, action.option_strings)
        return found

    def help(self, *, everything: bool) -> str:
        """Return the help text; without `everything` of the options that are needed most."""
        kept = {action: action.help for action in self._actions}
        if self.short and not everything:
            shown_too = {*self.short, "config", "help", "help_all"}
            for action in kept:
                if action.option_strings and (action.dest not in shown_too or _turns_off(action)):
                    action.help = argparse.SUPPRESS
        hidden = sum(action.help == argparse.SUPPRESS for action in kept)
        text = self.format_help()
        for action, told in kept.items():
            action.help = told
        return text + (f"\n{hidden} more options: --help-all, or docs/configuration.md\n" if hidden else "")


def _turns_off(action: argparse.Action) -> bool:
    return any(word.startswith("--no_") for word in action.option_strings)


def parse(
    kinds: Sequence[type], argv: Sequence[str], defaults: Any = None, *, parser: Any = None, **parser_options: Any
) -> tuple[Any, ...]:
    """Return an object of each kind.

    Each value is the command line's, else the file's, else the one of `defaults`, else the dataclass's. What is to be
    imported is imported first, so that names that it registers are known.

    Args:
        kinds: dataclasses.
        argv: the command line.
        defaults: given what the command line and the file say of `preset`, returns values below theirs.
        parser: that of the command; by default one is made of the kinds.
        parser_options: of `make_parser`.

    Raises:
        UsageError: something can't be understood.
        ValueError: something can't work.
    """
    argv = list(argv)
    parser = make_parser(kinds, **parser_options) if parser is None else parser
    asked_for_help = {"-h", "--help", "--help-all"} & set(argv)
    first, _ = _first_parser().parse_known_args(argv)
    names = [option.name for kind in kinds for option in dataclasses.fields(kind)]
    values = {} if asked_for_help or not first.config else read_options(first.config, [*names, "import", "env"])
    if "import" in values:
        values["imports"] = values.pop("import")
    _set_environment(values.pop("env", None))
    imports = values.get("imports") if first.imports is None else first.imports
    if not asked_for_help:
        import_all([imports] if isinstance(imports, str) else imports)
    if defaults is not None and not asked_for_help:
        parser.set_defaults(**defaults(values.get("preset") if first.preset is None else first.preset))
    parser.set_defaults_with_config(**values)
    given = {name: None if value == [] else value for name, value in vars(parser.parse_args(argv)).items()}
    return tuple(kind(**{option.name: given[option.name] for option in dataclasses.fields(kind)}) for kind in kinds)


def merged(options: Sequence[Any]) -> dict[str, Any]:
    """Return the values of several objects of options by name."""
    return {field.name: getattr(item, field.name) for item in options for field in dataclasses.fields(item)}


def _plain(kind: type) -> type:
    """Return a dataclass of the options of a kind that aren't positional, with its title for the parser."""
    positional, types = getattr(kind, "positional", {}), field_types(kind)
    if not positional:
        return type(kind.__name__, (kind,), {"_argument_group_name": kind.title})  # type: ignore[attr-defined]
    fields = []
    for field in dataclasses.fields(kind):
        if field.name not in positional:
            made = field.default_factory is not dataclasses.MISSING
            default: Any = {"default_factory": field.default_factory} if made else {"default": field.default}
            copied = dataclasses.field(metadata=field.metadata, **default)
            fields.append((field.name, types[field.name], copied))
    plain = dataclasses.make_dataclass(kind.__name__, fields)
    plain._argument_group_name = kind.title  # type: ignore[attr-defined]
    return plain


def _first_parser() -> argparse.ArgumentParser:
    """Return a parser of what decides how the rest is read."""

    class Parser(CommandParser):
        pass

    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--preset")
    parser.add_argument("--import", "--imports", dest="imports", nargs="+")
    return parser


def _converted(item: Any, kind: Any) -> Any:
    try:
        return kind(item) if isinstance(item, str) else item
    except ValueError:  # the field's check names it
        return item


def _set_environment(variables: Any) -> None:
    if variables is None:
        return
    if not isinstance(variables, dict):
        raise UsageError(f"env is {shown(variables)}; it must be a mapping of environment variables")
    os.environ.update({str(name): str(value) for name, value in variables.items()})


def import_all(names: Sequence[str] | None) -> None:
    """Run the files or modules of `--import`, which register parts of the user's own; raise ValueError if one can't."""
    from trl_tafs.rewards.loading import import_module_or_file

    for name in names or ():
        import_module_or_file(str(name), f"--import {name}")
