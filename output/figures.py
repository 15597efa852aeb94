"""Figures without pyplot: no global state, and no window wherever this runs."""

import os
from pathlib import Path
from typing import Any

from prime_v2.output.atomic import written_whole


def new_figure(width: float, height: float, *, dpi: float, layout: Any = "constrained") -> Any:
    """An empty Matplotlib figure; width and height in inches, layout a name of its engines or None."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout=layout)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Save a figure in the format of the suffix, whole or not at all; folders above are made. Returns the path."""
    path = Path(path)
    with written_whole(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower() or None)
    return path
