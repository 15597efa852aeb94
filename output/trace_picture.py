"""The picture of a trace: a text denoises digit by digit, a row a pass of the network."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prime_v2.output.drawing import FACES, Boxes, Digits, Dots, Drawing, Rule, Shape, Text
from prime_v2.output.trace import Trace, TraceStep

MOST_ROWS = 12  # passes that are drawn, evenly spaced, the first and the last among them
WIDTH, LEAST_WIDTH = 960.0, 660.0  # of the picture, in pixels; a text that is wider goes on in the next line
MARGIN, GUTTER = 20.0, 74.0  # around all; left of the text, for the number of the pass
CELL, LINE_GAP, ROW_GAP = 30.0, 4.0, 12.0  # height of a cell; between the lines of a row; between rows
TEXT_ADVANCE, LABEL_ADVANCE = 7.9, 6.7  # width of a character of a token's text, and of a label
DIGIT_ADVANCE, DIGIT_LEADING = 6.2, 10.5  # width of a digit, and height of a line of digits in a cell
PADDING, WORD_GAP, TOKEN_GAP = 5.0, 8.0, 2.0  # in a cell; before a token that begins a word, and before another
DIGITS_IN_ONE_LINE = 6  # more digits take two lines in their cell
LONGEST_TEXT = 16  # characters of a token that are drawn
# Characters without a shape of their own, by what is drawn instead.
SHAPES = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣", "": "∅"}


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


def draw_trace(trace: Trace, text_of: Callable[[int], str], base: int, mask_id: int) -> Drawing:
    """The picture of a trace.

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
    shapes: list[Shape] = []
    before = None
    for place, number in enumerate(numbers):
        top = MARGIN + place * row_height
        row = Row(trace, columns, texts, base, mask_id, top)
        share = trace.share_known(trace.steps[number], generated, base, mask_id)
        shapes += label(top, f"pass {number}", f"{share:.0%} {word}")
        shapes += row.draw(trace.steps[number], before)
        if place:
            shapes.append(Rule(MARGIN, width - MARGIN, top - ROW_GAP / 2))
        before = trace.steps[number]
    if not trace.hides_by_mask(mask_id):
        cell = ("changing", "text", "token that is not final")
    elif num_digits > 1:
        cell = ("digit", "01·", "digits of a token, dots where hidden")
    else:
        cell = ("digit", "", "hidden token")
    shapes += legend(height - MARGIN - CELL, cell, word)
    title = f"A text denoises in {len(trace.steps) - 1} passes of the network"
    return Drawing(width, height, title, printable("".join(text_of(trace.result[i]) for i in kept)), shapes)


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

    def draw(self, step: TraceStep, before: TraceStep | None) -> list[Shape]:
        """The cells of a state; `before` is the state of the row above."""
        cells, new, dots = [], [], []
        texts: list[Shape] = []
        for column in self.columns:
            i, top = column.index, self.top + column.line * (CELL + LINE_GAP)
            box = (column.left, top, column.width, CELL)
            if step.ids[i] == self.mask_id:
                cells.append(box)
                if len(step.digits[i]) > 1:
                    visible, hidden = self._digits(step.digits[i], column, top)
                    texts += [Digits(visible)] if visible else []
                    dots += hidden
                continue
            if self.trace.is_given(i, self.mask_id):
                kind = "given"
            elif step.ids[i] != self.trace.result[i]:
                kind = "changing"
                cells.append(box)
            elif before is not None and before.ids[i] != step.ids[i]:
                kind = "known"
                new.append(box)
            else:
                kind = "text"
            texts.append(self._text(self.texts[step.ids[i]], column, top, kind))
        boxes: list[Shape] = [Boxes(kind, each) for kind, each in (("cell", cells), ("new", new)) if each]
        return [*boxes, *([Dots(dots)] if dots else []), *texts]

    def _text(self, text: str, column: Column, top: float, kind: str) -> Text:
        room = column.width - 2
        baseline = top + CELL / 2 + 0.35 * FACES[kind].size
        return Text(kind, column.middle, baseline, text, room if text_width(text) > room else None)

    def _digits(
        self, digits: Sequence[int], column: Column, top: float
    ) -> tuple[list[tuple[float, float, str]], list[tuple[float, float]]]:
        """(x, baseline and number of the visible digits, x and y of the hidden ones), in one line or two."""
        lines = 1 if len(digits) <= DIGITS_IN_ONE_LINE else 2
        in_line, advance = -(-len(digits) // lines), digit_width(self.base)
        visible, hidden = [], []
        for place, digit in enumerate(digits):
            line, at = divmod(place, in_line)
            x = column.middle + (at - (in_line - 1) / 2) * advance
            y = top + CELL / 2 + (line - (lines - 1) / 2) * DIGIT_LEADING
            if digit == self.base:
                hidden.append((x, y))
            else:
                visible.append((x, y + 3.4, str(digit)))
        return visible, hidden


def label(top: float, above: str, below: str) -> list[Shape]:
    """Two lines left of a row."""
    return [Text("label", MARGIN, top + 13, above), Text("label", MARGIN, top + 26, below)]


def legend(top: float, cell: tuple[str, str, str], word: str) -> list[Shape]:
    """How to read the cells. cell: kind, sample and meaning of a grey one; word: "known" or "final"."""
    y, left = top + CELL / 2 + 4, MARGIN
    shapes: list[Shape] = []
    entries = (
        ("", "given", "text", "given"),
        ("cell", *cell),
        ("new", "known", "text", f"{word} since the row above"),
    )
    for box, kind, sample, meaning in entries:
        width = TEXT_ADVANCE * 6
        if box:
            shapes.append(Boxes(box, [(left, top, width, CELL)]))
        shapes.append(Text(kind, left + width / 2, y, sample))
        shapes.append(Text("label", left + width + 8, y, meaning))
        left += width + 8 + LABEL_ADVANCE * len(meaning) + 28
    return shapes


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
