"""Where a network's attention goes, on given text: the numbers of docs/analysis.md.

A network has to be callable and to name its projections as Llama, OPT or GPT-2 do (`projection_matrices`). What it is
fed is decided in one place, `prime_v2.studies.analysis.inputs.feed`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prime_v2.backbone_prime_v2 import evaluating
from prime_v2.studies.analysis.inputs import feed, is_causal_model
from prime_v2.studies.analysis.spectra import Progress, projection_matrices, rounded
from prime_v2.validation_inputs_prime_v2 import checked_seed

STATISTICS = {
    "first_position_mass": "attention on the first position",
    "top_position_mass": "attention on the position that gets most on average over all windows (top_position)",
    "top_in_window_mass": "attention on the position that gets most in a window",
    "self_mass": "attention on the query's own position",
    "neighbour_mass": "attention on the query's own position and those beside it",
    "entropy": "entropy of a query's attention, nats",
    "relative_entropy": "that entropy over the log of the number of positions that the query can see: 1 is uniform",
    "mean_distance": "distance between a query and what it attends to, tokens",
}
TOP = "top_position_mass"  # the one statistic of all windows together
MIN_WINDOW = 8  # tokens; in fewer, no position is far from another
MAX_ROW_SUM_ERROR = 0.01  # of attention weights; bfloat16 makes 0.004
WEIGHTS_PER_PASS = 2**25  # attention weights of one layer, 128 MiB in float32; or of one window, where that has more
TOKENS_PER_PASS = 8192


def attention_statistics(weights: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """The `STATISTICS` of each head in each window, (B, heads) float64 on the CPU, but for top_position_mass.

    weights (B, heads, L, L): from query (third axis) to key, rows adding up to 1. Each number is a mean over queries.
    seen (1 or B, L, L) bool: whether a query can attend to a position; relative_entropy divides by ln(positions seen)
    and leaves out queries that see one. Also "received" (B, heads, L): attention on each position, mean over queries.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    length = weights.shape[-1]
    positions = torch.arange(length, device=weights.device)
    received = weights.mean(-2)  # (B, heads, L)
    entropy = torch.special.entr(weights).sum(-1)  # (B, heads, L)
    choices = seen.to(weights.device).sum(-1, keepdim=True).transpose(-1, -2)  # (1 or B, 1, L)
    chosen = choices > 1
    relative = entropy / choices.clamp(min=2).to(weights.dtype).log() * chosen
    diagonals = {shift: weights.diagonal(shift, -2, -1).sum(-1) / length for shift in (-1, 0, 1)}
    distances = (positions.unsqueeze(1) - positions).abs().to(weights.dtype).flatten()
    result = {
        "first_position_mass": received[..., 0],
        "top_in_window_mass": received.amax(-1),
        "self_mass": diagonals[0],
        "neighbour_mass": diagonals[-1] + diagonals[0] + diagonals[1],
        "entropy": entropy.mean(-1),
        "relative_entropy": relative.sum(-1) / chosen.sum(-1).clamp(min=1),
        "mean_distance": weights.flatten(-2) @ distances / length,
        "received": received,
    }
    return {name: value.cpu().double() for name, value in result.items()}


def uniform_weights(seen: Tensor) -> Tensor:
    """Attention (1 or B, 1, L, L) float64 that is uniform over what each query sees, `seen` (1 or B, L, L)."""
    return (seen.double() / seen.sum(-1, keepdim=True)).unsqueeze(1)


class _Moments:
    """Mean and standard error over windows, from sums; windows of one document are taken as independent."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """values (B, ...) float64."""
        self.count += len(values)
        self.total = self.total + values.sum(0)
        self.squares = self.squares + values.square().sum(0)

    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / self.count

    def stderr(self) -> Tensor | None:
        """None for one window."""
        if self.count < 2:
            return None
        variance = (torch.as_tensor(self.squares) / self.count - self.mean().square()).clamp(min=0)
        return (variance / (self.count - 1)).sqrt()


@torch.no_grad()
def measure_attention(
    model: Any,
    windows: Tensor,
    masked_share: float | None = None,
    seed: int = 0,
    *,
    windows_per_pass: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The `STATISTICS` of each layer and head over windows (N, L) of clean token ids; JSON-ready.

    model: of `load_scorer`, a masked-diffusion model or a `CausalScorer`; set to eager attention and evaluation mode
    meanwhile. masked_share, seed: see `feed`. windows_per_pass: None fills passes of `WEIGHTS_PER_PASS` weights.
    Weights are summed up layer by layer as the network runs; those of one layer and pass are held at a time.
    The result says what was fed; "masked_digits" and "masked_tokens" are shares: of digits, of tokens with none left.
    Raises ValueError for windows below `MIN_WINDOW` tokens, a masked share outside [0, 1], and a network that gives no
    attention weights, or some that do not add up to 1.
    """
    checked_seed(seed)
    network = network_of(model)
    num_windows, length = windows.shape
    if num_windows < 1 or length < MIN_WINDOW:
        raise ValueError(
            f"there are {num_windows} windows of {length} tokens; give at least one of {MIN_WINDOW} tokens"
        )
    modules = _attention_modules(network)
    moments = [_new_moments() for _ in modules]
    uniform, shares = _new_moments(), defaultdict[str, _Moments](_Moments)
    about: dict[str, Any] = {"masked_share": masked_share}
    step = windows_per_pass or _windows_per_pass(network, length)
    with _eager_evaluation(network):
        for ids in windows.split(step):
            fed = feed(model, ids.to(network.device), masked_share, seed)
            with _watched(modules, partial(_take, moments, fed.seen)):
                # The network below its head: no logits are needed.
                getattr(network, "base_model", network)(**fed.inputs)
            _add(uniform, attention_statistics(uniform_weights(fed.seen), fed.seen))
            for name, values in fed.shares.items():
                shares[name].add(values.cpu())
            about["fed"] = fed.words
            if progress is not None:
                progress(len(ids))
    about |= {name: float(each.mean()) for name, each in shares.items()}
    return about | _summary(moments, [layer for layer, _ in modules], uniform)


