"""Log-likelihood of sequences and its lower bounds, with standard errors (docs/derivation.md, "Bounds").

The draws of a sequence are a pure function of (seed, its ids, which of them are scored), or of the key that is given,
so a value does not depend on padding, on the other sequences of the batch or on their order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .code_table_prime_v2 import check_id_type
from .diffusion_prime_v2 import Noise, RevealOrder, is_bound
from .likelihood_rows_prime_v2 import (
    Rows,
    all_mask_rows,
    all_orders,
    chain_rows,
    num_masks,
    order_rows,
    random_orders,
    sampled_rows,
    sequence_key,
)

# method: (reveal order of the noise, objective)
SAMPLED_METHODS = {
    "subtoken": ("digit", "marginal"),
    "token": ("token", "marginal"),
    "nested": ("nested", "marginal"),
    "paper_loss": ("digit", "joint"),
}
METHODS = (*SAMPLED_METHODS, "chain", "orders")
# The bound of the order that a model was trained to reveal its units in.
BOUND_OF_ORDER = {order: method for method, (order, objective) in SAMPLED_METHODS.items() if objective == "marginal"}
TOKENS_PER_PASS = 8192  # rows of (sequence x draw) share a forward pass up to this many tokens


def methods_of(config) -> tuple[str, ...]:
    """The methods that a PrimeV2Config has: "nested" with stages alone, digits in any order if states have vectors."""
    missing = [] if config.stage_digits else ["nested"]
    if config.subtoken_embedding == "ancestors":
        missing += [method for method, (order, _) in SAMPLED_METHODS.items() if order == "digit"]
    return tuple(method for method in METHODS if method not in missing)


class NotFiniteError(ValueError):
    """The network's logits gave a likelihood that is no number; `row` is the first such sequence."""

    def __init__(self, row: int, value: float):
        super().__init__(f"the log-likelihood of row {row} is {value}: the network's logits are not finite")
        self.row = row


@dataclass
class PrimeV2LogLikelihood(ModelOutput):
    """Per sequence: `value` (B,) float64 nats, `stderr` (B,) of its draws, `num_forward` (B,) rows the network ran.

    `is_bound`: value is the log-likelihood or, in expectation over the draws, a lower bound of it. Where it is False,
    value may exceed the log-likelihood and must not be turned into a perplexity.
    `num_scored` (B,): tokens scored, the divisor of nats per token. A stderr of 0 says that nothing was drawn: every
    mask was summed over, or the method is "chain".
    `degrees` (B,) float64: effective degrees of freedom behind stderr; the 95% interval is value +- the 97.5% point of
    Student's t with so many times stderr (`prime_v2.eval.answers.interval`). Infinite where nothing was drawn.
    `samples`: on request, B tensors (K,) float64 whose mean is `value`, K = 1 where nothing was drawn; for
    sequences with equal keys they are common random numbers (`paired_difference`).
    `is_exact`: value is the log-likelihood itself, of the decoding order that the method names, and no bound of it.
    """

    value: Tensor | None = None
    stderr: Tensor | None = None
    num_forward: Tensor | None = None
    num_scored: Tensor | None = None
    is_bound: bool | None = None
    degrees: Tensor | None = None
    samples: list[Tensor] | None = None
    is_exact: bool | None = None


