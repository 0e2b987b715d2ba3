"""Whatever is given for an option is taken as its annotation has it, or refused by a ValueError that names it."""

import dataclasses
import datetime
import decimal
import fractions
import math
import types
import warnings
from pathlib import Path
from typing import Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trl_tafs import TAFSGRPOConfig
from trl_tafs.cli.arguments import ScriptArguments, training_parser
from trl_tafs.cli.main import main

CYCLE = {}
CYCLE["again"] = CYCLE
EDGES = [0, -1, 1, 2, 10**400, 2**63, -(2**63), 0.0, -0.0, 5e-324, 1e308, math.nan, math.inf, -math.inf, "", " ", "3"]
EDGES += ["1e-4", "nan", "true", "None", "null", "{}", "[]", "[1]", '{"a": NaN}', "\0", "\ud800", "annealed", "forward"]
EDGES += [
    [],
    (),
    {},
    [[]],
    [None],
    ["ode"],
    [4],
    (4, 8),
    [math.nan],
    {"a": math.nan},
    {1: 2},
    {"total_limit": -1},
    CYCLE,
]
EDGES += ["[" * 5_000, b"x", bytearray(b"x"), {1}, range(3), object, len, Ellipsis, 1j, Path("x"), torch.float32]
EDGES += [
    np.float32(0.5),
    np.float64("nan"),
    np.int64(3),
    np.bool_(True),
    np.array(3),
    np.array([1.0, 2.0]),
    np.str_("x"),
]
EDGES += [torch.tensor(0.5), torch.tensor([1, 2]), torch.tensor(3, device="meta"), decimal.Decimal(1)]
EDGES += [fractions.Fraction(1, 3), datetime.date(2024, 1, 1), np.array(["a", "b"]), np.longdouble(1), np.str_("x")]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
ANY = st.sampled_from(EDGES) | st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
KINDS = (TAFSGRPOConfig, ScriptArguments)
FIELDS = [(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)]
SMALL = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
LARGE = settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))


def fits(value, hint):
    """Whether a value is of an annotation, to the class, and every number in it finite."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = get_args(hint)
        if dict in (get_origin(kind) or kind for kind in kinds):  # never None or JSON
            return isinstance(value, dict)
        return any(fits(value, kind) for kind in kinds)
    if get_origin(hint) is list:
        return type(value) is list and bool(value) and all(fits(item, get_args(hint)[0]) for item in value)
    return type(value) is hint and (hint is not float or math.isfinite(value))


def check(kind, values):
    """One construction: it is refused by name, or what it holds fits, and is taken again as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = kind(**values)
        except ValueError as error:
            said = str(error)
            assert any(name in said for name in values), said
            assert "\n" not in said and len(said) < 2000, said
            return
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            value = getattr(made, field.name)
            assert fits(value, hints[field.name]), (field.name, value)
        again = kind(**dataclasses.asdict(made))
    assert dataclasses.asdict(again) == dataclasses.asdict(made)


WRONG = {  # of each kind, what is none of it
    bool: [1, 0.0, "false", np.array([True])],
    int: [1.5, True, "3", 2**63, np.float64(3.0), torch.tensor(1.5)],
    float: [math.nan, -math.inf, 10**400, True, "0.1", 1j, np.float32("inf"), torch.tensor(math.nan)],
    str: [3, b"x", "a\0", "\ud800", False, ["x"]],
    list: [[], "x", 3, {}, [[]], [object()], [math.nan], {1.0}],
    dict: ["x", [1], {"a": math.nan}, {1: 2}, {"a": [{"b": math.inf}]}, '{"a": NaN}', '{"a": 1, "a": 2}', CYCLE],
}
RIGHT = [  # what is taken, and as what
    ("seed", np.int64(3), 3),
    ("beta", np.float64(0.5), 0.5),
    ("beta", 1, 1.0),
    ("beta", torch.tensor(0.5), 0.5),
    ("train_use_ema", np.bool_(True), True),
    ("reward_weights", np.array([1.0, 2.0]), [1.0, 2.0]),
    ("reward_weights", (1, 2), [1.0, 2.0]),
    ("logdir", Path("a/b"), "a/b"),
    ("run_name", np.str_("x"), "x"),
    ("accelerator_kwargs", '{"a": [1]}', {"a": [1]}),
]


def test_every_field_refuses_what_its_annotation_is_not():
    refused = 0
    for kind, name in FIELDS:
        hint = get_type_hints(kind)[name]
        kinds = [get_origin(k) or k for k in (get_args(hint) if isinstance(hint, types.UnionType) else (hint,))]
        for wrong in WRONG[next(known for known in (dict, list, bool, int, float, str) if known in kinds)]:
            with pytest.raises(ValueError, match=f"^{name}"):
                kind(**{name: wrong})
            refused += 1
    assert refused > 500


def test_numbers_of_other_libraries_and_paths_are_taken_as_pythons_own():
    for name, given_value, expected in RIGHT:
        taken = getattr(TAFSGRPOConfig(**{name: given_value}), name)
        assert taken == expected and type(taken) is type(expected), name


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_every_field_takes_or_refuses_every_edge(kind, name):
    for value in EDGES:
        check(kind, {name: value})


ONE = st.tuples(st.sampled_from(FIELDS), ANY)
NAMES = [field.name for field in dataclasses.fields(TAFSGRPOConfig)]
SOME = st.dictionaries(st.sampled_from(NAMES), ANY, min_size=2, max_size=4)


@SMALL
@given(ONE)
@example(((TAFSGRPOConfig, "project_kwargs"), {"total_limit": 0}))
@example(((TAFSGRPOConfig, "seed"), torch.tensor(3, device="meta")))
def test_any_value_for_any_field(case):
    (kind, name), value = case
    check(kind, {name: value})


@SMALL
@given(SOME)
def test_any_values_for_some_fields(values):
    check(TAFSGRPOConfig, values)


@pytest.mark.slow
@LARGE
@given(ONE)
def test_any_value_for_any_field_at_length(case):
    (kind, name), value = case
    check(kind, {name: value})


@pytest.mark.slow
@LARGE
@given(SOME)
def test_any_values_for_some_fields_at_length(values):
    check(TAFSGRPOConfig, values)


# Command lines and files: without --prompts, nothing is ever begun ------------------------------------------------

FLAGS = [word for action in training_parser()._actions for word in action.option_strings]
FLAGS = [
    flag
    for flag in FLAGS
    if flag not in ("-h", "--help", "--help-all", "--prompts", "--import", "--imports", "--config")
]
WORDS = st.sampled_from([*FLAGS, "0", "1", "-1", "nan", "x", "true", "{}", "--", "-x", "="]) | st.text(max_size=6)


@settings(SMALL, max_examples=25)
@given(st.lists(WORDS, max_size=6))
def test_any_command_line_is_one_line(words):
    assert main(["train", *words]) in (1, 2) or any(word.startswith(("-h", "--h")) for word in words)


@settings(SMALL, max_examples=25)
@given(st.binary(max_size=60) | st.text(alphabet=":-[]{}&*!|>'\"%@`\n\t #aseed1", max_size=60).map(str.encode))
def test_any_file_is_one_line(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) in (1, 2)


@pytest.mark.slow
@settings(LARGE, max_examples=2000)
@given(st.lists(WORDS, max_size=6))
def test_any_command_line_is_one_line_at_length(words):
    assert main(["train", *words]) in (1, 2) or any(word.startswith(("-h", "--h")) for word in words)
