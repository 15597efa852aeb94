"""A drawing of boxes, dots, lines and texts: one list of shapes that is written as SVG or as PNG.

Lengths are pixels, y grows downwards. An SVG follows the reader's light or dark preference, a PNG is light; both bring
their own background.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from prime_v2.output.atomic import write_text
from prime_v2.output.figures import new_figure, save_figure
from prime_v2.output.places import check_suffix

SUFFIXES = (".svg", ".png")
ROUND = 3.0  # radius of the corners of a box, drawn as a stroke around a smaller one
DOT = 2.4  # side of a dot
CARD_RADIUS = 10.0  # of the corners of the background
PNG_SCALE, PNG_TALLEST = 2.0, 32_768  # dots of a PNG per pixel, fewer where it would have more rows than Agg draws
SMALLEST_LETTERS = 2.0  # points, of a text that is squeezed in a PNG
UNITS_PER_INCH, POINTS_PER_INCH = 100.0, 72.0
PNG_FONTS = ("DejaVu Sans Mono", "DejaVu Sans")  # Matplotlib brings them
NO_GLYPH = "□"  # in a PNG, for a character that these fonts lack


@dataclass(frozen=True)
class Palette:
    """Colours by what they are for; the kinds of texts and boxes are among the names."""

    card: str
    frame: str
    rule: str
    cell: str
    new: str
    text: str
    given: str
    known: str
    changing: str
    digit: str
    dot: str
    label: str


LIGHT = Palette(
    card="#ffffff",
    frame="#d1d9e0",
    rule="#e6eaee",
    cell="#f3f5f7",
    new="#d8ecff",
    text="#1f2328",
    given="#1f2328",
    known="#0550ae",
    changing="#8b949e",
    digit="#0969da",
    dot="#c3cad1",
    label="#59636e",
)
DARK = Palette(
    card="#0d1117",
    frame="#3d444d",
    rule="#222a33",
    cell="#1a2029",
    new="#143058",
    text="#e6edf3",
    given="#e6edf3",
    known="#a5d3ff",
    changing="#6e7781",
    digit="#6cb6ff",
    dot="#454e59",
    label="#9198a1",
)


@dataclass(frozen=True)
class Face:
    """How texts of a kind are set: size in pixels, weight, and whether x is their middle or their left end."""

    size: float = 13.0
    bold: bool = False
    middle: bool = True


FACES = {
    "text": Face(),
    "given": Face(bold=True),
    "known": Face(bold=True),
    "changing": Face(),
    "digit": Face(size=9.5),
    "label": Face(size=11.0, middle=False),
}


@dataclass(frozen=True)
class Boxes:
    """Boxes of one kind with round corners, each (left, top, width, height)."""

    kind: str
    places: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Dots:
    """Small squares by their middles (x, y)."""

    places: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Rule:
    """A horizontal line."""

    left: float
    right: float
    y: float


@dataclass(frozen=True)
class Text:
    """One line of text, y its baseline. room: the width that a wider text is squeezed into, or None."""

    kind: str
    x: float
    y: float
    text: str
    room: float | None = None


@dataclass(frozen=True)
class Digits:
    """Numbers that belong together, each (x, y, text), set as texts of the kind "digit"."""

    places: Sequence[tuple[float, float, str]]


Shape = Boxes | Dots | Rule | Text | Digits


@dataclass(frozen=True)
class Drawing:
    """Shapes on a card of this size, boxes before the texts on them, with a title and a description in words."""

    width: float
    height: float
    title: str
    description: str
    shapes: Sequence[Shape]


def save_drawing(drawing: Drawing, path: Path) -> Path:
    """Write the drawing as SVG or PNG, as the suffix says, whole or not at all."""
    check_suffix(path, "the name", SUFFIXES)
    if path.suffix.lower() == ".svg":
        return write_text(path, svg_text(drawing))
    return save_figure(png_figure(drawing), path)


# SVG


def svg_text(drawing: Drawing) -> str:
    """The drawing as SVG, a line for each shape."""
    width, height = number(drawing.width), number(drawing.height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">\n<title>{escape(drawing.title)}</title>\n<desc>{escape(drawing.description)}</desc>\n'
        f'<style>{style()}</style>\n<rect class="card" x="0.5" y="0.5" width="{number(drawing.width - 1)}" '
        f'height="{number(drawing.height - 1)}" rx="{number(CARD_RADIUS)}"/>\n'
        + "\n".join(map(element, drawing.shapes))
        + "\n</svg>\n"
    )


def style() -> str:
    """Style sheet of the classes, which are the kinds of shapes."""
    faces = "".join(
        f".{kind} {{ font-size: {number(face.size)}px; text-anchor: {'middle' if face.middle else 'start'}"
        f"{'; font-weight: bold' if face.bold else ''} }}\n"
        for kind, face in FACES.items()
    )
    return (
        "\ntext { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace }\n"
        f"{faces}.cell, .new {{ stroke-width: {number(2 * ROUND)}px; stroke-linejoin: round }}\n{colours(LIGHT)}"
        f"@media (prefers-color-scheme: dark) {{\n{colours(DARK)}}}\n"
    )


def colours(palette: Palette) -> str:
    """Rules of the colours."""
    filled = "".join(f".{kind} {{ fill: {getattr(palette, kind)} }}\n" for kind in (*FACES, "dot"))
    boxes = "".join(
        f".{kind} {{ fill: {colour}; stroke: {colour} }}\n"
        for kind, colour in asdict(palette).items()
        if kind in ("cell", "new")
    )
    card = f".card {{ fill: {palette.card}; stroke: {palette.frame} }}\n"
    return f"{card}{boxes}{filled}.rule {{ stroke: {palette.rule} }}\n"


def element(shape: Shape) -> str:
    """One element of SVG."""
    match shape:
        case Boxes(kind, places):
            return f'<path class="{kind}" d="{"".join(box_path(*each) for each in places)}"/>'
        case Dots(places):
            half, side = DOT / 2, number(DOT)
            path = (f"M{number(x - half)} {number(y - half)}h{side}v{side}h-{side}z" for x, y in places)
            return f'<path class="dot" d="{"".join(path)}"/>'
        case Rule(left, right, y):
            return f'<path class="rule" d="M{number(left)} {number(y)}H{number(right)}"/>'
        case Text(kind, x, y, text, room):
            fit = "" if room is None else f' textLength="{number(room)}" lengthAdjust="spacingAndGlyphs"'
            return f'<text class="{kind}" x="{number(x)}" y="{number(y)}"{fit}>{escape(text)}</text>'
        case Digits(places):
            spans = (f'<tspan x="{number(x)}" y="{number(y)}">{escape(text)}</tspan>' for x, y, text in places)
            return f'<text class="digit">{"".join(spans)}</text>'


def box_path(left: float, top: float, width: float, height: float) -> str:
    """Path of a box; the stroke makes its corners round."""
    across = width - 2 * ROUND
    return (
        f"M{number(left + ROUND)} {number(top + ROUND)}h{number(across)}v{number(height - 2 * ROUND)}"
        f"h{number(-across)}z"
    )


def number(value: float) -> str:
    return f"{value:.5g}"


# PNG


def png_figure(drawing: Drawing) -> Any:
    """The drawing as a Matplotlib figure, in the light colours."""
    from matplotlib.patches import FancyBboxPatch

    scale = min(PNG_SCALE, PNG_TALLEST / drawing.height)
    size = drawing.width / UNITS_PER_INCH, drawing.height / UNITS_PER_INCH
    figure = new_figure(*size, dpi=scale * UNITS_PER_INCH, layout=None)
    figure.patch.set_alpha(0.0)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.set_axis_off()
    card = FancyBboxPatch(
        (0.5, 0.5),
        drawing.width - 1,
        drawing.height - 1,
        boxstyle=f"round,pad=0,rounding_size={CARD_RADIUS}",
        facecolor=LIGHT.card,
        edgecolor=LIGHT.frame,
        linewidth=points(1),
        zorder=0,
    )
    axes.add_patch(card)
    for shape in drawing.shapes:
        add_shape(axes, shape)
    return figure


def add_shape(axes: Any, shape: Shape) -> None:
    """Draw a shape on axes whose unit is a pixel; texts lie above all others whatever their order."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    match shape:
        case Boxes(kind, places):
            boxes = [
                Rectangle((left + ROUND, top + ROUND), width - 2 * ROUND, height - 2 * ROUND)
                for left, top, width, height in places
            ]
            style = {"color": getattr(LIGHT, kind), "linewidth": points(2 * ROUND), "joinstyle": "round"}
            axes.add_collection(PatchCollection(boxes, **style), autolim=False)
        case Dots(places):
            squares = [Rectangle((x - DOT / 2, y - DOT / 2), DOT, DOT) for x, y in places]
            axes.add_collection(PatchCollection(squares, color=LIGHT.dot, linewidth=0), autolim=False)
        case Rule(left, right, y):
            axes.plot([left, right], [y, y], color=LIGHT.rule, linewidth=points(1), scalex=False, scaley=False)
        case Text(kind, x, y, text, room):
            add_text(axes, kind, x, y, text, room)
        case Digits(places):
            for x, y, text in places:
                add_text(axes, "digit", x, y, text)