def network_of(model: Any) -> Any:
    """The network of what `load_scorer` gives."""
    return model.model if is_causal_model(model) else model


def _windows_per_pass(network: Any, length: int) -> int:
    heads = getattr(network.config.get_text_config(), "num_attention_heads", 1)
    return max(1, min(WEIGHTS_PER_PASS // (heads * length**2), TOKENS_PER_PASS // length))


def _attention_modules(network: Any) -> list[tuple[int, Any]]:
    """(layer, module) of each module that holds a query projection."""
    queries = [each for each in projection_matrices(network) if each.kind == "q"]
    return [(each.layer or 0, network.get_submodule(each.name.rpartition(".")[0])) for each in queries]


@contextmanager
def _eager_evaluation(network: Any) -> Iterator[None]:
    """Evaluation mode and eager attention, the only one that gives its weights; afterwards as before."""
    before = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        with evaluating(network):
            yield
    finally:
        network.set_attn_implementation(before)


@contextmanager
def _watched(modules: list[tuple[int, Any]], take: Callable[[int, int, Any], None]) -> Iterator[None]:
    """take(number of the module, its layer, what it gave back) whenever one of the modules has run."""
    handles = [
        module.register_forward_hook(lambda _m, _i, output, number=number, layer=layer: take(number, layer, output))
        for number, (layer, module) in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _take(moments: list[dict[str, _Moments]], seen: Tensor, number: int, layer: int, output: Any) -> None:
    """Add the attention weights that a module gave back beside its output (B, L, D) to its moments."""
    others = output[1:] if isinstance(output, tuple) else ()
    weights = next((each for each in others if isinstance(each, Tensor) and each.dim() == 4), None)
    if weights is None:
        raise ValueError(
            f"the attention of layer {layer} gives no weights; use a model with eager attention, e.g. Llama"
        )
    error = float((weights.float().sum(-1) - 1).abs().max())
    if not error <= MAX_ROW_SUM_ERROR:
        raise ValueError(
            f"the attention weights of layer {layer} miss a sum of 1 by {error:.3g}, more than {MAX_ROW_SUM_ERROR}; "
            f"use a model whose attention is a softmax over positions"
        )
    _add(moments[number], attention_statistics(weights, seen))


def _new_moments() -> dict[str, _Moments]:
    return {name: _Moments() for name in (*STATISTICS, "received")}


def _add(moments: dict[str, _Moments], found: dict[str, Tensor]) -> None:
    for name, values in found.items():
        moments[name].add(values)


def _summary(moments: list[dict[str, _Moments]], layers: list[int], uniform: dict[str, _Moments]) -> dict[str, Any]:
    """Means and standard errors, each a list over layers of lists over heads; `uniform` has one head."""
    received = [each["received"] for each in moments]
    length, count = received[0].mean().shape[-1], received[0].count
    top = [each.mean().argmax(-1, keepdim=True) for each in received]  # (heads, 1) each
    mean = {name: [each[name].mean() for each in moments] for name in STATISTICS if name != TOP}
    stderr = {name: [each[name].stderr() for each in moments] for name in mean}
    mean[TOP] = [each.mean().gather(-1, at).squeeze(-1) for each, at in zip(received, top, strict=True)]
    spread = [each.stderr() for each in received]
    stderr[TOP] = [
        None if each is None else each.gather(-1, at).squeeze(-1) for each, at in zip(spread, top, strict=True)
    ]
    return {
        "num_windows": count,
        "window": length,
        "layers": layers,
        "statistics": {
            name: {
                "mean": _listed(mean[name]),
                "stderr": None if count < 2 else _listed(stderr[name]),
            }
            for name in STATISTICS
        },
        "top_position": [each.squeeze(-1).tolist() for each in top],
        "uniform": {
            name: rounded(float(uniform["received"].mean().amax() if name == TOP else uniform[name].mean()))
            for name in STATISTICS
        },
    }


def _listed(layers: list[Any]) -> list[list[float]]:
    return [[rounded(value) for value in heads.tolist()] for heads in layers]
