"""The tables of README and docs come from the records, and nothing else."""

import re
from pathlib import Path

import pytest

from docs.tables.write import TABLES, main, rewrite

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_tables_of_readme_and_docs_are_those_of_the_records(capsys):
    assert main(["--check", "--results", str(ROOT / "results"), *map(str, PAGES)]) == 0
    assert set(re.findall(r"<!-- table: (\w+) -->", "".join(page.read_text() for page in PAGES))) == set(TABLES)


def test_a_changed_number_is_found_and_mended(tmp_path, capsys):
    text = (ROOT / "docs" / "results.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| MDM (`num_subtokens=1`)"))
    page = tmp_path / "results.md"
    page.write_text(text.replace(row, row.replace("±", "+-")))
    options = ["--results", str(ROOT / "results"), str(page)]
    assert main(["--check", *options]) == 1
    assert "out of date" in capsys.readouterr().out
    assert main(options) == 0
    assert page.read_text() == text


def test_an_unknown_table_and_a_missing_record_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no table losses; there are demo"):
        rewrite("<!-- table: losses -->\n<!-- end of table -->", ROOT / "results")
    with pytest.raises(ValueError, match="tiny.json does not exist"):
        rewrite("<!-- table: training -->\n<!-- end of table -->", tmp_path)


def test_single_seeds_are_paired_as_the_comparison_pairs_them():
    """The first seed has a record of its own, and the mean is that of the lines above it."""
    table = TABLES["largest_seeds"](ROOT / "results").splitlines()
    lines = [line.split(" | ") for line in table if "; " in line and line.startswith("|")]
    *_, first, second, third, mean = (line[2].split("; ")[1] for line in lines)
    own = next(line for line in TABLES["largest"](ROOT / "results").splitlines() if line.startswith("| coarse-first"))
    assert first in own.split(" | ")
    differences = [float(line.split(" ±")[0]) for line in (first, second, third, mean)]
    assert differences[-1] == pytest.approx(sum(differences[:-1]) / 3, abs=1e-3)  # four values, each rounded to 0.0005