@torch.no_grad()
def log_likelihood(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    method: str = "subtoken",
    num_samples: int = 128,
    seed: int = 0,
    keys: Tensor | None = None,
    exhaustive: bool = True,
    round_number: int = 0,
    return_samples: bool = False,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> PrimeV2LogLikelihood:
    """Log-likelihood of the tokens outside the prompt given the prompt, or a lower bound, per sequence in nats.

    input_ids (B, L) clean ids; attention_mask (B, L), 0 for padding on any side; prompt_mask (B, L), 1 for tokens that
    are given and not scored. Methods (docs/derivation.md):
        "subtoken"        bound, digits hidden one by one: E_k n/k sum of -log m_ij; `num_samples` stratified draws.
        "token"           bound, whole tokens hidden; `num_samples` draws.
        "nested"          bound, stages of digits hidden (configs with stage_digits); `num_samples` draws.
        "chain"           exact for decoding left to right, one pass per scored token, no sampling.
        "orders"          bound, -log mean of exp(log p) over `num_samples` random orders of the config's reveal_order,
                          one pass per scored unit and order; tightens as num_samples grows.
        "paper_loss" the paper's training loss, NOT a bound for S > 1: it can exceed the log-likelihood.
    exhaustive: sum over all masks (all orders) instead of drawing where they are no more than `num_samples`: the
        expectation itself, with standard error 0.
    keys (B,) int64: of the draws, instead of (seed, sequence); sequences with equal keys share their random numbers.
    round_number: r > 0 draws the r-th lot of further draws, as many as there were before (`draw_levels`).
    return_samples: keep the single draws, for `paired_difference`.
    tokens_per_pass: rows x tokens of one pass of the network; changes no value.
    Raises ValueError for an unknown method, num_samples < 1, ids out of range, rows without a scored token, and
    non-finite results (`NotFiniteError`).
    """
    plan = _Plan(model.config, method, num_samples, exhaustive, round_number)
    sequences = list(unpadded(input_ids, attention_mask, prompt_mask, model.config))
    key_of = {i: sequence_key(ids, scored, seed) if keys is None else keys[i] for i, ids, scored in sequences}
    rows = (row for i, ids, scored in sequences for row in plan.rows(ids, scored, i, key_of[i].to(ids.device)))
    nats = score_rows(model, rows, plan.order, plan.objective, len(input_ids), tokens_per_pass)
    counts = scored_counts(sequences)
    parts = [plan.summarise(each, count) for each, count in zip(nats, counts, strict=True)]
    is_exact = method == "chain"
    return gather(parts, [len(each) for each in nats], counts, plan.is_bound, return_samples, is_exact)


def gather(
    parts: list[tuple[Tensor, Tensor, Tensor, float]],
    num_forward: list[int],
    num_scored: list[int],
    is_bound: bool,
    return_samples: bool,
    is_exact: bool = False,
) -> PrimeV2LogLikelihood:
    """The result from each sequence's (draws (K,), value, standard error, degrees); NotFiniteError for no number."""
    value, stderr = torch.stack([part[1] for part in parts]), torch.stack([part[2] for part in parts])
    degrees = torch.tensor([part[3] for part in parts], dtype=torch.double)
    refuse_not_finite(value)
    draws = [part[0] for part in parts] if return_samples else None
    return PrimeV2LogLikelihood(
        value, stderr, torch.tensor(num_forward), torch.tensor(num_scored), is_bound, degrees, draws, is_exact
    )


def refuse_not_finite(value: Tensor) -> None:
    """NotFiniteError for the first of the values (B,) that is no number."""
    if not value.isfinite().all():
        row = int((~value.isfinite()).nonzero()[0])
        raise NotFiniteError(row, float(value[row]))


class _Plan:
    """What a method runs for a sequence, and how its rows' nats become a likelihood."""

    def __init__(self, config, method: str, num_samples: int, exhaustive: bool, round_number: int):
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
        if method not in methods_of(config) and config.stage_digits:
            raise ValueError(
                f"method={method!r} hides digits in any order, but subtoken_embedding={config.subtoken_embedding!r} "
                f"has vectors for leading digits alone; use one of {', '.join(methods_of(config))}"
            )
        if round_number and (method not in SAMPLED_METHODS or num_samples % 2 ** (round_number - 1)):
            raise ValueError(
                f"round_number={round_number} of method={method!r} with num_samples={num_samples}: a sampled method "
                f"takes it, with a multiple of {2 ** (round_number - 1)} draws"
            )
        kind, self.objective = {"chain": ("token", "joint"), "orders": (None, "marginal"), **SAMPLED_METHODS}[method]
        self.order = RevealOrder.from_config(config, kind)
        self.method, self.num_samples, self.round_number = method, num_samples, round_number
        # As many rows as the draws would be, those of earlier lots included.
        self.most_masks = 0 if not exhaustive else num_samples * 2 if round_number else num_samples
        self.is_bound = method in ("chain", "orders") or is_bound(
            self.objective, "elbo", config.num_subtokens, self.order, None
        )

    def draws_nothing(self, num_tokens: int) -> bool:
        """Whether the rows of a sequence of `num_tokens` scored tokens are all that there are."""
        units = num_tokens * self.order.units_per_token
        if self.method == "chain" or units > 62:
            return self.method == "chain"
        number = math.factorial(units) if self.method == "orders" else num_masks(num_tokens, self.order)
        return number <= self.most_masks

    def rows(self, ids: Tensor, scored: Tensor, sequence: int, key: Tensor) -> Iterator[Rows]:
        num_tokens = int(scored.sum())
        if self.method == "chain":
            return chain_rows(ids, scored, sequence)
        if self.method == "orders":
            units = num_tokens * self.order.units_per_token
            orders = (
                all_orders(units) if self.draws_nothing(num_tokens) else random_orders(units, self.num_samples, key)
            )
            return order_rows(ids, scored, sequence, self.order, orders)
        if self.draws_nothing(num_tokens):
            return all_mask_rows(ids, scored, sequence, self.order)
        return sampled_rows(ids, scored, sequence, self.order, self.num_samples, key, self.round_number)

    def summarise(self, nats: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """Factor x nats (R,) of one sequence's rows to (draws (K,), value, standard error, degrees), float64."""
        nothing_drawn, zero = self.draws_nothing(num_tokens), nats.new_zeros(())
        if self.method == "orders":
            log_p = -nats.view(-1, num_tokens * self.order.units_per_token).sum(1)  # (K,)
            if not nothing_drawn:
                return jackknifed(log_p)
            value = log_p.logsumexp(0) - math.log(len(log_p))
        else:
            value = -nats.sum() if nothing_drawn else -nats.mean()
            if not nothing_drawn:
                return -nats, value, stratified_stderr(nats), stratified_degrees(nats)
        return value.unsqueeze(0), value, zero, math.inf


def jackknifed(log_p: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """log of the mean of exp(log_p), log_p (K,) of independent draws: (draws (K,), value, standard error, degrees).

    The delete-one jackknife (Miller, Biometrika 61, 1974). A draw is the value, less K - 1 times what leaving it out
    adds to the value beyond the mean of that over the draws: their mean is the value, their standard deviation over
    sqrt(K) the standard error. A few orders may carry most of the mean; degrees are Satterthwaite's, 2 (sum of squares
    of the deviations)^2 / sum of fourth powers, at most K - 1. One draw has no error: NaN.
    The interval is one of the value's expectation, which rises with K towards the log-likelihood.
    """
    count = len(log_p)
    value = log_p.logsumexp(0) - math.log(count)
    if count < 2:
        return value.unsqueeze(0), value, log_p.new_full((), torch.nan), math.nan
    left = count - (log_p - value).exp()  # K - 1 times the mean without draw k, over the mean
    without = value + (left.clamp(min=torch.finfo(left.dtype).tiny) / (count - 1)).log()
    # The largest may have nearly all of the sum: the difference above would be rounding.
    largest = int(log_p.argmax())
    others = torch.cat([log_p[:largest], log_p[largest + 1 :]])
    without[largest] = others.logsumexp(0) - math.log(count - 1)
    moves = (count - 1) * (without.mean() - without)
    squares = moves.square()
    degrees = float(2 * squares.sum().square() / squares.square().sum()) if squares.any() else math.inf
    return value + moves, value, moves.std() / math.sqrt(count), max(1.0, min(degrees, count - 1.0))


def stratified_stderr(draws: Tensor) -> Tensor:
    """Standard error of the mean of K draws (K,), one from each of K equal strata in order; NaN for one draw.

    Half the squared difference of neighbouring strata estimates the variance within them; the drift from one stratum
    to the next only adds to it (collapsed strata, Cochran, "Sampling Techniques", 1977, section 5A.12). The two outer
    strata have one neighbour, whose difference counts twice so that every stratum has the same weight.
    """
    if len(draws) < 2:
        return draws.new_full((), torch.nan)
    return _weighted_squares(draws).sum().sqrt() / len(draws)


def stratified_degrees(draws: Tensor) -> float:
    """Effective degrees of freedom of `stratified_stderr`, at least 1; NaN for one draw.

    Satterthwaite's sum (Biometrics Bulletin 2, 1946), 2/3 (sum of v)^2 / sum of v^2 over the strata's variances v,
    2/3 because neighbouring differences share a draw; from squared differences v^2 is three times too large, so 2.
    Draws that hide few units weigh much: the degrees are far fewer than the draws.
    """
    if len(draws) < 2:
        return math.nan
    squares = _weighted_squares(draws)
    if not squares.any():
        return math.inf
    return max(1.0, float(2 * squares.sum().square() / squares.square().sum()))


def _weighted_squares(draws: Tensor) -> Tensor:
    squares = draws.diff().square() / 2
    first, last = squares[0] / 2, squares[-1] / 2
    squares[0] += first
    squares[-1] += last
    return squares


def paired_difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """(Mean difference, its standard error) of two sequences' `samples` (K,) with equal keys; see `stratified_stderr`.

    The masks that both share cancel. Draws of which nothing was drawn (K = 1 beside more) have no error of their own.
    """
    difference = first - second
    if len(difference) == 1:
        return float(difference[0]), 0.0
    return float(difference.mean()), float(stratified_stderr(difference))


def unpadded(input_ids, attention_mask, prompt_mask, config) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(row, ids (L,), scored (L,) bool) without padding, longest first so that a pass holds rows of like length."""
    check_id_type(input_ids)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    scored = real if prompt_mask is None else real & ~prompt_mask.bool()
    if not scored.any(1).all():
        row = int((~scored.any(1)).nonzero()[0])
        raise ValueError(f"row {row} has no token to score (all of it is prompt or padding); drop that row")
    kept = input_ids[real]
    low, high = int(kept.min()), int(kept.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"token ids span [{low}, {high}], but a likelihood is defined for ids in [0, {config.vocab_size - 1}]"
        )
    lengths = real.sum(1)
    for row in lengths.argsort(descending=True, stable=True).tolist():
        yield row, input_ids[row][real[row]], scored[row][real[row]]


def scored_counts(sequences: list[tuple[int, Tensor, Tensor]]) -> list[int]:
    """How many tokens of each row are scored, in the rows' order, of what `unpadded` gave."""
    return [int(scored.sum()) for _, _, scored in sorted(sequences, key=lambda each: each[0])]


def score_rows(model, rows: Iterator[Rows], order: RevealOrder, objective: str, num_sequences: int, tokens_per_pass):
    """Factor x nats of each sequence's rows, in their order: `num_sequences` tensors (R,) float64 on the CPU."""
    nats: list[list[Tensor]] = [[] for _ in range(num_sequences)]
    was_training = model.training
    model.eval()
    try:
        for batch in batches(rows, tokens_per_pass):
            for row_nats, part in zip(_score(model, batch, order, objective), batch, strict=True):
                nats[part.sequence].append(row_nats.cpu() * part.factor.cpu())
    finally:
        model.train(was_training)
    return [torch.cat(each) for each in nats]


def batches(parts: Iterator[Rows], tokens_per_pass: int) -> Iterator[list[Rows]]:
    """Groups rows, splitting those of one sequence where needed, so that rows x longest stays within the limit."""
    batch: list[Rows] = []
    rows = longest = 0
    for part in parts:
        done = 0
        while done < len(part.ids):
            longest = max(longest, part.ids.shape[1])
            room = max(1, tokens_per_pass // longest) - rows
            if room <= 0:
                yield batch
                batch, rows, longest = [], 0, 0
                continue
            batch.append(part.part(slice(done, done + room)))
            rows, done = rows + len(batch[-1].ids), done + len(batch[-1].ids)
    if batch:
        yield batch


def _score(model, batch: list[Rows], order: RevealOrder, objective: str) -> tuple[Tensor, ...]:
    """Nats of each row, unweighted, in the batch's pieces; one forward pass, rows padded on the right."""
    length, device = max(part.ids.shape[1] for part in batch), model.device

    def join(tensors: list[Tensor], fill) -> Tensor:
        padded = [
            torch.cat([each, each.new_full((len(each), length - each.shape[1], *each.shape[2:]), fill)], dim=1)
            for each in tensors
        ]
        return torch.cat(padded).to(device)

    num_subtokens = model.config.num_subtokens
    ids = join([part.ids for part in batch], 0)
    visible = join([part.noise.visible.expand(-1, -1, num_subtokens) for part in batch], True)
    hidden_count = join([part.noise.hidden_count for part in batch], 0)
    maskable = join([part.noise.maskable.expand(len(part.ids), -1) for part in batch], False)
    real = join([torch.ones_like(part.ids) for part in batch], 0)
    states = torch.where(visible, model.encode(ids), model.config.base)
    mask = None if real.all() else real
    hidden_states = model.model(states, mask).last_hidden_state
    weight = torch.ones(len(ids), dtype=torch.double, device=device)
    target_digits = None
    if batch[0].noise.target_digits is not None:
        target_digits = join([part.noise.target_digits for part in batch], False)
    noise = Noise(visible, hidden_count, weight, maskable, target_digits)
    _, nats = model.sequence_nll(hidden_states, ids, noise, order, objective, weight)
    return nats.split([len(part.ids) for part in batch])
