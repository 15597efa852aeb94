"""Forward process: which units are hidden, with which weight, and which losses are bounds (docs/derivation.md).

A *unit* is what is hidden and revealed: a digit, a whole token, or a stage of digits. With n maskable units the bound
is
    time form   E_t [ 1/t * sum of the hidden units' nats ],        each unit hidden with probability t, t ~ U(0, 1]
    count form  E_k [ n/k * sum of the hidden units' nats ],        k ~ U{1..n}, a uniform k-subset hidden
(MDLM, arXiv:2406.07524, eq. 10 for alpha = 1 - t; the count form is the same integral in closed form, LLaDA
arXiv:2502.09992, eq. 6). Both need the nats of each unit from its own marginal: see `is_bound`.

Stages that are not revealed over the same time ("coarse_first", "windows"; `RevealOrder`) fall into G *segments* of
time. A segment is a masked diffusion of the units that it reveals, after those of earlier segments and before those of
later ones, which are all hidden; only its own hidden units are *eligible*. With n units in all and e eligible ones
    time form   E_(segment, t) [ G/t * sum of the eligible units' nats ],   t ~ U(0, 1] within a uniform segment
    count form  E_k [ n/e * sum of the eligible units' nats ],              the last k of n units hidden, k ~ U{1..n}
Coarse-first, where each of J segments reveals a stage of N tokens, this is the sum over phases of E_e [ N/e * ... ].
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .random_prime_v2 import Stream, hash64, uniforms

# Time form only: t below this is raised to it. The integrand is flat there, so the bound moves by O(T_MIN**2).
T_MIN = 1e-4


STAGED = ("nested", "coarse_first", "windows")  # reveal orders over stages of leading digits
KINDS = ("digit", "token", *STAGED)


@dataclass(frozen=True)
class RevealOrder:
    """What is hidden and revealed as one: "digit", "token", or stages of leading digits in one of three orders.

    Noise, weights, bounds and sampler all take this object. `stage_digits` are the digit counts at which the stages
    end, rising to S. A token's stages are revealed first to last: stage j has a reveal time, uniform on its window of
    [0, 1], and a token's times are sorted. "nested": every window is [0, 1]; "coarse_first": one window after another,
    so that stage 1 of all tokens comes before any stage 2; "windows": pairs (a_j, b_j) in `stage_windows`.
    """

    kind: str
    num_subtokens: int
    stage_digits: tuple[int, ...] = ()
    stage_windows: tuple[tuple[float, float], ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}")

    @classmethod
    def from_config(cls, config, kind: str | None = None) -> "RevealOrder":
        kind = kind or config.reveal_order
        if kind not in STAGED:
            return cls(kind, config.num_subtokens)
        if not config.stage_digits:
            raise ValueError(
                f"the {kind.replace('_', '-')} reveal order needs a config with stage_digits, e.g. "
                f"stage_digits=[6, 11]"
            )
        windows = tuple((a, b) for a, b in config.stage_windows or ()) if kind == "windows" else ()
        if kind == "windows" and not windows:
            raise ValueError("the reveal order windows needs a config with stage_windows, e.g. [[0, 0.8], [0.2, 1]]")
        return cls(kind, config.num_subtokens, tuple(config.stage_digits), windows)

    @classmethod
    def of_training(cls, config) -> "RevealOrder":
        """The order of the training loss's noise."""
        return cls.from_config(config, config.training_order)

    @property
    def units_per_token(self) -> int:
        return {"digit": self.num_subtokens, "token": 1}.get(self.kind, len(self.stage_digits))

    @property
    def segment_chances(self) -> list[list[float]]:
        """Chance that a token's unit is revealed in each of the G segments of time, a row for each unit."""
        units = self.units_per_token
        if self.kind == "coarse_first":
            return [[float(stage == segment) for segment in range(units)] for stage in range(units)]
        if self.kind != "windows":
            return [[1.0]] * units
        edges = sorted({edge for window in self.stage_windows for edge in window})
        pieces = [
            (start, end)
            for start, end in zip(edges, edges[1:], strict=False)
            if any(a <= start and end <= b for a, b in self.stage_windows)
        ]
        return [
            [(end - start) / (b - a) if a <= start and end <= b else 0.0 for start, end in pieces]
            for a, b in self.stage_windows
        ]

    @property
    def num_segments(self) -> int:
        """G."""
        return len(self.segment_chances[0])

    def segments(self, keys: Tensor, numbers: Tensor) -> Tensor:
        """The segment of each unit, int64, first one 0: numbers (..., N U) of the units, drawn by keys if at all."""
        chances = self.segment_chances
        stages = torch.arange(numbers.shape[-1], device=numbers.device) % self.units_per_token
        if all(1.0 in row for row in chances):
            certain = torch.tensor([row.index(1.0) for row in chances], device=numbers.device)
            return certain[stages].expand_as(numbers)
        draws = uniforms(keys, Stream.SEGMENT, numbers).unsqueeze(-1)
        upto = torch.tensor(chances, dtype=torch.double).cumsum(1)[:, :-1]  # rounding of the last takes no draw away
        upto = upto.to(numbers.device)[stages]
        return (draws >= upto).sum(-1)

    def visible_digits(self, hidden_units: Tensor) -> Tensor:
        """Hidden units (..., U) bool to visible digits (..., S) bool.

        Of stages it reads only how many are hidden: sorted reveal times show stages first to last.
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

    visible (B, L, S) bool; hidden_count (B, L) int64, hidden units of each token; weight (B,) float64, n/k or 1/t (of
    segments n/e or G/t); maskable (B, L) bool, tokens that could have been hidden; target_digits (B, L, S) bool or
    None: the digits whose joint is predicted for each token counted in hidden_count, where it is not each hidden unit;
    eligible_count (B, L) int64 or None: eligible units of each token, where those are not all that are hidden.
    """

    visible: Tensor
    hidden_count: Tensor
    weight: Tensor
    maskable: Tensor
    target_digits: Tensor | None = None
    eligible_count: Tensor | None = None

    def weight_of(self, objective: str) -> Tensor:
        """Weight (B,) of the nats: for "joint", which predicts every token with a hidden unit, n/k of all k hidden."""
        if objective == "marginal" or self.eligible_count is None:
            return self.weight
        return self.weight * self.eligible_count.sum(1) / self.hidden_count.sum(1).clamp(min=1)


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
    later = order.num_segments - 1 - order.segments(keys.unsqueeze(1), maskable_units.cumsum(1))
    draws = draws + later  # the higher, the sooner a unit is revealed
    num_units = maskable_units.sum(1)
    if form == "time":
        # Levels run from the end of time to its beginning: whole numbers are segments that lie behind.
        position = levels * order.num_segments
        behind = position.floor().clamp(max=order.num_segments - 1)
        within = (position - behind).clamp(min=T_MIN)
        hidden = (draws < (behind + within).unsqueeze(1)) & maskable_units
    else:
        count = hidden_counts_to_draw(levels, num_units)
        ranks = draws.masked_fill(~maskable_units, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        hidden = (ranks < count.unsqueeze(1)) & maskable_units
        behind = torch.where(hidden, later, 0).amax(1)
    eligible = (hidden & (later == behind.unsqueeze(1))).view(batch, length, units).sum(-1)
    # The count form's is 0 for a row with nothing to mask.
    weight = order.num_segments / within if form == "time" else num_units / eligible.sum(1).clamp(min=1).double()
    hidden = hidden.view(batch, length, units)
    noise = Noise(order.visible_digits(hidden), hidden.sum(-1), weight, maskable)
    if order.num_segments > 1:
        noise.eligible_count = eligible
    return noise