def add_text(axes: Any, kind: str, x: float, y: float, text: str, room: float | None = None) -> None:
    """A text as it stands, "$" included; one that is to fit in `room` has smaller letters."""
    weight = "bold" if FACES[kind].bold else "normal"
    found = axes.text(
        x,
        y,
        with_glyphs(text, weight),
        fontfamily=PNG_FONTS,
        fontsize=points(FACES[kind].size),
        fontweight=weight,
        color=getattr(LIGHT, kind),
        horizontalalignment="center" if FACES[kind].middle else "left",
        verticalalignment="baseline",
        parse_math=False,
        usetex=False,
    )
    # Letters are a whole number of dots wide, so one step may not be enough.
    while room is not None and found.get_fontsize() > SMALLEST_LETTERS:
        extent = found.get_window_extent().transformed(axes.transData.inverted())
        if abs(extent.width) <= room:
            break
        found.set_fontsize(found.get_fontsize() * min(0.95, room / abs(extent.width)))


def with_glyphs(text: str, weight: str) -> str:
    """The text with `NO_GLYPH` for what neither font has in this weight."""
    if text.isascii():
        return text
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=each, weight=weight))) for each in PNG_FONTS]
    return "".join(each if any(font.get_char_index(ord(each)) for font in fonts) else NO_GLYPH for each in text)


def points(pixels: float) -> float:
    return pixels * POINTS_PER_INCH / UNITS_PER_INCH
