"""The points of a scaling law: a training run's size, tokens, FLOPs and loss, from records or CSV files.

CSV: one point a line under the header

    family,train_flops,nonembedding_params,train_tokens,loss_nats_per_token,is_bound[,stderr]

Lines that begin with # are comments. `published` names the published points (studies/scaling/data/isoflop_losses.csv).
"""

import contextlib
import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_v2.output.records import code_of, read_record
from prime_v2.studies.compare.config import COMMON, COUNTS

PUBLISHED = "published"
PUBLISHED_POINTS = Path(__file__).with_name("data") / "isoflop_losses.csv"
PUBLISHED_RUNS = Path(__file__).with_name("data") / "scaling_runs.csv"
COLUMNS = ("family", "train_flops", "nonembedding_params", "train_tokens", "loss_nats_per_token", "is_bound")
LOSSES = ("bound", "paper_loss")
# What decides which text a run sees, in which order, and on which text its loss is taken.
ORDER_OPTIONS = (*(name for name in COMMON if name != "eval_sequences"), "seed")
# Weights of a layer in units of hidden_size**2: the published sizes are named by 12; SwiGLU layers of width
# 4 hidden_size, which is what train.py counts, have 16 (docs/architecture.md, "Counting").
PUBLISHED_WEIGHTS, COUNTED_WEIGHTS = 12, 16


@dataclass(frozen=True)
class Point:
    """One training run, or a published point. Parameters without embedding and head; loss in nats per token.

    is_bound: whether the loss is -log p or an upper bound on it. loss_name: which loss of a record it is.
    code, data_order: what must be equal for points to be of one experiment; data_order as (name, value) pairs.
    weights_per_layer: the convention that `parameters` follows, see PUBLISHED_WEIGHTS.
    """

    family: str
    flops: float
    parameters: float
    tokens: float
    loss: float
    stderr: float | None
    is_bound: bool
    source: str
    code: str
    data_order: tuple[tuple[str, str], ...]
    degrees: float | None = None  # of the standard error
    loss_name: str = "bound"
    weights_per_layer: int = PUBLISHED_WEIGHTS


@dataclass(frozen=True)
class Shape:
    """A published network. `ffn`: width of each SwiGLU matrix; batch in sequences."""

    family: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    batch: int
    sequence_length: int

    def parameters(self, weights_per_layer: int) -> int:
        """Non-embedding parameters by a convention, without norms."""
        return weights_per_layer * self.hidden**2 * self.layers


def read_points(sources: Sequence[str], *, loss: str = "bound", count: str = "6nd") -> list[Point]:
    """The points of CSV files, records of train.py and `prime-v2 compare`, folders of them, and `published`.

    A run that is given twice counts once.

    loss, count: what is taken from a record (LOSSES, COUNTS); a CSV file has one loss and one count.
    Raises ValueError, with a sentence, for what is missing or malformed.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} must be one of {', '.join(LOSSES)}")
    if count not in COUNTS:
        raise ValueError(f"count={count!r} must be one of {', '.join(COUNTS)}")
    found: list[Point] = []
    seen: set[tuple] = set()
    for source in dict.fromkeys(sources):
        if source == PUBLISHED:
            found += _read_csv(PUBLISHED_POINTS, PUBLISHED)
            continue
        path = Path(source).expanduser()
        if not path.exists():
            raise ValueError(
                f"{source} does not exist; give a record of train.py, a folder of them, a .csv file or {PUBLISHED}"
            )
        if path.suffix == ".csv":
            found += _read_csv(path, path.name)
            continue
        for name, record in _training_records(path):
            point = _point_of_record(name, record, loss, count)
            # train.py writes its record twice where --record is given, and a comparison has its runs' numbers again.
            key = (record.get("time_utc"), record.get("command"), record.get("commit"), point.loss, point.tokens)
            if key not in seen:
                seen.add(key)
                found.append(point)
    return found


def check_one_experiment(points: Iterable[Point]) -> None:
    """ValueError, naming the difference, unless all points have one code and one data order."""
    points = list(points)
    codes = sorted({point.code for point in points})
    orders = sorted({point.data_order for point in points})
    way_out = "give runs of one experiment, or add --allow-mixed"
    if len(orders) > 1:
        values: dict[str, set[str]] = {}
        for order in orders:
            for name, value in order:
                values.setdefault(name, set()).add(value)
        lacking = {name for name in values if any(name not in dict(order) for order in orders)}
        differing = [name for name in values if len(values[name]) > 1 or name in lacking]
        what = ", ".join(f"{name} ({' or '.join(sorted(values[name]))})" for name in differing[:4])
        raise ValueError(f"the points differ in data order: {what}; {way_out}")
    if len(codes) > 1:
        raise ValueError(f"the points come from {len(codes)} versions of the code ({', '.join(codes[:4])}); {way_out}")


def read_shapes() -> list[Shape]:
    """The published networks (studies/scaling/data/scaling_runs.csv)."""
    return [
        Shape(
            row["family"],
            int(row["layers"]),
            int(row["hidden"]),
            int(row["heads"]),
            int(row["ffn"]),
            int(row["global_batch_sequences"]),
            int(row["sequence_length"]),
        )
        for _, row in _csv_rows(PUBLISHED_RUNS)
    ]


def _csv_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV file whose comments begin with #."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); give a .csv file") from None
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not kept:
        raise ValueError(f"{path} is empty; its header must be {','.join(COLUMNS)}[,stderr]")
    header = _cells(path, *kept[0])
    rows = []
    for number, line in kept[1:]:
        cells = _cells(path, number, line)
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {number}: {len(cells)} cells under a header of {len(header)}")
        rows.append((number, dict(zip(header, cells, strict=True))))
    if not rows:
        raise ValueError(f"{path} has a header and no points; give at least one line under it")
    return rows


def _cells(path: Path, number: int, line: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line]))]
    except csv.Error as error:
        raise ValueError(f"{path}, line {number} is no line of a CSV file of points: {error}") from None


def _read_csv(path: Path, name: str) -> list[Point]:
    """Points of a CSV file; its name is their code and data order, since it says nothing about either."""
    rows = _csv_rows(path)
    missing = [column for column in COLUMNS if column not in rows[0][1]]
    unknown = [column for column in rows[0][1] if column not in (*COLUMNS, "stderr")]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}, which nothing reads"
        raise ValueError(f"the header of {path} {what}; it must be {','.join(COLUMNS)}[,stderr]")
    origin = name if name == PUBLISHED else f"{name} (a CSV file)"
    points = []
    for number, row in rows:
        place = f"{path}, line {number}"
        is_bound = {"true": True, "1": True, "false": False, "0": False}.get(row["is_bound"].lower())
        if is_bound is None:
            raise ValueError(f"{place}: is_bound={row['is_bound']!r} must be true or false")
        if not row["family"]:
            raise ValueError(f"{place}: the family is empty; name it, e.g. MDM")
        flops, parameters, tokens, loss = (_positive(row[column], place, column) for column in COLUMNS[1:5])
        points.append(
            Point(
                family=row["family"],
                flops=flops,
                parameters=parameters,
                tokens=tokens,
                loss=loss,
                stderr=_positive(row["stderr"], place, "stderr") if row.get("stderr") else None,
                is_bound=is_bound,
                source=name,
                code=origin,
                data_order=(("source", origin),),
                loss_name="as given",
            )
        )
    return points


def _positive(value: Any, place: str, name: str) -> float:
    """A number above 0, or ValueError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{place}: {name}={value!r} must be a number above 0")
    return number


