"""The picture of a trace: an SVG in which a text denoises digit by digit, a row a pass of the network.

The colours follow the reader's light or dark preference, and the picture brings its own background.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from prime_v2.output.trace import Trace, TraceStep

MOST_ROWS = 12  # passes that are drawn, evenly spaced, the first and the last among them
WIDTH, LEAST_WIDTH = 960.0, 660.0  # of the picture, in pixels; a text that is wider goes on in the next line
MARGIN, GUTTER = 20.0, 74.0  # around all; left of the text, for the number of the pass
CELL, LINE_GAP, ROW_GAP = 30.0, 4.0, 12.0  # height of a cell; between the lines of a row; between rows
TEXT_SIZE, TEXT_ADVANCE = 13.0, 7.9  # font size of a token's text and width of a character of it
DIGIT_ADVANCE, DIGIT_LEADING = 6.2, 10.5  # width of a digit, and height of a line of digits in a cell
PADDING, WORD_GAP, TOKEN_GAP = 5.0, 8.0, 2.0  # in a cell; before a token that begins a word, and before another
DIGITS_IN_ONE_LINE = 6  # more digits take two lines in their cell
LONGEST_TEXT = 16  # characters of a token that are drawn
# Characters without a shape of their own, by what is drawn instead.
SHAPES = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣", "": "∅"}

STYLE = """
.card { fill: #ffffff; stroke: #d1d9e0 }
.cell, .new { stroke-width: 6px; stroke-linejoin: round }
.cell { fill: #f3f5f7; stroke: #f3f5f7 } .new { fill: #d8ecff; stroke: #d8ecff }
text { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; font-size: 13px }
.t { fill: #1f2328; text-anchor: middle } .g { fill: #1f2328; text-anchor: middle; font-weight: bold }
.n { fill: #0550ae; text-anchor: middle; font-weight: bold } .c { fill: #8b949e; text-anchor: middle }
.d { fill: #0969da; font-size: 9.5px; text-anchor: middle } .h { fill: #c3cad1 }
.label { fill: #59636e; font-size: 11px } .rule { stroke: #e6eaee }
@media (prefers-color-scheme: dark) {
.card { fill: #0d1117; stroke: #3d444d }
.cell { fill: #1a2029; stroke: #1a2029 } .new { fill: #143058; stroke: #143058 }
.t, .g { fill: #e6edf3 } .n { fill: #a5d3ff } .c { fill: #6e7781 } .d { fill: #6cb6ff } .h { fill: #454e59 }
.label { fill: #9198a1 } .rule { stroke: #222a33 } }
"""


@dataclass(frozen=True)
class Column:
    """Where a token stands: its index in the text, the line of a row that it is in, its left end and width."""

    index: int
    line: int
    left: float
    width: float

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


def draw_trace(trace: Trace, text_of: Callable[[int], str], base: int, mask_id: int) -> str:
    """The picture of a trace, SVG.

    text_of: token id to its text. base: digits are in [0, base), and base itself is a hidden digit. mask_id: the id
    of a token that is not fully known. ValueError for a trace without a state or without a token.

    Columns are tokens. A cell shows the digits of a token that is not fully known, a dot for a hidden one, and the
    text of one that is: bold where the token is given, on colour in the first row that knows it. Tokens that are
    known and not final, as uniform-state diffusion has them, are grey. Padding after the end is left out.
    """
    kept = trace.kept()
    if not kept:
        raise ValueError("the trace holds no token to draw; generate one token or more")
    texts = {each: shown(text_of(each)) for step in trace.steps for each in step.ids if each != mask_id}
    raw = [text_of(trace.result[i]) for i in kept]
    num_digits = len(trace.steps[0].digits[0])
    columns = place_columns(kept, [texts[trace.result[i]] for i in kept], raw, num_digits, base)
    row_height = (columns[-1].line + 1) * (CELL + LINE_GAP) - LINE_GAP + ROW_GAP
    word = "known" if trace.hides_by_mask(mask_id) else "final"
    generated, numbers = trace.generated(mask_id), drawn_passes(len(trace.steps) - 1)
    height = 2 * MARGIN + len(numbers) * row_height + CELL
    width = max(LEAST_WIDTH, *(column.left + column.width + MARGIN for column in columns))
    body, before = [], None
    for place, number in enumerate(numbers):
        top = MARGIN + place * row_height
        row = Row(trace, columns, texts, base, mask_id, top)
        share = trace.share_known(trace.steps[number], generated, base, mask_id)
        body.append(label(top, f"pass {number}", f"{share:.0%} {word}"))
        body.append(row.draw(trace.steps[number], before))
        if place:
            y = top - ROW_GAP / 2
            body.append(f'<path class="rule" d="M{MARGIN:g} {y:g}H{width - MARGIN:.5g}"/>')
        before = trace.steps[number]
    if trace.hides_by_mask(mask_id):
        cell = ("d", "01·", "digits of a token, dots where hidden") if num_digits > 1 else ("d", "", "hidden token")
    else:
        cell = ("c", "text", "token that is not final")
    body.append(legend(height - MARGIN - CELL, cell, word))
    text = escape("".join(text_of(trace.result[i]) for i in kept))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.5g} {height:g}" width="{width:.5g}" '
        f'height="{height:g}" role="img">\n<title>A text denoises in {len(trace.steps) - 1} passes of the network'
        f"</title>\n<desc>{printable(text)}</desc>\n<style>{STYLE}</style>\n"
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1:.5g}" height="{height - 1:g}" rx="10"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def drawn_passes(last: int) -> list[int]:
    """The passes that are drawn, of those from 0, before the first one, to `last`."""
    rows = min(MOST_ROWS, last + 1)
    return [round(last * i / (rows - 1)) for i in range(rows)] if rows > 1 else [0]


def place_columns(
    indices: Sequence[int], texts: Sequence[str], raw: Sequence[str], num_digits: int, base: int
) -> list[Column]:
    """Columns for the tokens `indices`, wide enough for their final texts and for their digits."""
    lines = 1 if num_digits <= DIGITS_IN_ONE_LINE else 2
    digits = -(-num_digits // lines) * digit_width(base) if num_digits > 1 else 0.0
    columns: list[Column] = []
    line, left = 0, MARGIN + GUTTER
    for index, text, original in zip(indices, texts, raw, strict=True):
        width = max(digits, text_width(text), 14.0) + 2 * PADDING
        left += WORD_GAP if original[:1].isspace() else TOKEN_GAP
        if left + width > WIDTH - MARGIN and columns:
            line, left = line + 1, MARGIN + GUTTER + TOKEN_GAP
        columns.append(Column(index, line, left, width))
        left += width
    return columns


@dataclass(frozen=True)
class Row:
    """What all rows share, and where one of them begins."""

    trace: Trace
    columns: Sequence[Column]
    texts: dict[int, str]
    base: int
    mask_id: int
    top: float

    def draw(self, step: TraceStep, before: TraceStep | None) -> str:
        """The cells of a state; `before` is the state of the row above."""
        cells, new, dots, texts = [], [], [], []
        for column in self.columns:
            i, top = column.index, self.top + column.line * (CELL + LINE_GAP)
            box = rounded_box(column.left, top, column.width)
            if step.ids[i] == self.mask_id:
                cells.append(box)
                if len(step.digits[i]) > 1:
                    visible, hidden = self._digits(step.digits[i], column, top)
                    texts.append(visible)
                    dots.append(hidden)
                continue
            if self.trace.is_given(i, self.mask_id):
                kind = "g"
            elif step.ids[i] != self.trace.result[i]:
                kind = "c"
                cells.append(box)
            elif before is not None and before.ids[i] != step.ids[i]:
                kind = "n"
                new.append(box)
            else:
                kind = "t"
            texts.append(self._text(self.texts[step.ids[i]], column, top, kind))
        paths = [
            f'<path class="{kind}" d="{"".join(each)}"/>' for kind, each in (("cell", cells), ("new", new)) if each
        ]
        if any(dots):
            paths.append(f'<path class="h" d="{"".join(dots)}"/>')
        return "\n".join([*paths, *filter(None, texts)])

    def _text(self, text: str, column: Column, top: float, kind: str) -> str:
        room, y = column.width - 2, top + CELL / 2 + 0.35 * TEXT_SIZE
        fit = f' textLength="{room:.5g}" lengthAdjust="spacingAndGlyphs"' if text_width(text) > room else ""
        return f'<text class="{kind}" x="{column.middle:.5g}" y="{y:.5g}"{fit}>{escape(text)}</text>'

    def _digits(self, digits: Sequence[int], column: Column, top: float) -> tuple[str, str]:
        """The visible digits as text and the hidden ones as dots, in one line or two."""
        lines = 1 if len(digits) <= DIGITS_IN_ONE_LINE else 2
        in_line, advance = -(-len(digits) // lines), digit_width(self.base)
        visible, dots = [], []
        for place, digit in enumerate(digits):
            line, at = divmod(place, in_line)
            x = column.middle + (at - (in_line - 1) / 2) * advance
            y = top + CELL / 2 + (line - (lines - 1) / 2) * DIGIT_LEADING
            if digit == self.base:
                dots.append(f"M{x - 1.2:.5g} {y - 1.2:.5g}h2.4v2.4h-2.4z")
            else:
                visible.append(f'<tspan x="{x:.5g}" y="{y + 3.4:.5g}">{digit}</tspan>')
        return (f'<text class="d">{"".join(visible)}</text>' if visible else ""), "".join(dots)


def rounded_box(left: float, top: float, width: float) -> str:
    """The path of a cell; its corners are round by the width of the stroke."""
    inside = 3.0
    return (
        f"M{left + inside:.5g} {top + inside:g}h{width - 2 * inside:.5g}v{CELL - 2 * inside:g}"
        f"h{2 * inside - width:.5g}z"
    )


def label(top: float, above: str, below: str) -> str:
    """Two lines left of a row."""
    return (
        f'<text class="label" x="{MARGIN:g}" y="{top + 13:g}">{above}</text>'
        f'<text class="label" x="{MARGIN:g}" y="{top + 26:g}">{below}</text>'
    )


def legend(top: float, cell: tuple[str, str, str], word: str) -> str:
    """How to read the cells. cell: class, sample and meaning of a grey one; word: "known" or "final"."""
    y, left, parts = top + CELL / 2 + 4, MARGIN, []
    entries = (("", "g", "text", "given"), ("cell", *cell), ("new", "n", "text", f"{word} since the row above"))
    for box, style, sample, meaning in entries:
        width = TEXT_ADVANCE * 6
        if box:
            parts.append(f'<path class="{box}" d="{rounded_box(left, top, width)}"/>')
        parts.append(f'<text class="{style}" x="{left + width / 2:.5g}" y="{y:g}">{sample}</text>')
        parts.append(f'<text class="label" x="{left + width + 8:.5g}" y="{y:g}">{meaning}</text>')
        left += width + 8 + 6.7 * len(meaning) + 28
    return "".join(parts)


def shown(text: str) -> str:
    """A token's text as it is drawn: without the space before a word, in one line, of bounded length."""
    word = text[1:] if len(text) > 1 and text[0] == " " else text
    drawn = printable("".join(SHAPES.get(each, each) for each in word) or SHAPES[""])
    return drawn if len(drawn) <= LONGEST_TEXT else drawn[: LONGEST_TEXT - 1] + "…"


def printable(text: str) -> str:
    """Text without the characters that XML does not allow or that have no shape."""
    return "".join("�" if unicodedata.category(each) in ("Cc", "Cs", "Cn", "Co") else each for each in text)


def text_width(text: str) -> float:
    """About how wide a monospaced font draws a token's text, in pixels."""
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return TEXT_ADVANCE * (len(text) + wide)


def digit_width(base: int) -> float:
    """Pixels from a digit to the next."""
    return DIGIT_ADVANCE * (len(str(base - 1)) + (base > 10))
