"""Forward process: which units are hidden, with which weight, and which losses are bounds (docs/derivation.md).

A *unit* is what is hidden and revealed: a digit, a whole token, or a stage of digits. With n maskable units the bound
is
    time form   E_t [ 1/t * sum of the hidden units' nats ],        each unit hidden with probability t, t ~ U(0, 1]
    count form  E_k [ n/k * sum of the hidden units' nats ],        k ~ U{1..n}, a uniform k-subset hidden
(MDLM, arXiv:2406.07524, eq. 10 for alpha = 1 - t; the count form is the same integral in closed form, LLaDA
arXiv:2502.09992, eq. 6). Both need the nats of each unit from its own marginal: see `is_bound`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .random_prime_v2 import Stream, hash64, uniforms

# Time form only: t below this is raised to it. The integrand is flat there, so the bound moves by O(T_MIN**2).
T_MIN = 1e-4


@dataclass(frozen=True)
class RevealOrder:
    """What is hidden and revealed as one: "digit", "token", or "nested" stages of leading digits.

    Noise, weights, bounds and sampler all take this object. `stage_digits` are the digit counts at which the stages of
    "nested" end, rising to S; a token's stages are revealed first to last, at iid times that are sorted.
    """

    kind: str
    num_subtokens: int
    stage_digits: tuple[int, ...] = ()

    def __post_init__(self):
        if self.kind not in ("digit", "token", "nested"):
            raise ValueError(f'kind={self.kind!r} is not one of "digit", "token", "nested"')

    @classmethod
    def from_config(cls, config, kind: str | None = None) -> "RevealOrder":
        kind = kind or config.reveal_order
        stages = tuple(config.stage_digits or ())
        if kind == "nested" and not stages:
            raise ValueError("the nested reveal order needs a config with stage_digits, e.g. stage_digits=[6, 11]")
        return cls(kind, config.num_subtokens, stages if kind == "nested" else ())

    @property
    def units_per_token(self) -> int:
        return {"digit": self.num_subtokens, "token": 1, "nested": len(self.stage_digits)}[self.kind]

    def visible_digits(self, hidden_units: Tensor) -> Tensor:
        """Hidden units (..., U) bool to visible digits (..., S) bool.

        "nested" reads only how many units are hidden: sorting iid reveal times gives stages first to last.
        """
        if self.kind == "digit":
            return ~hidden_units
        if self.kind == "token":
            return (~hidden_units).expand(*hidden_units.shape[:-1], self.num_subtokens)
        return self._leading(self.units_per_token - hidden_units.sum(-1))

    def next_visible(self, hidden_count: Tensor) -> Tensor:
        """Digits visible after the next reveal of a token with `hidden_count` (...) hidden units; not for "digit"."""
        if self.kind == "token":
            return torch.ones(*hidden_count.shape, self.num_subtokens, dtype=torch.bool, device=hidden_count.device)
        return self._leading((self.units_per_token - hidden_count + 1).clamp(max=self.units_per_token))

    def _leading(self, num_stages: Tensor) -> Tensor:
        ends = torch.tensor((0, *self.stage_digits), device=num_stages.device)
        return torch.arange(self.num_subtokens, device=num_stages.device) < ends[num_stages].unsqueeze(-1)


@dataclass
class Noise:
    """One draw of the forward process for B sequences.

    visible (B, L, S) bool; hidden_count (B, L) int64, hidden units of each token; weight (B,) float64, n/k or 1/t;
    maskable (B, L) bool, tokens that could have been hidden; target_digits (B, L, S) bool or None: the digits
    whose joint is predicted for each token counted in hidden_count, where it is not each hidden unit.
    """

    visible: Tensor
    hidden_count: Tensor
    weight: Tensor
    maskable: Tensor
    target_digits: Tensor | None = None


def is_bound(objective: str, loss_weight: str, num_subtokens: int, order: RevealOrder, whole_token_above) -> bool:
    """Whether the loss is an upper bound on -log p(x) in expectation over the noise.

    The paper's loss ("joint") counts the nats that hidden digits share once, not once per digit, so for S > 1 with
    digits hidden separately it is not (authors' note: chen-hao-chao.github.io/dependency-breaks-validity). Weight 1 is
    not, nor is a process that hides whole tokens at some levels and digits at others.
    """
    if loss_weight != "elbo" or whole_token_above is not None:
        return False
    return objective == "marginal" or num_subtokens == 1 or order.kind == "token"


def stratified_levels(sample_numbers: Tensor, global_batch: int, seed: int) -> Tensor:
    """Noise levels in (0, 1), float64 (B,): one in each of `global_batch` equal strata per optimiser step.

    A pure function of (seed, sample number): a golden-ratio step spreads the strata over ranks and micro-batches,
    a rotation per step and a jitter per sample make each level uniform.
    """
    stride = max(1, round(global_batch * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, global_batch) != 1:
        stride += 1
    step, position = sample_numbers // global_batch, sample_numbers % global_batch
    rotation = hash64(seed, Stream.ROTATION, step) % global_batch
    stratum = (position * stride + rotation) % global_batch
    return (stratum + uniforms(seed, Stream.LEVEL, sample_numbers)) / global_batch


def hidden_counts_to_draw(levels: Tensor, num_units: Tensor) -> Tensor:
    """Count form: level (B,) in (0, 1) to k (B,) int64, uniform over 1..n for a uniform level; n = num_units (B,)."""
    return (levels * num_units).ceil().long().clamp(min=1).minimum(num_units)


def draw_noise(
    maskable: Tensor,
    order: RevealOrder,
    keys: Tensor,
    levels: Tensor,
    form: str = "count",
    whole_token_above: float | None = None,
) -> Noise:
    """Hide units of the maskable tokens: maskable (B, L) bool; keys (B,) int64; levels (B,) float64 in (0, 1).

    A pure function of its arguments; a row's draws depend on its key, its level and its number of maskable tokens, not
    on where padding and given tokens lie. Above `whole_token_above` the units of a token share one draw.
    """
    if form not in ("count", "time"):
        raise ValueError(f'form={form!r} is not one of "count", "time"')
    noise = _draw(maskable, order, keys, levels, form)
    if whole_token_above is None:
        return noise
    whole = _draw(maskable, RevealOrder("token", order.num_subtokens), keys, levels, form)
    above = levels > whole_token_above
    return Noise(
        torch.where(above[:, None, None], whole.visible, noise.visible),
        torch.where(above[:, None], whole.hidden_count * order.units_per_token, noise.hidden_count),
        torch.where(above, whole.weight, noise.weight),
        maskable,
    )


def _draw(maskable: Tensor, order: RevealOrder, keys: Tensor, levels: Tensor, form: str) -> Noise:
    batch, length = maskable.shape
    units = order.units_per_token
    stream = Stream.WHOLE if order.kind == "token" else Stream.UNITS
    maskable_units = maskable.repeat_interleave(units, dim=1)
    draws = uniforms(keys.unsqueeze(1), stream, maskable_units.cumsum(1))  # (B, L * U)
    if form == "time":
        levels = levels.clamp(min=T_MIN)
        hidden, weight = draws < levels.unsqueeze(1), 1 / levels
    else:
        num_units = maskable_units.sum(1)
        count = hidden_counts_to_draw(levels, num_units)
        ranks = torch.where(maskable_units, draws, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
        hidden = ranks < count.unsqueeze(1)
        weight = num_units / count.clamp(min=1).double()  # 0 for a row with nothing to mask
    hidden = (hidden & maskable_units).view(batch, length, units)
    return Noise(order.visible_digits(hidden), hidden.sum(-1), weight, maskable)
