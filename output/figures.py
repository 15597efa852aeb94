"""Figures without pyplot: no global state, and no window wherever this runs."""

import os
from pathlib import Path
from typing import Any


def new_figure(width: float, height: float, *, dpi: int, layout: Any = "constrained") -> Any:
    """An empty Matplotlib figure; width and height in inches, layout a name of its engines or None."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout=layout)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Save a figure in the format of the suffix; folders above are made. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
