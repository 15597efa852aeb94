"""The records in results/."""

import json
from pathlib import Path

import pytest

from docs.tables.compare import is_of_its_recipe, origin
from prime_v2.output.atomic import json_text

RECORDS = sorted((Path(__file__).resolve().parents[2] / "results").glob("*.json"))
OF_EARLIER_RECIPES = (
    "families",
    "isoflop",
    "levers",
    "levers_seeds",
    "winners",
    "study_1e12_first",
    "study_left_to_right",
)
LARGEST = 500_000  # bytes; a row of a run takes some 7,500


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_small_and_laid_out_as_records_are_written(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) <= LARGEST
    assert text == json_text(json.loads(text))


def test_a_comparison_is_of_a_recipe_of_the_repository_or_says_at_which_commit_that_is():
    """A new record of a recipe that is not here, or has changed, is refused; old ones are named with their commit."""
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RECORDS}
    compared = {name: record for name, record in records.items() if name.startswith("compare_")}
    earlier = {name for name, record in compared.items() if not is_of_its_recipe(record)}
    assert earlier == {f"compare_{name}" for name in OF_EARLIER_RECIPES}
    for name in earlier:
        assert f"is at commit {compared[name]['commit'][:10]}." in origin(compared[name])
