"""Spectra of a network's weight matrices: the numbers of docs/analysis.md, from singular values."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

Progress = Callable[[int], None]  # called with the steps just done: matrices, or windows of text

KINDS = ("q", "k", "v", "o", "gate", "up", "down", "embedding", "head")
ATTENTION_KINDS = KINDS[:4]
PROJECTIONS = {f"{kind}_proj": kind for kind in KINDS[:7]} | {
    "out_proj": "o",
    "fc1": "up",
    "fc2": "down",
    "c_fc": "up",
}
SHOWN_VALUES = 32  # singular values of a matrix that a record holds
DIGITS = 6  # of a number in a record: as many as float32 weights have
TAIL_SHARE, MIN_TAIL = 0.1, 10  # eigenvalues above the cut-off of a tail: a share of all, but no fewer than a number
# Mean ln(eigenvalue / cut-off) below which a tail is a step, not a power law: the exponent would be above a million.
MIN_TAIL_SPREAD = 1e-6


@dataclass(frozen=True)
class Matrix:
    """A weight matrix (outputs, inputs), or an embedding (entries, width), on the network's device."""

    kind: str
    layer: int | None  # None: embedding, head
    name: str
    weight: Tensor


def projection_matrices(network: Any) -> list[Matrix]:
    """The matrices of `KINDS` in a network, by layer, then embedding and head. A tied head is not given again.

    Names are those of Llama (q_proj ... down_proj), OPT (out_proj, fc1, fc2) and GPT-2 (c_fc, c_proj; c_attn is split
    into its three parts). Embedding and head: get_input_embeddings() and get_output_embeddings().
    Raises ValueError where attention lacks q, k, v or o by these names.
    """
    found: list[Matrix] = []
    for name, module, layer in _matrices_in_layers(network):
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        parent, _, leaf = name.rpartition(".")
        kind = PROJECTIONS.get(leaf)
        if leaf == "c_attn" and isinstance(module, Conv1D) and len(weight) == 3 * weight.shape[1]:
            parts = zip("qkv", weight.chunk(3), strict=True)
            found += [Matrix(each, layer, f"{name}[{each}]", part) for each, part in parts]
        elif leaf == "c_proj":
            kind = "o" if hasattr(network.get_submodule(parent), "c_attn") else "down"
        if kind is not None:
            found.append(Matrix(kind, layer, name, weight))
    _check_attention(network, found)
    found.sort(key=lambda each: (each.layer, KINDS.index(each.kind)))
    return found + _embeddings(network)


def other_matrices(network: Any, found: list[Matrix]) -> list[str]:
    """Names of the parameters with two or more axes that are in none of these matrices, layers told as `*`."""
    measured = {each.name.partition("[")[0] for each in found}
    names = [
        name
        for name, parameter in network.named_parameters()
        if parameter.dim() > 1 and name.removesuffix(".weight") not in measured
    ]
    return sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})


def _matrices_in_layers(network: Any) -> Iterator[tuple[str, Any, int]]:
    """(name, module, layer) of each module with a weight matrix and a number in its name, the first one its layer."""
    for name, module in network.named_modules():
        number = re.search(r"\.(\d+)\.", name)
        weight = getattr(module, "weight", None)
        if number and isinstance(weight, Tensor) and weight.dim() == 2:
            yield name, module, int(number[1])


def _check_attention(network: Any, found: list[Matrix]) -> None:
    kinds: dict[int | None, set[str]] = {}
    for each in found:
        kinds.setdefault(each.layer, set()).add(each.kind)
    # Layers without attention are fine in a network that has some with it.
    layers = [layer for layer in kinds if kinds[layer] & set(ATTENTION_KINDS)] or [0]
    for layer in layers:
        missing = [kind for kind in ATTENTION_KINDS if kind not in kinds.get(layer, ())]
        if missing:
            names = {name.rpartition(".")[2] for name, _, number in _matrices_in_layers(network) if number == layer}
            raise ValueError(
                f"layer {layer} of the model (type {network.config.model_type!r}) has no {', '.join(missing)} "
                f"projection by a known name, but {', '.join(sorted(names)) or 'no matrix'}; use a model with q_proj, "
                f"k_proj, v_proj and o_proj, such as Llama, or GPT-2"
            )


def _embeddings(network: Any) -> list[Matrix]:
    names = {id(module): name for name, module in network.named_modules()}
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    embedding = getattr(embedding, "table", embedding)  # digits and nodes have their vectors in a table
    found = [Matrix("embedding", None, names[id(embedding)], embedding.weight)]
    if head is not None and head.weight is not embedding.weight:
        found.append(Matrix("head", None, names[id(head)], head.weight))
    return found


@dataclass(frozen=True)
class Tail:
    """A power law p(x) ~ x^-exponent of the largest eigenvalues, see `tail_exponent`."""

    exponent: float
    stderr: float
    size: int  # eigenvalues above the cut-off
    cutoff: float
    distance: float  # Kolmogorov-Smirnov, between these eigenvalues and the law, in [0, 1]


def singular_values(weight: Tensor) -> np.ndarray:
    """All singular values, falling, float64 (min(rows, columns),); on the weight's device, in float64 if it has it."""
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    return torch.linalg.svdvals(weight.detach().to(dtype)).cpu().double().numpy()


