"""Files are written whole or not at all."""

import json
import os
import stat

import pytest

from prime_v2.output.atomic import json_text, write_json


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_json(tmp_path / "record.json", {"kept": True})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"nats": float("nan")})

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"kept": False})
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert json.loads(path.read_text()) == {"kept": True}
    assert os.listdir(tmp_path) == ["record.json"]


def test_json_has_a_line_for_each_key_and_for_each_row_of_a_table():
    content = {"n": 1, "é": {"empty": {}, "none": []}, "numbers": [0.1, 2], "rows": [{"a": 1, "b": [1, {}]}, [2, 3]]}
    assert json_text(content).splitlines() == [
        "{",
        ' "n": 1,',
        ' "é": {',
        '  "empty": {},',
        '  "none": []',
        " },",
        ' "numbers": [0.1,2],',
        ' "rows": [',
        '  {"a":1,"b":[1,{}]},',
        "  [2,3]",
        " ]",
        "}",
    ]


@pytest.mark.parametrize("content", [None, 3, "text", [], {}, [[]], {"a": ({"b": ()},)}, {1: 2, None: {True: 0.1}}])
def test_the_layout_changes_nothing_that_json_reads(content):
    assert json.loads(json_text(content)) == json.loads(json.dumps(content))