def _training_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(name, record) of every run in a record, or in those below a folder, where other files are passed over.

    A folder's comparisons come first: the runs in them are known by their names there.
    """
    if path.is_file():
        found = _runs_of(path, read_record(path))
        if not found:
            raise ValueError(f"{path} is no record of a training run; give one that train.py wrote, or a .csv file")
        return found
    kept = []
    for file in sorted(path.rglob("*.json")):
        with contextlib.suppress(ValueError):  # other JSON
            kept.append(_runs_of(file, read_record(file)))
    found = [run for runs in sorted(kept, key=len, reverse=True) for run in runs]
    if not found:
        raise ValueError(f"{path} holds no record of a training run; give a folder of records that train.py wrote")
    return found


def _runs_of(path: Path, record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The run of a record of train.py, those of a record of `prime-v2 compare`, none of any other record."""
    results = record["results"]
    if _is_run(results):
        return [(_short_name(path), record)]
    rows = results.get("rows")
    if not isinstance(rows, list) or not all(_is_run(row) for row in rows):
        return []
    # What two runs are compared by is their name: they may be of one family.
    return [(f"{_short_name(path)}, {row['name']}", {**row, "results": row | {"family": row["name"]}}) for row in rows]


def _is_run(results: Any) -> bool:
    parts = ("training", "evaluation", "options", "data")
    return isinstance(results, dict) and all(isinstance(results.get(part), dict) for part in parts)


def _short_name(path: Path) -> str:
    """The file's name; of a run's own record, with the run's folder."""
    return "/".join(path.resolve().parts[-3:]) if path.parent.name == "results" else path.name


def _point_of_record(name: str, record: dict[str, Any], loss: str, count: str) -> Point:
    results = record["results"]
    training, scored = results["training"], results["evaluation"].get(loss)
    if not isinstance(scored, dict) or "is_bound" not in scored:
        raise ValueError(
            f"{name} has no results.evaluation.{loss} that says whether it is a bound; give a record of train.py"
        )
    fields = ("parameters_non_embedding", "tokens", COUNTS[count])
    parameters, tokens, flops = (_positive(training.get(each), name, each) for each in fields)
    stderr = scored.get("stderr")
    options, prints = results["options"], results["data"].get("fingerprints", {})
    order = [(each, str(options[each])) for each in ORDER_OPTIONS if each in options]
    order += [(f"fingerprint of {split}", str(prints[split])[:12]) for split in ("train", "test") if split in prints]
    return Point(
        family=_family(name, results),
        flops=flops,
        parameters=parameters,
        tokens=tokens,
        loss=_positive(scored.get("nats_per_token"), name, f"{loss}.nats_per_token"),
        stderr=_positive(stderr, name, "stderr") if stderr else None,
        is_bound=bool(scored["is_bound"]),
        source=name,
        code=code_of(record, 12),
        data_order=tuple(order),
        degrees=_positive(scored["degrees"], name, "degrees") if scored.get("degrees") else None,
        loss_name=loss,
        weights_per_layer=COUNTED_WEIGHTS,
    )


def _family(name: str, results: dict[str, Any]) -> str:
    """The family that a record names, or that the config of a Prime-v2 model says."""
    if results.get("family"):
        return str(results["family"])
    config = results.get("config") or {}
    if config.get("model_type") != "prime_v2":
        raise ValueError(
            f"{name} names no family and its model_type is {config.get('model_type')!r}; add a name, such as "
            f'"family": "ARM", to its results'
        )
    missing = [field for field in ("num_subtokens", "base", "shuffle_ratio") if field not in config]
    if missing:
        raise ValueError(f"the config in {name} lacks {', '.join(missing)}; give a record that train.py wrote")
    if config["num_subtokens"] == 1:
        return "MDM"
    return "MDM-Prime-v2" if config["base"] == 2 and config["shuffle_ratio"] > 0 else "MDM-Prime"
