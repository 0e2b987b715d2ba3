import copy
import random
import re

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_tafs.prompts.source import PromptSource, row_to_prompt


def draw():
    """A prompt function that uses all three global generators."""
    choice = random.randrange(10**6), int(np.random.randint(10**6)), int(torch.randint(10**6, ()))
    return "prompt {} {} {}".format(*choice), {"choice": choice}


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


ROWS = [{"prompt": f"prompt {i}", "target": i} for i in range(7)]


def test_an_epochs_prompts_are_a_pure_function_of_seed_and_epoch():
    first = PromptSource(draw, seed=3).groups(2, 5)
    random.random(), np.random.rand(), torch.rand(3)
    source = PromptSource(draw, seed=3)
    source.groups(0, 9)
    assert source.groups(2, 5) == first
    assert source.groups(3, 5) != first
    assert PromptSource(draw, seed=4).groups(2, 5) != first
    assert len({prompt for prompt, _ in first}) == 5


def test_the_global_generators_are_left_as_they_were():
    before = global_states()
    PromptSource(draw, seed=3).groups(0, 5)
    assert global_states() == before


def test_the_global_generators_are_left_as_they_were_when_the_prompt_function_raises():
    before = global_states()

    def broken():
        draw()
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        PromptSource(broken).groups(0, 1)
    assert global_states() == before


def test_the_function_is_called_once_a_group():
    calls = []
    PromptSource(lambda: (calls.append(1), ("a cat", {}))[1]).batch(0, num_groups=3, group_size=8)
    assert len(calls) == 3


def test_the_batch_repeats_each_prompt_for_its_group():
    batch = PromptSource(ROWS, seed=1).batch(0, num_groups=2, group_size=3)
    assert len(batch) == 6
    assert batch.prompts[0] == batch.prompts[1] == batch.prompts[2] != batch.prompts[3]
    assert batch.group_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.sample_ids.tolist() == list(range(6))
    assert batch.metadata[0] == {"target": int(batch.prompts[0].split()[1])}
    part = batch[2:5]
    assert part.prompts == batch.prompts[2:5]
    assert part.sample_ids.tolist() == [2, 3, 4]
    assert part.group_ids.tolist() == [0, 1, 1]


@pytest.mark.parametrize("rows", [ROWS, datasets.Dataset.from_list(ROWS)], ids=["list", "Dataset"])
def test_a_sweep_covers_each_row_once_in_a_new_order_each_time(rows):
    source = PromptSource(rows, seed=1)
    drawn = [item for epoch in range(7) for item in source.groups(epoch, 3)]  # 21: three sweeps of 7
    sweeps = [drawn[start : start + 7] for start in (0, 7, 14)]
    for sweep in sweeps:
        assert sorted(metadata["target"] for _, metadata in sweep) == list(range(7))
        assert all(prompt == f"prompt {metadata['target']}" for prompt, metadata in sweep)
    assert sweeps[0] != sweeps[1] != sweeps[2]


def test_a_dataset_and_a_list_of_its_rows_are_the_same_source():
    assert PromptSource(ROWS, seed=1).groups(0, 5) == PromptSource(datasets.Dataset.from_list(ROWS), seed=1).groups(
        0, 5
    )


def test_the_known_prompts_are_read_without_the_other_columns():
    rows = datasets.Dataset.from_list(ROWS)
    rows.set_transform(lambda batch: {name: [read(name, v) for v in values] for name, values in batch.items()})
    seen = set()

    def read(name, value):
        seen.add(name)
        return value

    assert PromptSource(rows).known() == PromptSource(ROWS).known() == [row["prompt"] for row in ROWS]
    assert seen == {"prompt"}
    assert PromptSource(lambda: ("a cat", {})).known() == []


def test_an_order_is_drawn_once_a_sweep(monkeypatch):
    made = []
    draw = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or draw(seed))
    source = PromptSource(ROWS, seed=1)
    drawn = [source.groups(epoch, 3) for epoch in range(7)]
    assert len(made) == len(set(made)) == 3
    assert source.groups(0, 3) == drawn[0], "an earlier sweep's order is found again"


