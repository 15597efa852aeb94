"""One list of shapes, two writers: the SVG and the PNG have the same boxes, dots and texts in the same places."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict

import pytest
from matplotlib.image import imread

from prime_v2.output.drawing import (
    DARK,
    LIGHT,
    PNG_SCALE,
    PNG_TALLEST,
    Boxes,
    Digits,
    Dots,
    Drawing,
    Rule,
    Text,
    png_figure,
    save_drawing,
    svg_text,
)

SVG = "{http://www.w3.org/2000/svg}"
SHAPES = [
    Text("label", 20, 33, "pass 0"),
    Boxes("cell", [(100, 20, 60, 30), (170, 20, 60, 30)]),
    Boxes("new", [(240, 20, 60, 30)]),
    Dots([(190, 35), (200, 35)]),
    Rule(20, 380, 60),
    Text("known", 270, 39.5, "猫 ∅ $x$ <b>&"),
    Text("changing", 350, 39.5, "a text that is too long", 40),
    Digits([(124, 38, "0"), (130, 38, "1")]),
]
DRAWING = Drawing(400, 80, "A title", "What <it> shows", SHAPES)


def colour_at(pixels, x: float, y: float) -> str:
    """Colour of a PNG where the drawing has the point (x, y)."""
    return "#" + "".join(f"{round(255 * float(each)):02x}" for each in pixels[int(2 * y), int(2 * x)][:3])


def test_the_png_has_the_colours_of_the_shapes_where_the_svg_has_them(tmp_path):
    pixels = imread(save_drawing(DRAWING, tmp_path / "a.png"))
    assert pixels.shape == (80 * PNG_SCALE, 400 * PNG_SCALE, 4)
    for name, points in {
        "card": [(50, 70), (98, 35), (165, 35), (235, 35), (302, 35)],
        "cell": [(103, 35), (158, 35), (110, 22), (110, 48), (172, 35), (195, 35)],
        "new": [(243, 24), (297, 46), (270, 22), (270, 48)],
        "dot": [(190, 35), (200, 35)],
        "rule": [(20.5, 60), (379, 60)],
    }.items():
        assert {colour_at(pixels, *each) for each in points} == {getattr(LIGHT, name)}, name
    assert pixels[0, 0, 3] == 0, "nothing outside the round corners of the card"


def test_texts_stand_in_the_same_places_and_read_the_same_but_for_what_the_fonts_of_the_png_lack():
    """Warnings are errors in tests: Matplotlib warns of a glyph that it lacks."""
    drawn = png_figure(DRAWING).axes[0].texts
    picture = ElementTree.fromstring(svg_text(DRAWING))
    pieces = [each for text in picture.iter(f"{SVG}text") for each in (list(text) or [text])]
    assert [each.get_text() for each in drawn] == [each.text.replace("猫", "□") for each in pieces]
    assert [each.get_position() for each in drawn] == [(float(each.get("x")), float(each.get("y"))) for each in pieces]
    assert picture.find(f"{SVG}title").text == "A title" and picture.find(f"{SVG}desc").text == "What <it> shows"


def test_a_text_that_is_wider_than_its_room_is_squeezed_into_it():
    figure = png_figure(DRAWING)
    long = next(each for each in figure.axes[0].texts if each.get_text().startswith("a text"))
    width = long.get_window_extent().width / PNG_SCALE
    assert 25 < width <= 40  # letters are whole dots wide
    assert 'textLength="40"' in svg_text(DRAWING)


def test_a_tall_png_has_fewer_dots_a_pixel():
    figure = png_figure(Drawing(400, PNG_TALLEST, "", "", []))
    assert figure.dpi * figure.get_figheight() == pytest.approx(PNG_TALLEST)


def test_every_colour_is_in_the_style_of_the_svg_for_light_and_for_dark_readers():
    style = re.search("<style>(.*)</style>", svg_text(DRAWING), re.DOTALL)[1]
    for palette, rules in zip((LIGHT, DARK), style.split("@media (prefers-color-scheme: dark)"), strict=True):
        assert not [each for each in asdict(palette).values() if each not in rules]


def test_the_same_drawing_is_the_same_file_and_the_case_of_the_suffix_does_not_matter(tmp_path):
    for suffix in (".svg", ".png"):
        first, second = (save_drawing(DRAWING, tmp_path / (name + suffix)).read_bytes() for name in "ab")
        assert first == second
        assert save_drawing(DRAWING, tmp_path / ("c" + suffix.upper())).read_bytes() == first


def test_another_suffix_is_refused(tmp_path):
    for name in ("out.jpg", "out", "out.svgz"):
        with pytest.raises(ValueError, match=rf"{name} must end with .svg or .png; use e.g. out.svg"):
            save_drawing(DRAWING, tmp_path / name)
    assert not list(tmp_path.iterdir())
