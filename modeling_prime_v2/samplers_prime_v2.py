"""Samplers: which hidden units a pass of `generate` reveals, as a function of the state and the network's output.

A *unit* is a whole token, a digit of one, or its next stage. Each rule scores every hidden unit by
the network's distribution of it (after the carry-over filter and logits processors, before temperature and top_p) and
reveals the best ones: at least as many as spread the hidden units evenly over the passes that are left. So there are
at most `max_denoising_steps` passes, or one for each block and stage where these are more. Equal scores are decided by
position, then digit (`best_first`). The positions are thus a function of what is known, and the sampler's law is exact
(`likelihood_sampler_prime_v2`).

Rules: confidence of LLaDA (arXiv:2502.09992) and of Dream (arXiv:2508.15487: probability, margin, entropy); threshold
of Fast-dLLM (arXiv:2505.22618); entropy bound of arXiv:2505.24857, as Transformers' models/diffusion_gemma has it.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .validation_inputs_prime_v2 import whole_number
from .validation_keywords_prime_v2 import did_you_mean, nearest, shown

SCORED_ELEMENTS = 2**19  # logits that are scored at once: 2 MiB of float32
UNITS = ("token", "digit", "stage")
SCORES = ("probability", "margin", "entropy")
# Scores that differ by less, relative to the size of what they are computed from, are equal: a float32 network rounds
# by 1e-7 to 1e-6 differently in batches of other shapes. Where everything is hidden all positions have one
# distribution, so ties are no accident.
ROUNDING = 2.0**-16


@dataclass(frozen=True)
class SamplerConfig:
    """What all sampler configs share: they are written to generation_config.json with their class in `_cls_name`.

    kind: the process that it belongs to, "ancestral", "rule", "remasking" or "predictor-corrector".
    """

    kind: ClassVar[str] = "ancestral"

    def __new__(cls, *args: Any, **given: Any) -> "SamplerConfig":
        """ValueError for a field that it has not, where Python would have its bare TypeError."""
        check_fields(cls, given)
        return super().__new__(cls)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):  # Python's own, which JSON can hold
                object.__setattr__(self, field.name, value.item())

    @property
    def name(self) -> str:
        """Its name in `SAMPLERS`."""
        return next(name for name, each in SAMPLERS.items() if each.__name__ == type(self).__name__)

    def to_dict(self) -> dict[str, Any]:
        """The fields and `_cls_name`, as Transformers writes those of its own diffusion model."""
        return {**dataclasses.asdict(self), "_cls_name": type(self).__name__}


@dataclass(frozen=True)
class AncestralSamplerConfig(SamplerConfig):
    """The reverse process: units are revealed at random times, drawn before the first pass.

    stage_passes: of a model with reveal_order="coarse_first", the share of the steps that each stage gets, e.g. (0.75,
        0.25); None is equal shares.
    """

    stage_passes: tuple[float, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "stage_passes", checked_shares(type(self).__name__, self.stage_passes))


@dataclass(frozen=True)
class RuleSamplerConfig(SamplerConfig):
    """A sampler whose positions are a function of the network's output.

    unit: "token", "digit" (any digit of any token) or "stage" (of models with stages: all first ones, then all second
        ones, ...). stage_passes: for "stage", the share of the passes that each stage gets, e.g. (0.75, 0.25); None is
        equal shares.
    """

    kind: ClassVar[str] = "rule"
    unit: str = "token"
    stage_passes: tuple[float, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if self.unit not in UNITS:
            raise ValueError(f"{name}: unit={shown(self.unit)} is not one of {', '.join(UNITS)}")
        if self.stage_passes is None:
            return
        if self.unit != "stage":
            raise ValueError(f"{name}: stage_passes belongs to unit='stage', not {self.unit!r}; leave it out")
        object.__setattr__(self, "stage_passes", checked_shares(name, self.stage_passes))

    @property
    def score(self) -> str:
        """What units are ordered by, one of `SCORES`."""
        raise NotImplementedError

    def count(self, scores: Tensor) -> Tensor:
        """How many units the rule itself reveals, without the quota: scores (R, N), best first, to (R,) int64.

        Scores of units that are not eligible are -inf.
        """
        return torch.zeros(len(scores), dtype=torch.long, device=scores.device)


@dataclass(frozen=True)
class ConfidenceSamplerConfig(RuleSamplerConfig):
    """The most confident units, as many as spread them evenly over the passes.

    score: "probability" of the likeliest value, "margin" between the two likeliest, or "entropy", lowest first.
    """

    score: str = "probability"

    def __post_init__(self):
        super().__post_init__()
        if self.score not in SCORES:
            raise ValueError(f"ConfidenceSamplerConfig: score={shown(self.score)} is not one of {', '.join(SCORES)}")


@dataclass(frozen=True)
class ThresholdSamplerConfig(RuleSamplerConfig):
    """Every unit whose likeliest value has a probability above `threshold`, in (0, 1); at least one."""

    threshold: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if not _is_number(self.threshold) or not 0 < self.threshold < 1:
            raise ValueError(f"ThresholdSamplerConfig: threshold={shown(self.threshold)} is outside (0, 1); use 0.9")

    @property
    def score(self) -> str:
        return "probability"

    def count(self, scores: Tensor) -> Tensor:
        return (scores > self.threshold).sum(1)


@dataclass(frozen=True)
class EntropyBoundSamplerConfig(RuleSamplerConfig):
    """The units of lowest entropy, while sum H - max H <= `entropy_bound` nats, above 0; at least one."""

    entropy_bound: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not _is_number(self.entropy_bound) or not 0 < self.entropy_bound < float("inf"):
            value = shown(self.entropy_bound)
            raise ValueError(f"EntropyBoundSamplerConfig: entropy_bound={value} must be positive and finite; use 0.1")

    @property
    def score(self) -> str:
        return "entropy"

    def count(self, scores: Tensor) -> Tensor:
        entropies = torch.where(scores.isfinite(), -scores, torch.inf)  # ascending
        # What is not eligible has an infinite entropy: inf - inf is NaN, which is above no bound, so it is left out.
        return (entropies.cumsum(1) - entropies <= self.entropy_bound).sum(1)


@dataclass(frozen=True)
class RemaskingSamplerConfig(SamplerConfig):
    """The reverse process with units that are hidden again (ReMDM, arXiv:2503.00307): `generation_remasking_prime_v2`.

    eta: largest probability of hiding a revealed unit in a step, in [0, 1]. t_on, t_off: it happens at times t with
        t_off < t <= t_on, 0 <= t_off < t_on <= 1; t falls from 1 to 0.
    """

    kind: ClassVar[str] = "remasking"
    eta: float = 0.02
    t_on: float = 0.55
    t_off: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        if not _is_number(self.eta) or not 0 <= self.eta <= 1:
            raise ValueError(f"RemaskingSamplerConfig: eta={shown(self.eta)} is outside [0, 1]; use 0.02")
        _check_window(self, "0.55 and 0.05")


@dataclass(frozen=True)
class PredictorCorrectorSamplerConfig(SamplerConfig):
    """The reverse process of uniform-state diffusion with corrector steps: `generation_uniform_process_prime_v2`.

    corrector_steps: how many follow a predictor step, at its time, at least 1. corrector_share: share of the tokens
        that each of them redraws, in (0, 1]; at least one token, which is an exact Gibbs step. t_on, t_off: they
        follow steps to times t with t_off < t <= t_on, 0 <= t_off < t_on <= 1; t falls from 1 to 0.
    """

    kind: ClassVar[str] = "predictor-corrector"
    corrector_steps: int = 1
    corrector_share: float = 0.1
    t_on: float = 0.2
    t_off: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        name, share = type(self).__name__, self.corrector_share
        whole_number(f"{name}: corrector_steps", self.corrector_steps, 1)
        if not _is_number(share) or not 0 < share <= 1:
            raise ValueError(f"{name}: corrector_share={shown(share)} is outside (0, 1]; use 0.1")
        _check_window(self, "0.2 and 0.0")


def _check_window(sampler: Any, use: str) -> None:
    t_on, t_off = sampler.t_on, sampler.t_off
    if not all(map(_is_number, (t_on, t_off))) or not 0 <= t_off < t_on <= 1:
        raise ValueError(
            f"{type(sampler).__name__}: t_on={shown(t_on)} and t_off={shown(t_off)} must be 0 <= t_off < t_on <= 1; "
            f"use {use}"
        )


def checked_shares(name: str, shares: Any) -> tuple[float, ...] | None:
    """`stage_passes` of the config `name`, floats, or None; ValueError unless positive shares that add up to 1."""
    if shares is None:
        return None
    numbers = isinstance(shares, (list, tuple)) and all(_is_number(each) and each > 0 for each in shares)
    if not numbers or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"{name}: stage_passes={shown(shares)} must be shares above 0 that add up to 1; use (0.75, 0.25)"
        )
    return tuple(float(each) for each in shares)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


SAMPLERS = {
    "ancestral": AncestralSamplerConfig,
    "confidence": ConfidenceSamplerConfig,
    "threshold": ThresholdSamplerConfig,
    "entropy-bound": EntropyBoundSamplerConfig,
    "remasking": RemaskingSamplerConfig,
    "predictor-corrector": PredictorCorrectorSamplerConfig,
}


def sampler_from(value: Any) -> SamplerConfig | None:
    """A sampler config from one, from its dictionary with `_cls_name`, or from None; ValueError for anything else."""
    if value is None or isinstance(value, SamplerConfig):
        return value
    classes = {each.__name__: each for each in SAMPLERS.values()}
    name = value.get("_cls_name") if isinstance(value, dict) else None
    # A class of the same name from a copy of this file in a saved folder, or of Transformers' own model.
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value).__name__ in classes:
        name, value = type(value).__name__, dataclasses.asdict(value)
    if name not in classes:
        raise ValueError(f"sampler_config={shown(value)} is no sampler's config; use {_config_meant(value)}")
    return classes[name](**{key: each for key, each in value.items() if key != "_cls_name"})


def check_fields(config: type, given: Iterable[str]) -> None:
    """ValueError for the first name of `given` that is no field of this class of `SAMPLERS`, with the one meant."""
    fields = [each.name for each in dataclasses.fields(config)]
    for name in given:
        if name not in fields:
            owners = _owners(name)
            hint = f"; it is an option of {', '.join(owners)}" if owners else did_you_mean(name, fields)
            raise ValueError(f"{config.__name__} has no option {name}{hint}")


def sampler_meant(name: str, value: Any) -> str | None:
    """What to give in place of a keyword of `generate` that names a sampler or one of its options; None for others."""
    if name == "sampler":
        return f"use sampler_config={_config_meant(value)}"
    owners = _owners(name)
    return f"use sampler_config={owners[0]}({name}={shown(value)})" if owners else None


def _owners(option: str) -> list[str]:
    """The classes of `SAMPLERS` that have this option."""
    return [
        each.__name__ for each in SAMPLERS.values() if option in {field.name for field in dataclasses.fields(each)}
    ]


def _config_meant(value: Any) -> str:
    """The config, as code, that a name, a class or a dictionary without `_cls_name` stands for; else an example."""
    if isinstance(value, SamplerConfig):
        return repr(value)
    names = {name: f"{each.__name__}()" for name, each in SAMPLERS.items()}
    names |= {score: f"ConfidenceSamplerConfig(score={score!r})" for score in SCORES}
    classes = {each.__name__: f"{each.__name__}()" for each in SAMPLERS.values()}
    if isinstance(value, type):
        value = value.__name__
    if isinstance(value, dict) and isinstance(value.get("_cls_name"), str):
        value = value["_cls_name"]
    if isinstance(value, str):
        meant = nearest(value, [*names, *classes])
        return names["margin"] if meant is None else (names | classes)[meant]
    given = {str(key): each for key, each in value.items()} if isinstance(value, dict) else {}
    for each in SAMPLERS.values():
        if given and set(given) <= {field.name for field in dataclasses.fields(each)}:
            return f"{each.__name__}({', '.join(f'{key}={shown(option)}' for key, option in given.items())})"
    return names["margin"]


# -- units ---------------------------------------------------------------------------------------------------------


class Units:
    """The units of a model's tokens: U to a token, their scores and which digits each of them reveals.

    For "token" and "stage" U = 1 (a token has one next stage), for "digit" U = S.
    """

    def __init__(self, kind: str, table: Any, stage_digits: tuple[int, ...] = ()):
        self.kind, self.table = kind, table
        self.stage_ends = stage_digits if kind == "stage" else ()
        self.per_token = table.num_subtokens if kind == "digit" else 1

    def stages_visible(self, states: Tensor) -> Tensor:
        """Visible stages of each token: states (..., S) to (...) int64; for other kinds 0 until a token is whole."""
        visible = (states != self.table.base).sum(-1)
        ends = torch.tensor(self.stage_ends or (self.table.num_subtokens,), device=states.device)
        return (visible.unsqueeze(-1) >= ends).sum(-1)

    def hidden(self, states: Tensor) -> Tensor:
        """Which units can be revealed next: states (..., S) to (..., U) bool."""
        masked = states == self.table.base
        return masked if self.kind == "digit" else masked.any(-1, keepdim=True)

    def digits(self, chosen: Tensor, states: Tensor) -> Tensor:
        """Digits (..., S) bool that the chosen units (..., U) reveal."""
        if self.kind != "stage":
            return chosen.expand(*chosen.shape[:-1], self.table.num_subtokens) & (states == self.table.base)
        ends = torch.tensor((*self.stage_ends, self.stage_ends[-1]), device=states.device)
        upto = ends[self.stages_visible(states)].unsqueeze(-1)
        numbers = torch.arange(self.table.num_subtokens, device=states.device)
        return chosen & (numbers < upto) & (states == self.table.base)

    def scores(self, logits: Tensor, states: Tensor, score: str) -> Tensor:
        """`confidence` (M, U, 2) of the units of M tokens with logits (M, V) and states (M, S).

        In the logits' type, a few tokens at a time: what is computed of them then stays in a processor's cache.
        """
        found = logits.new_empty(len(logits), self.per_token, 2)
        rows = max(1, SCORED_ELEMENTS // logits.shape[1])
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            found[part] = self._scores(logits[part], states[part], score)
        return found

    def _scores(self, logits: Tensor, states: Tensor, score: str) -> Tensor:
        if self.kind == "token":
            return confidence(logits, score).unsqueeze(1)
        probabilities = logits.softmax(-1)
        if self.kind == "digit":
            sums = (probabilities @ self.one_hot.to(probabilities.dtype)).unflatten(-1, (self.per_token, -1))
            last = (1 - sums.sum(-1, keepdim=True)).clamp(min=0)  # precise enough for a score, and a product less
            return confidence(torch.cat([sums, last], -1).log(), score)
        found, stages = logits.new_empty(len(logits), 1, 2), self.stages_visible(states)
        for stage in range(len(self.stage_ends)):
            rows = stages == stage
            if self.stage_ends[stage] == self.table.num_subtokens:  # a node is a token
                found[rows, 0] = confidence(logits[rows], score)
                continue
            nodes = self.nodes[stage]
            sums = probabilities.new_zeros(int(rows.sum()), int(nodes.max()) + 1)
            sums.index_add_(1, nodes, probabilities[rows])
            found[rows, 0] = confidence(sums.log(), score)
        return found

    @cached_property
    def one_hot(self) -> Tensor:
        """The tokens' digits one-hot without the last value of each, (V, S * (base - 1)) float32."""
        hot = self.table.one_hot().unflatten(1, (self.per_token, self.table.base))
        return hot[:, :, :-1].flatten(1).contiguous()

    @cached_property
    def nodes(self) -> list[Tensor]:
        """Numbers of the nodes of the code tree of each token after each stage but the last: (V,) int64 each."""
        packed, digits = self.table.packed_codes().long(), self.table.num_subtokens
        ends = [end for end in self.stage_ends if end < digits]
        return [(packed >> self.table.bits * (digits - end)).unique(return_inverse=True)[1] for end in ends]