def test_dataset_order_is_a_function_of_the_seed_alone():
    assert PromptSource(ROWS, seed=1).groups(4, 7) == PromptSource(ROWS, seed=1).groups(4, 7)
    assert PromptSource(ROWS, seed=1).groups(0, 7) != PromptSource(ROWS, seed=2).groups(0, 7)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("a cat", ("a cat", {})),
        (("a cat", {"n": 1}), ("a cat", {"n": 1})),
        (("a cat", None), ("a cat", {})),
        ({"prompt": "a cat", "n": 1}, ("a cat", {"n": 1})),
    ],
)
def test_rows_of_every_form(row, expected):
    assert row_to_prompt(row) == expected


@pytest.mark.parametrize("given", ["a cat", (1, {}), (None, {}), ("a cat", 3), ("a cat", {}, {}), None])
def test_a_prompt_function_without_strings_is_an_error_that_shows_what_came(given):
    with pytest.raises(ValueError) as caught:
        PromptSource(lambda: given).groups(0, 1)
    assert "the prompt function gave" in str(caught.value)
    assert repr(given) in str(caught.value)


BAD = {  # before, each of these trained until the epoch that drew it
    "missing": ({"text": "a cat"}, "there is no 'prompt', only ['text']"),
    "none": ({"prompt": None}, "the prompt is None, not text"),
    "nan": ({"prompt": float("nan")}, "the prompt is nan, not text"),
    "number": (3, "the prompt is 3, not text"),
    "empty": ("", "the prompt is empty"),
    "blank": ((" \n", {}), "the prompt is empty"),
    "metadata": (("a cat", 3), "must be (prompt: str, metadata: dict)"),
    "surrogate": ("a \ud83d cat", "half a surrogate pair"),
    "pair": (["a cat", {}], "not text"),
}


@pytest.mark.parametrize(("row", "fault"), BAD.values(), ids=BAD)
def test_every_row_is_checked_when_the_source_is_made(row, fault):
    with pytest.raises(ValueError, match=re.escape("row 50: ")) as caught:
        PromptSource([{"prompt": f"prompt {i}"} for i in range(50)] + [row])
    assert fault in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="it must give"):
        row_to_prompt(row)


def test_the_first_bad_rows_are_named_and_the_others_counted():
    with pytest.raises(ValueError) as caught:
        PromptSource(["a", None] * 10)
    assert [f"row {i}:" in str(caught.value) for i in (1, 3, 9, 11)] == [True, True, True, False]
    assert str(caught.value).endswith("and 5 more")


def test_a_datasets_rows_are_checked_by_their_prompts_alone_in_all_batches(monkeypatch):
    monkeypatch.setattr("trl_tafs.prompts.source.CHECKED_AT_ONCE", 4)
    rows = datasets.Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(9)] + [None], "n": list(range(10))})
    seen = set()
    rows.set_transform(lambda batch: seen.update(batch) or batch)
    with pytest.raises(ValueError, match="row 9: the prompt is None"):
        PromptSource(rows)
    assert seen == {"prompt"}
    made = datasets.Dataset.from_dict({"prompt": ["a"] * 3, "style": ["red"] * 3})
    made.set_transform(lambda batch: {"prompt": [f"{p}, {s}" for p, s in zip(batch["prompt"], batch["style"])]})  # noqa: B905
    assert PromptSource(made).known() == ["a, red"] * 3


def test_sequences_of_ones_own_are_checked_and_tables_of_pandas_explained():
    class Rows:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {"prompt": None if i == 2 else "a cat"}

    with pytest.raises(ValueError, match="row 2: the prompt is None"):
        PromptSource(Rows())
    with pytest.raises(ValueError, match="to_dict"):  # was KeyError: 0
        PromptSource(datasets.Dataset.from_list(ROWS).to_pandas())


def test_what_is_handed_out_is_never_the_users_own():
    """Before, a reward that changed its metadata changed the user's rows, and so the next sweep's."""
    rows = [{"prompt": "a cat", "boxes": [{"at": [0.0, 1.0]}]}, ("a dog", {"boxes": [{"at": [0.0, 1.0]}]})]
    before = copy.deepcopy(rows)
    given, shared = list(rows), {"boxes": [1]}
    for source in (PromptSource(given), PromptSource(lambda: ("a cat", shared))):
        for _, metadata in source.groups(0, 2) + source.groups(1, 2):
            assert metadata["boxes"][0] in ({"at": [0.0, 1.0]}, 1)
            metadata["boxes"][0] = metadata["new"] = 5
    assert rows == before and shared == {"boxes": [1]}
    source = PromptSource(given)
    given.clear()
    assert len(source.groups(0, 2)) == 2, "the user's list is the user's"


