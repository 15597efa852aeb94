"""Tables as text and as Markdown."""

import pytest

from prime_v2.output.tables import aligned, markdown


def test_columns_are_as_wide_as_their_widest_cell_and_cells_stay_as_they_are():
    rows = [["set", "≤ nats"], ["[bold]x[/]", ""], ["日本", "1" * 200]]
    assert aligned(rows).split("\n") == ["set         ≤ nats", "[bold]x[/]", f"日本        {'1' * 200}"]
    assert aligned(rows[:2], right=True, indent="  ").split("\n") == ["         set  ≤ nats", "  [bold]x[/]"]
    assert aligned([]) == ""


def test_rows_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"rows have \[1, 2\] cells"):
        aligned([["a", "b"], ["c"]])


def test_a_markdown_table_aligns_numbers_right():
    assert markdown(["model", "nats"], [["a", "1.5"]]) == "| model | nats |\n| --- | ---: |\n| a | 1.5 |\n"