def confidence(logits: Tensor, score: str) -> Tensor:
    """Logits (..., C) of C values to (..., 2): the score, the surer the higher, and what its rounding is relative to.

    probability of the likeliest value; margin, of which the two likeliest may leave little; minus the entropy (nats).
    """
    # By softmax and not `exp`, which takes many times longer where a result is 0 or nearly so.
    probabilities = logits.softmax(-1)
    if score == "entropy":
        log_p = logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min)
        negative = probabilities.mul_(log_p).sum(-1)
        return torch.stack([negative, 1 - negative], dim=-1)
    best, index = probabilities.max(-1, keepdim=True)
    value = best
    if score == "margin":
        value = best - probabilities.scatter_(-1, index, 0.0).amax(-1, keepdim=True)
    return torch.cat([value, best], dim=-1)


def choose(
    sampler: RuleSamplerConfig, scores: Tensor, eligible: Tensor, quota: Tensor, sizes: Tensor | None = None
) -> Tensor:
    """The units that a pass reveals: (R, N) bool.

    scores and sizes (R, N) float64, as of `best_first`; eligible (R, N) bool; quota (R,) int64, at least how many (or
    all that are eligible).
    """
    scores = scores.masked_fill(~eligible, -torch.inf)
    ordered, index = best_first(scores, sizes)
    count = torch.maximum(quota, sampler.count(ordered)).minimum(eligible.sum(1))
    best = torch.arange(scores.shape[1], device=scores.device) < count.unsqueeze(1)
    return torch.zeros_like(best).scatter_(1, index, best)


def best_first(scores: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scores (R, N), the highest first, and their columns; a chain within `ROUNDING` is ordered by column.

    sizes (R, N): what the rounding is relative to, by default the scores.
    """
    ordered, index = scores.sort(dim=1, descending=True, stable=True)
    sizes = ordered.abs() if sizes is None else sizes.gather(1, index)
    apart = ordered[:, :-1] - ordered[:, 1:] > ROUNDING * sizes[:, :-1]
    group = torch.cat([torch.zeros_like(index[:, :1]), apart.long().cumsum(1)], dim=1)
    index = index.gather(1, (group * scores.shape[1] + index).argsort(dim=1))
    return scores.gather(1, index), index