def test_a_prompt_functions_fault_names_the_call():
    calls = iter(["a", "b", ""])
    with pytest.raises(ValueError, match=r"\(call 2 of epoch 7\).*is empty"):
        PromptSource(lambda: (next(calls), {})).groups(7, 3)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["prompt", "n"]) | st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


def check_any_rows(rows):
    """Either a ValueError of ours in one line, or prompts that can all be drawn and encoded."""
    try:
        source = PromptSource(rows)
    except ValueError as error:
        assert "\n" not in str(error) and ("row" in str(error) or "empty" in str(error))
        return
    for prompt, metadata in source.groups(0, len(rows)):
        assert prompt.strip() and prompt.encode() and isinstance(metadata, dict)


@settings(max_examples=60)
@given(st.lists(ANYTHING | st.just("a cat"), max_size=4))
def test_any_rows_are_prompts_or_our_error(rows):
    check_any_rows(rows)


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.lists(ANYTHING | st.just("a cat"), max_size=4))
def test_any_rows_are_prompts_or_our_error_at_length(rows):
    check_any_rows(rows)


def test_a_dataset_without_a_prompt_column_is_an_error_that_names_its_columns():
    with pytest.raises(ValueError, match=r"no column 'prompt', only \['caption'\]"):
        PromptSource(datasets.Dataset.from_list([{"caption": "a cat"}]))


@pytest.mark.parametrize("empty", [[], datasets.Dataset.from_dict({"prompt": []})], ids=["list", "Dataset"])
def test_an_empty_source_is_an_error(empty):
    with pytest.raises(ValueError, match="empty"):
        PromptSource(empty)


@pytest.mark.parametrize(
    "source", ["a cat", None, 7, iter([("a cat", {})])], ids=["string", "none", "number", "iterator"]
)
def test_a_source_of_another_kind_is_an_error(source):
    with pytest.raises(ValueError, match="a function, a dataset or a list"):
        PromptSource(source)


@pytest.mark.parametrize(
    "source",
    [datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), {"prompt": ["a cat", "a dog"]}],
    ids=["DatasetDict", "dict"],
)
def test_a_mapping_is_an_error_that_asks_for_one_split_or_a_list(source):
    with pytest.raises(ValueError, match="split|a function, a dataset or a list"):
        PromptSource(source)


# By weight ------------------------------------------------------------------------------------------------------


def numbers(prompts):
    return torch.tensor([1.0 + int(prompt.split()[1]) for prompt in prompts])


def test_prompts_by_weight_are_a_pure_function_of_seed_epoch_and_weights():
    first = PromptSource(ROWS, seed=3).by_weight(2, 5, numbers)
    source = PromptSource(ROWS, seed=3)
    source.by_weight(0, 7, numbers), source.groups(1, 3), random.random()
    assert source.by_weight(2, 5, numbers) == first and len({prompt for prompt, _ in first}) == 5
    others = [PromptSource(ROWS, seed=s).by_weight(e, 5, numbers) for s, e in ((3, 3), (4, 2))]
    others.append(source.by_weight(2, 5, lambda prompts: 1 / numbers(prompts) ** 4))
    assert all(other != first for other in others)
    assert all(ROWS[metadata["target"]]["prompt"] == prompt for prompt, metadata in first)


def test_they_are_drawn_in_proportion_to_their_weights():
    source, drawn = PromptSource(ROWS), []
    for epoch in range(4000):
        drawn += [metadata["target"] for _, metadata in source.by_weight(epoch, 1, numbers)]
    shares = np.bincount(drawn, minlength=7) / 4000
    np.testing.assert_allclose(shares, np.arange(1, 8) / 28, atol=0.025)
    assert len({prompt for prompt, _ in source.by_weight(0, 7, numbers)}) == 7, "none comes twice before all came once"
    assert len(source.by_weight(0, 17, numbers)) == 17


def test_a_function_has_no_set_to_draw_from():
    with pytest.raises(ValueError, match="'superflow' draws prompts by weight .* come from a function; give a list"):
        PromptSource(draw).by_weight(0, 1, numbers)
