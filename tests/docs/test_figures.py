"""The figures of the pages are those of the records."""

import importlib.metadata
import json
import re

import numpy as np
import pytest
from matplotlib.image import imread

from docs.figures import FIGURES, RESULTS, ROOT, draw, main

PINNED = re.search(r"^matplotlib==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
# Other processors may round the edges of shapes to other shades: by less than VISIBLE of a colour's range, or at few
# pixels. Where the pictures were drawn no pixel differs.
VISIBLE = 1 / 8
SHARE = 1e-4  # of the pixels; a letter of a title has about as many


def test_every_picture_of_a_page_is_drawn_from_a_record():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"!\[[^]]*\]\((?:docs/)?([^)]+\.png)\)", page.read_text())}
    assert shown == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.skipif(importlib.metadata.version("matplotlib") != PINNED, reason="drawn by the pinned matplotlib only")
def test_a_figure_is_what_its_record_gives(name, tmp_path):
    """`python -m docs.figures` draws them anew."""
    shown, drawn = imread(ROOT / "docs" / name), imread(draw(name, tmp_path))
    assert shown.shape == drawn.shape
    assert (np.abs(shown - drawn).max(-1) > VISIBLE).mean() <= SHARE


def test_a_changed_record_gives_another_figure(tmp_path, monkeypatch):
    record = json.loads((RESULTS / "compare_granularity.json").read_text())
    record["results"]["best"][0]["bound"]["nats_per_token"] += 0.05
    (tmp_path / "compare_granularity.json").write_text(json.dumps(record))
    before = imread(draw("findings_granularity.png", tmp_path))
    monkeypatch.setattr("docs.figures.RESULTS", tmp_path)
    after = imread(draw("findings_granularity.png", tmp_path))
    assert (np.abs(before - after).max(-1) > VISIBLE).mean() > SHARE


def test_a_name_that_is_no_figure_is_refused_before_anything_is_drawn(monkeypatch, capsys):
    monkeypatch.setattr("docs.figures.draw", None)
    with pytest.raises(SystemExit):
        main(["quality.png", "quality.jpg"])
    assert "quality.jpg is no figure of a record; use one of analysis_attention.png, " in capsys.readouterr().err
