"""The result of `log_likelihood`, and the standard errors of what was drawn (docs/derivation.md, "Bounds")."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput


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
    `value` is -inf where the sampler of the method "sampler" cannot write the text.
    `degrees` (B,) float64: effective degrees of freedom behind stderr; the 95% interval is value +- the 97.5% point of
    Student's t with so many times stderr (`prime_v2.eval.answers.interval`). Infinite where nothing was drawn.
    `samples`: on request, B tensors (K,) float64 whose mean is `value`, K = 1 where nothing was drawn; for
    sequences with equal keys they are common random numbers (`paired_difference`).
    `is_exact`: value is the log-likelihood itself, of the decoding order that the method names; `is_bound` is then
    True as well, as its line above says.
    """

    value: Tensor | None = None
    stderr: Tensor | None = None
    num_forward: Tensor | None = None
    num_scored: Tensor | None = None
    is_bound: bool | None = None
    degrees: Tensor | None = None
    samples: list[Tensor] | None = None
    is_exact: bool | None = None


def refuse_not_finite(value: Tensor) -> None:
    """NotFiniteError for the first of the values (B,) that is no number."""
    if not value.isfinite().all():
        row = int((~value.isfinite()).nonzero()[0])
        raise NotFiniteError(row, float(value[row]))


def jackknifed(log_p: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """log of the mean of exp(log_p), log_p (K,) of independent draws: (draws (K,), value, standard error, degrees).

    The delete-one jackknife (Miller, Biometrika 61, 1974). A draw is the value, less K - 1 times what leaving it out
    adds to the value beyond the mean of that over the draws: their mean is the value, their standard deviation over
    sqrt(K) the standard error. A few orders may carry most of the mean; degrees are Satterthwaite's, 2 (sum of squares
    of the deviations)^2 / sum of fourth powers, at most K - 1. The interval is one of the value's expectation, which
    rises with K towards the log-likelihood.
    One draw has no error: NaN, as have draws that all are of probability 0 (log_p = -inf). Where a single one is not,
    the value without it is -inf: the error is infinite, with one degree of freedom, and the draws are NaN.
    """
    count, possible = len(log_p), int((log_p > -math.inf).sum())
    value = log_p.logsumexp(0) - math.log(count)
    if count < 2 or not possible:
        return log_p.clone() if not possible else value.unsqueeze(0), value, log_p.new_full((), torch.nan), math.nan
    if possible == 1:
        return torch.full_like(log_p, torch.nan), value, log_p.new_full((), torch.inf), 1.0
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