def stable_rank(values: np.ndarray) -> float:
    """||W||_F^2 / ||W||_2^2 of singular values, falling: in [1, n] (Rudelson and Vershynin, J. ACM 54(4), 2007)."""
    return float(np.square(values / values[0]).sum())


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of p_i = s_i / sum(s) of singular values s: in [1, n] (Roy and Vetterli, EUSIPCO 2007)."""
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def tail_exponent(eigenvalues: np.ndarray, size: int | None = None) -> Tail | None:
    """Exponent of a power law p(x) ~ x^-exponent, by maximum likelihood, of the `size` largest eigenvalues.

    The cut-off c is the next one: exponent = 1 + size / sum ln(x / c) over those above it, standard error
    (exponent - 1) / sqrt(size) (Hill, Annals of Statistics 3(5), 1975; Clauset, Shalizi and Newman, SIAM Review 51(4),
    2009, arXiv:0706.1062, eq. 3.1 and 3.2). The error is that of independent draws, which eigenvalues are not quite.
    eigenvalues: any order; those that are not positive are left out. size: None is `TAIL_SHARE` of all, at least
    `MIN_TAIL`. Returns None where no eigenvalue is left below them, or they are all alike.
    """
    logs = _falling_logs(eigenvalues)
    size = _least_size(len(logs)) if size is None else size
    return _fit(logs, size) if 0 < size < len(logs) else None


def closest_tail(eigenvalues: np.ndarray) -> Tail | None:
    """`tail_exponent` of the size, from `TAIL_SHARE` up, with the smallest Kolmogorov-Smirnov distance.

    That is how Clauset et al. (section 3.3) choose a cut-off, and published exponents of weights are found. The
    standard error does not know of the choice.
    """
    logs = _falling_logs(eigenvalues)
    fits = [_fit(logs, size) for size in range(_least_size(len(logs)), len(logs))]
    return min((each for each in fits if each), key=lambda each: each.distance, default=None)


def _falling_logs(eigenvalues: np.ndarray) -> np.ndarray:
    return np.sort(np.log(eigenvalues[eigenvalues > 0]))[::-1]


def _least_size(count: int) -> int:
    return max(MIN_TAIL, math.ceil(TAIL_SHARE * count))


def _fit(logs: np.ndarray, size: int) -> Tail | None:
    """The law of the first `size` of these logarithms, which fall, above the next one."""
    excess = logs[:size] - logs[size]
    mean = float(excess.mean())
    if mean < MIN_TAIL_SPREAD:
        return None
    survival, steps = np.exp(-excess / mean), np.arange(size + 1) / size
    distance = max((survival - steps[:-1]).max(), (steps[1:] - survival).max())
    return Tail(1 + 1 / mean, 1 / mean / math.sqrt(size), size, float(np.exp(logs[size])), float(distance))


def shown_ranks(num_values: int) -> list[int]:
    """Ranks, 1 being the largest, of the singular values that a record holds: `SHOWN_VALUES`, dense at the largest."""
    steps = np.linspace(0, 1, SHOWN_VALUES)
    return np.unique((1 + (num_values - 1) * steps**2).round().astype(int)).tolist()


def spectrum(values: np.ndarray, rows: int, columns: int) -> dict[str, Any]:
    """The numbers of a matrix's spectrum, JSON-ready, from its singular values; None where a zero matrix has none.

    "singular_values" are those of `shown_ranks`.
    """
    # As in numpy.linalg.matrix_rank: what is below is rounding.
    rank = int((values > values[0] * max(rows, columns) * np.finfo(np.float64).eps).sum())
    tails = {"tail": tail_exponent(np.square(values[:rank])), "closest_tail": closest_tail(np.square(values[:rank]))}
    return {
        "rows": rows,
        "columns": columns,
        "frobenius_norm": rounded(np.sqrt(np.square(values).sum())),
        "spectral_norm": rounded(values[0]),
        "stable_rank": rounded(stable_rank(values)) if rank else None,
        "effective_rank": rounded(effective_rank(values)) if rank else None,
        **{name: None if tail is None else _rounded_fields(tail) for name, tail in tails.items()},
        "singular_values": [rounded(values[each - 1]) for each in shown_ranks(len(values))],
    }


def rounded(value: float) -> float:
    """A number to `DIGITS` significant digits."""
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def _rounded_fields(tail: Tail) -> dict[str, float]:
    return {name: rounded(value) for name, value in asdict(tail).items()}


def gaussian_spectrum(rows: int, columns: int, seed: int) -> dict[str, Any]:
    """`spectrum` of a matrix of independent standard normal entries: what a weight has at initialisation, up to scale.

    The triangle R of its QR decomposition has the same singular values and is drawn directly: normal entries above a
    diagonal of chi variables (Bartlett 1933), so that an embedding of any length costs a square matrix.
    """
    long, short = max(rows, columns), min(rows, columns)
    generator = np.random.default_rng([seed, rows, columns])
    triangle = np.triu(generator.standard_normal((short, short)), 1)
    triangle[np.diag_indices(short)] = np.sqrt(generator.chisquare(long - np.arange(short)))
    return spectrum(singular_values(torch.from_numpy(triangle)), rows, columns)


def analyze_matrices(network: Any, progress: Progress | None = None) -> list[dict[str, Any]]:
    """`spectrum` of each of the `projection_matrices`, with kind, layer and name.

    Raises ValueError for a network whose attention is not found and for weights that are not finite.
    """
    results = []
    for each in projection_matrices(network):
        if not each.weight.isfinite().all():
            raise ValueError(
                f"{each.name} holds weights that are not finite; give a checkpoint of a run that went well"
            )
        numbers = spectrum(singular_values(each.weight), *each.weight.shape)
        results.append({"kind": each.kind, "layer": each.layer, "name": each.name, **numbers})
        if progress is not None:
            progress(1)
    return results
