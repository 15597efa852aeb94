"""What a record keeps of a family's fits, and the fits read back from it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from prime_v2.output.records import read_record
from prime_v2.studies.scaling.families import FamilyFit, named_families
from prime_v2.studies.scaling.fit import PARAMETERS, Law, LawFit
from prime_v2.studies.scaling.isoflop import IsoFlop, Parabola, PowerLaw

REPLICATE_DIGITS = 5  # of bootstrap samples in a record: far below the width of any interval
RANGES = ("flops", "parameters", "tokens", "k_range")  # of a family, pairs
# Fields of a LawFit that a record has as they are, and their names there.
LAW_FIELDS = {
    "objective": "objective",
    "rms": "residual_rms_log",
    "largest": "residual_largest_log",
    "starts": "starts",
    "starts_at_optimum": "starts_at_optimum",
    "notes": "notes",
}
POWER_LAW_FIELDS = ("log_coefficient", "exponent")


def to_json(fit: FamilyFit) -> dict[str, Any]:
    """A family's fits for a record; `from_json` reads them back."""
    names = [each.name for each in fields(fit) if each.name not in ("law", "isoflop", *RANGES)]
    return {
        "label": fit.label,
        **{name: getattr(fit, name) for name in names},
        **{name: list(getattr(fit, name)) for name in RANGES},
        "approach_3": None if fit.law is None else _law_json(fit.law),
        "approach_2": None if fit.isoflop is None else _isoflop_json(fit.isoflop),
    }


def _law_json(fit: LawFit) -> dict[str, Any]:
    values: dict[str, Callable[[Law], Any]] = {name: attrgetter(name) for name in PARAMETERS}
    values["parameters_exponent"] = lambda law: law.exponents[0]
    values["tokens_exponent"] = lambda law: law.exponents[1]
    return {
        **{name: {"value": float(of(fit.law)), "interval_95": fit.interval(of)} for name, of in values.items()},
        **{name: getattr(fit, field) for field, name in LAW_FIELDS.items()},
        "replicates": _columns(PARAMETERS, fit.replicates),
    }


def _isoflop_json(fit: IsoFlop) -> dict[str, Any]:
    return {
        "budgets": [asdict(each) | {"inside": each.inside} for each in fit.parabolas],
        "power_laws": {name: _power_law_json(law) for name, law in fit.power_laws.items()},
        "notes": fit.notes,
    }


def _power_law_json(law: PowerLaw) -> dict[str, Any]:
    return {
        **{name: getattr(law, name) for name in POWER_LAW_FIELDS},
        "exponent_interval_95": law.interval(lambda each: each.exponent),
        "replicates": _columns(POWER_LAW_FIELDS, law.replicates),
    }


def _columns(names: Sequence[str], samples: np.ndarray) -> dict[str, str]:
    """Bootstrap samples (R, columns), each column as one string, which is shorter than a list of numbers."""
    return {
        name: " ".join(f"{value:.{REPLICATE_DIGITS}g}" for value in column)
        for name, column in zip(names, samples.T, strict=True)
    }


def _samples(names: Sequence[str], columns: dict[str, str]) -> np.ndarray:
    """(R, columns), the inverse of `_columns`."""
    return np.array([columns[name].split() for name in names], dtype=float).T


def from_json(content: dict[str, Any]) -> FamilyFit:
    """The fits of a family in a record of `prime-v2 scaling fit`; KeyError or TypeError for anything else."""
    plain = {each.name: content[each.name] for each in fields(FamilyFit) if each.name not in ("law", "isoflop")}
    plain |= {name: tuple(plain[name]) for name in RANGES}
    law, isoflop = None, None
    if (found := content["approach_3"]) is not None:
        law = LawFit(
            law=Law.of([found[name]["value"] for name in PARAMETERS], content["k"]),
            replicates=_samples(PARAMETERS, found["replicates"]),
            **{field: found[name] for field, name in LAW_FIELDS.items()},
        )
    if (found := content["approach_2"]) is not None:
        parabolas = [
            Parabola(**{each.name: budget[each.name] for each in fields(Parabola)} | {"range": tuple(budget["range"])})
            for budget in found["budgets"]
        ]
        laws = {
            name: PowerLaw(each["log_coefficient"], each["exponent"], _samples(POWER_LAW_FIELDS, each["replicates"]))
            for name, each in found["power_laws"].items()
        }
        isoflop = IsoFlop(parabolas, laws, found["notes"])
    return FamilyFit(**plain, law=law, isoflop=isoflop)


def read_fits(path: Path, asked: Sequence[str]) -> dict[str, FamilyFit]:
    """The fits of a record of `prime-v2 scaling fit`, of the families asked for (in any case; none for all)."""
    record = read_record(path)
    try:
        found = {name: from_json(each) for name, each in record["results"]["families"].items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{path} is no record of prime-v2 scaling fit; give one that its --output wrote") from None
    return {name: found[name] for name in named_families(asked, found, f"{path} has no fit of", "it has")}
