"""The map of the rooms in docs/architecture.md, drawn from the imports in the source.

python docs/map.py            # rewrite docs/architecture_map.svg
python docs/map.py --check    # exit status 1 when it is out of date
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture_map.svg"
ROOMS = {
    "modeling_prime_v2": "noise, network, likelihood, generate",
    "output": "files, locks, records, tables, pictures",
    "tokenization": "tokenizer, BPE, codes, entropy",
    "hub_card": "model card, export, conversion",
    "data": "documents, splits, packed blocks, collation",
    "eval": "perplexity, lm-eval, answer choices, suites",
    "training": "options, trainer, checkpoints, report",
    "studies": "compare, scaling, analysis",
    "commands": "prime-v2: a file a sub-command",
}
SCRIPTS = {"train.py": "a training run", "benchmarks": "speed, memory, kills", "docs": "pages and their tables"}
BOX, GAP, ROW, TOP = (270.0, 58.0), 30.0, 104.0, 24.0  # width and height of a box, between boxes, between rows, above
STYLE = """
.card { fill: #ffffff; stroke: #d1d9e0 } .room { fill: #f3f5f7; stroke: #d1d9e0 }
.hub { fill: #d8ecff; stroke: #9cc7f0 }
text { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; text-anchor: middle }
.name { fill: #1f2328; font-size: 14px; font-weight: bold } .what { fill: #59636e; font-size: 10px }
.arrow { fill: none; stroke: #8b949e; stroke-width: 1.3; marker-end: url(#tip) } #tip path { fill: #8b949e }
@media (prefers-color-scheme: dark) {
.card { fill: #0d1117; stroke: #3d444d } .room { fill: #1a2029; stroke: #3d444d }
.hub { fill: #143058; stroke: #2f5f9e }
.name { fill: #e6edf3 } .what { fill: #9198a1 } .arrow { stroke: #6e7781 } #tip path { fill: #6e7781 } }
"""


def imports() -> dict[str, set[str]]:
    """For each room and script the rooms that its files import, wherever in a file the import stands."""
    found: dict[str, set[str]] = {}
    for name in (*ROOMS, *SCRIPTS):
        place = ROOT / name
        rooms = set()
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            if path == ROOT / "modeling_prime_v2" / "__init__.py":  # the package's names, imported on demand
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    rooms |= {room for each in node.names for room in rooms_of(each.name)}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    rooms |= {room for each in node.names for room in rooms_of(f"{node.module}.{each.name}")}
        found[name] = rooms - {name}
    return found


def rooms_of(module: str) -> list[str]:
    """The room of a module prime_v2.…; none of another module and of the package itself."""
    parts = module.split(".")
    if parts[0] != "prime_v2" or len(parts) < 2:
        return []
    return [parts[1] if parts[1] in ROOMS else "modeling_prime_v2"]


def levels(needed: dict[str, set[str]]) -> dict[str, int]:
    """How far above the lowest row each stands: one more than the highest of what it imports."""
    found: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in found:
            found[name] = 1 + max((level(each) for each in needed[name]), default=-1)
        return found[name]

    for name in needed:
        level(name)
    return found


def direct(needed: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that no chain of others implies: what the map draws."""

    def reached(name: str) -> set[str]:
        return needed[name] | {far for each in needed[name] for far in reached(each)}

    return [
        (name, each)
        for name in needed
        for each in sorted(needed[name])
        if not any(each in reached(other) for other in needed[name] - {each})
    ]


def draw() -> str:
    """The map as SVG: the lowest room at the bottom, an arrow from each room to what it imports."""
    needed = imports()
    heights = levels(needed)
    top_level = max(heights.values())
    widest = max(list(heights.values()).count(height) for height in heights.values())
    width = widest * BOX[0] + (widest - 1) * GAP + 2 * TOP
    places: dict[str, tuple[float, float]] = {}  # middle of the upper edge
    for height in range(top_level + 1):
        row = [name for name in needed if heights[name] == height]
        left = (width - len(row) * BOX[0] - (len(row) - 1) * GAP) / 2 + BOX[0] / 2
        for i, name in enumerate(row):
            places[name] = (left + i * (BOX[0] + GAP), TOP + (top_level - height) * ROW)
    parts = []
    for name, each in direct(needed):
        (x, y), (to_x, to_y) = places[name], places[each]
        bend = (to_y - y - BOX[1]) / 2
        start = f"M{x:g} {y + BOX[1]:g}C{x:g} {y + BOX[1] + bend:g}"
        if heights[name] - heights[each] > 1:  # beside the rooms between them
            side, middle, to_x = x + BOX[0] / 2, y + BOX[1] / 2, to_x + BOX[0] / 2 - 20
            start = f"M{side:g} {middle:g}C{to_x:g} {middle:g}"
        parts.append(f'<path class="arrow" d="{start} {to_x:g} {to_y - bend:g} {to_x:g} {to_y - 3:g}"/>')
    for name, what in {**ROOMS, **SCRIPTS}.items():
        x, y = places[name]
        kind = "hub" if name == "modeling_prime_v2" else "room"
        shown = name if name in SCRIPTS and name.endswith(".py") else f"{name}/"
        parts.append(
            f'<rect class="{kind}" x="{x - BOX[0] / 2:g}" y="{y:g}" width="{BOX[0]:g}" height="{BOX[1]:g}" rx="8"/>'
            f'<text class="name" x="{x:g}" y="{y + 25:g}">{shown}</text>'
            f'<text class="what" x="{x:g}" y="{y + 43:g}">{what}</text>'
        )
    bottom = TOP + top_level * ROW + BOX[1] + TOP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {bottom:g}" width="{width:g}" '
        f'height="{bottom:g}" role="img">\n<title>The rooms and what they import</title>\n<style>{STYLE}</style>\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>\n'
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1:g}" height="{bottom - 1:g}" rx="10"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        return int(not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != draw())
    PICTURE.write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
