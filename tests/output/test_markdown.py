from trl_tafs.output.markdown import table


def test_a_table_keeps_its_columns_whatever_its_cells_hold():
    made = table(["name", "value"], [["a|b", 1 / 3], ["two\nlines", None]])
    assert made.splitlines() == ["| name | value |", "|---|---|", "| a\\|b | 0.3333 |", "| two lines | None |"]
    assert table(["name"], []) == ""
