"""The records in results/."""

import json
from pathlib import Path

import pytest

from prime_v2.output.atomic import json_text

RECORDS = sorted((Path(__file__).resolve().parents[2] / "results").glob("*.json"))
LARGEST = 500_000  # bytes; a row of a run takes some 7,500


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_small_and_laid_out_as_records_are_written(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) <= LARGEST
    assert text == json_text(json.loads(text))
