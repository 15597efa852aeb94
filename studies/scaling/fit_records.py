"""What a record keeps of a family's fits, and the fits read back from it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prime_v2.output.records import read_record
from prime_v2.studies.scaling.families import FamilyFit, named_families
from prime_v2.studies.scaling.fit import PARAMETERS, Law, LawFit
from prime_v2.studies.scaling.isoflop import IsoFlop, Parabola, PowerLaw

REPLICATE_DIGITS = 5  # of bootstrap samples in a record: far below the width of any interval


def to_json(fit: FamilyFit) -> dict[str, Any]:
    """A family's fits for a record; `from_json` reads them back."""
    plain = {
        name: getattr(fit, name)
        for name in FamilyFit.__dataclass_fields__
        if name not in ("law", "isoflop", "flops", "parameters", "tokens", "k_range")
    }
    ranges = {name: list(getattr(fit, name)) for name in ("flops", "parameters", "tokens", "k_range")}
    return {"label": fit.label, **plain, **ranges, "approach_3": _law_json(fit), "approach_2": _isoflop_json(fit)}


def _law_json(fit: FamilyFit) -> dict[str, Any] | None:
    law = fit.law
    if law is None:
        return None
    values: dict[str, Callable[[Law], Any]] = {
        "E": lambda each: each.E,
        "A": lambda each: each.A,
        "B": lambda each: each.B,
        "a": lambda each: each.a,
        "b": lambda each: each.b,
        "parameters_exponent": lambda each: each.exponents[0],
        "tokens_exponent": lambda each: each.exponents[1],
    }
    return {
        **{name: {"value": float(of(law.law)), "interval_95": law.interval(of)} for name, of in values.items()},
        "objective": law.objective,
        "residual_rms_log": law.rms,
        "residual_largest_log": law.largest,
        "starts": law.starts,
        "starts_at_optimum": law.starts_at_optimum,
        "notes": law.notes,
        "replicates": {name: _numbers(law.replicates[:, i]) for i, name in enumerate(PARAMETERS)},
    }


def _isoflop_json(fit: FamilyFit) -> dict[str, Any] | None:
    if fit.isoflop is None:
        return None
    laws = fit.isoflop.power_laws
    return {
        "budgets": [asdict(each) | {"inside": each.inside} for each in fit.isoflop.parabolas],
        "power_laws": {
            name: {
                "log_coefficient": law.log_coefficient,
                "exponent": law.exponent,
                "exponent_interval_95": law.interval(lambda each: each.exponent),
                "replicates": {
                    name: _numbers(law.replicates[:, i]) for i, name in enumerate(("log_coefficient", "exponent"))
                },
            }
            for name, law in laws.items()
        },
        "notes": fit.isoflop.notes,
    }


def _numbers(values: np.ndarray) -> str:
    """Bootstrap samples as one string, which in JSON is one line instead of a thousand."""
    return " ".join(f"{value:.{REPLICATE_DIGITS}g}" for value in values)


def _samples(replicates: dict[str, str]) -> np.ndarray:
    """(R, columns): inverse of `_numbers` for each column."""
    return np.array([column.split() for column in replicates.values()], dtype=float).T


def from_json(content: dict[str, Any]) -> FamilyFit:
    """The fits of a family in a record of `prime-v2 scaling fit`; KeyError or TypeError for anything else."""
    plain = {name: content[name] for name in FamilyFit.__dataclass_fields__ if name not in ("law", "isoflop")}
    for name in ("flops", "parameters", "tokens", "k_range"):
        plain[name] = tuple(plain[name])
    law, isoflop = None, None
    if content["approach_3"] is not None:
        found = content["approach_3"]
        law = LawFit(
            law=Law.of([found[name]["value"] for name in PARAMETERS], content["k"]),
            replicates=_samples({name: found["replicates"][name] for name in PARAMETERS}),
            objective=found["objective"],
            rms=found["residual_rms_log"],
            largest=found["residual_largest_log"],
            starts=found["starts"],
            starts_at_optimum=found["starts_at_optimum"],
            notes=found["notes"],
        )
    if content["approach_2"] is not None:
        found = content["approach_2"]
        budgets = [{key: value for key, value in each.items() if key != "inside"} for each in found["budgets"]]
        laws = {
            name: PowerLaw(each["log_coefficient"], each["exponent"], _samples(each["replicates"]))
            for name, each in found["power_laws"].items()
        }
        parabolas = [Parabola(**{**each, "range": tuple(each["range"])}) for each in budgets]
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


__all__ = ["from_json", "read_fits", "to_json"]
