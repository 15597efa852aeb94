"""The picture of a trace: well-formed, deterministic, and true to the states of the generation that it shows."""

import xml.etree.ElementTree as ElementTree

import pytest

from prime_v2.output.drawing import svg_text
from prime_v2.output.trace import Trace, TraceStep
from prime_v2.output.trace_picture import MOST_ROWS, WIDTH, draw_trace, drawn_passes

SVG = "{http://www.w3.org/2000/svg}"
MASK, BASE = 8, 2  # three digits of base 2
CODES = [[number >> 2 & 1, number >> 1 & 1, number & 1] for number in range(8)]
WORDS = ["the", " cat", " <b>&\"'", "\n", "\x00", "", " 猫", " supercalifragilistic"]


def trace_of(*states: list[list[int]], given: int = 1, result: list[int] | None = None) -> Trace:
    """A trace of states in digits, its ids worked out from the codes."""
    trace = Trace(num_given=given)
    for digits in states:
        ids = [CODES.index(each) if BASE not in each else MASK for each in digits]
        trace.steps.append(TraceStep(ids, digits))
    trace.result = trace.steps[-1].ids if result is None else result
    return trace


def picture_of(trace: Trace) -> ElementTree.Element:
    return ElementTree.fromstring(svg_text(draw_trace(trace, WORDS.__getitem__, BASE, MASK)))


def texts(picture: ElementTree.Element, kind: str) -> list[str]:
    """The texts of a class, without those of the legend, which stand last."""
    found = [each for each in picture.iter(f"{SVG}text") if each.get("class") == kind]
    return ["".join(each.itertext()) for each in found]


def test_cells_show_visible_digits_then_the_text_of_a_known_token():
    hidden = [2, 2, 2]
    trace = trace_of([CODES[0], hidden, hidden], [CODES[0], [0, 2, 1], hidden], [CODES[0], CODES[1], CODES[1]])
    picture = picture_of(trace)
    assert texts(picture, "digit") == ["01", "01·"]  # the last is the legend's
    assert texts(picture, "given") == ["the"] * 3 + ["text"]
    assert texts(picture, "known") == ["cat", "cat", "text"]
    labels = texts(picture, "label")
    assert labels[:6] == ["pass 0", "0% known", "pass 1", "33% known", "pass 2", "100% known"]
    dots = [each.get("d").count("M") for each in picture.iter(f"{SVG}path") if each.get("class") == "dot"]
    assert dots == [6, 4]  # hidden digits of the first two states


def test_text_is_escaped_and_what_xml_does_not_allow_is_replaced():
    digits = [CODES[each] for each in range(8)]
    picture = picture_of(trace_of([[2, 2, 2]] * 8, digits, given=0))
    assert texts(picture, "known")[:8] == ["the", "cat", "<b>&\"'", "⏎", "�", "∅", "猫", "supercalifragil…"]
    assert "�" in picture.find(f"{SVG}desc").text


def test_columns_stay_within_the_picture_and_go_on_in_the_next_line():
    digits = [CODES[7]] * 40
    picture = picture_of(trace_of([[2, 2, 2]] * 40, digits, given=0))
    places = [float(each.get("x")) for each in picture.iter(f"{SVG}text") if each.get("x")]
    assert max(places) < float(picture.get("width")) <= WIDTH
    height = float(picture.get("height"))
    assert max(float(each.get("y")) for each in picture.iter(f"{SVG}text") if each.get("y")) < height
    assert len({each.get("y") for each in picture.iter(f"{SVG}text") if each.get("class") == "known"}) > 2


def test_padding_after_the_end_is_left_out_and_given_tokens_of_a_suffix_are_bold():
    hidden = [2, 2, 2]
    first, last = [CODES[0], hidden, hidden, CODES[1]], [CODES[0], CODES[2], CODES[3], CODES[1]]
    picture = picture_of(trace_of(first, last, result=[0, 2, 0, 1]))
    assert texts(picture, "given") == ["the", "cat"] * 2 + ["text"]
    assert len(texts(picture, "known")) == 2  # one token, and the legend


def test_tokens_that_are_not_final_are_grey_where_no_token_is_masked():
    """Uniform-state diffusion: other tokens in place of hidden ones, whole."""
    trace = Trace([TraceStep([0, 3], [[0], [3]]), TraceStep([0, 1], [[0], [1]])], num_given=1, result=[0, 1])
    picture = picture_of(trace)
    assert texts(picture, "changing") == ["⏎", "text"]  # the last is the legend's
    assert texts(picture, "known")[:1] == ["cat"]
    assert texts(picture, "label")[1] == "0% final"


def test_whole_tokens_have_empty_cells_without_dots():
    trace = Trace([TraceStep([0, MASK], [[0], [MASK]]), TraceStep([0, 1], [[0], [1]])], num_given=1, result=[0, 1])
    picture = ElementTree.fromstring(svg_text(draw_trace(trace, WORDS.__getitem__, MASK, MASK)))
    assert not [each for each in picture.iter(f"{SVG}path") if each.get("class") == "dot"]
    assert "hidden token" in texts(picture, "label")


def test_the_first_and_the_last_pass_are_always_drawn():
    assert drawn_passes(0) == [0]
    assert drawn_passes(3) == [0, 1, 2, 3]
    many = drawn_passes(1000)
    assert (many[0], many[-1], len(many), sorted(set(many))) == (0, 1000, MOST_ROWS, many)


def test_a_trace_without_tokens_is_refused():
    with pytest.raises(ValueError, match="the trace holds no token to draw; generate one token or more"):
        draw_trace(Trace(), WORDS.__getitem__, BASE, MASK)
