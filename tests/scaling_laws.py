"""A known scaling law and points of it, for the tests of scaling fits."""

import csv
from pathlib import Path

import numpy as np

from prime_v2.studies.scaling.fit import Law
from prime_v2.studies.scaling.points import Point

LAW = Law(1.7, 400.0, 2000.0, 0.34, 0.37)
FEW_STARTS = (0.2, 0.4, 0.6)  # instead of 64 starts, which none of these points needs


def grid(law: Law = LAW, budgets: int = 6, sizes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) of isoFLOP curves about the optimum of a law, from 3e18 to 3e20 FLOPs."""
    flops = np.repeat(np.geomspace(3e18, 3e20, budgets), sizes)
    parameters = law.allocate(flops)[0] * np.tile(np.geomspace(0.2, 5, sizes), budgets)
    return parameters, flops / (law.k * parameters)


def points_of(law: Law, family: str = "MDM", **changes) -> list[Point]:
    """Points of a law, noiseless."""
    fixed = {"stderr": None, "is_bound": True, "source": "made", "code": "c", "data_order": (("seed", "0"),)}
    return [
        Point(
            family=family,
            flops=float(law.k * n * d),
            parameters=float(n),
            tokens=float(d),
            loss=float(law.loss(n, d)),
            **{**fixed, **changes},
        )
        for n, d in zip(*grid(law), strict=True)
    ]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))
