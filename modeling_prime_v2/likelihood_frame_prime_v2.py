"""The frame of `log_likelihood`, which each family fills in: its rows of the network, and the loss of each row.

A value does not depend on padding, on the other sequences of the batch or on their order.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .backbone_prime_v2 import evaluating
from .code_table_prime_v2 import check_id_type
from .likelihood_output_prime_v2 import (
    PrimeV2LogLikelihood,
    refuse_not_finite,
    stratified_degrees,
    stratified_stderr,
)
from .likelihood_rows_prime_v2 import FURTHER_SAMPLES, ROWS_PER_PIECE, Rows, draw_levels, sample_keys, sequence_key
from .random_prime_v2 import Stream
from .validation_inputs_prime_v2 import check_length, scoring_inputs

TOKENS_PER_PASS = 8192  # rows of all sequences share a forward pass up to this many tokens


class Likelihood:
    """What a method runs for a sequence, and how the losses of its rows become a likelihood.

    A family sets `rows` and `row_loss`; `is_enumerated` where all rows can be run instead of drawn ones, `summarise`
    where the value is no mean. methods: all there are, those of a class without others being `sampled_methods`, whose
    rows are drawn.
    """

    methods: ClassVar[tuple[str, ...]] = ()
    sampled_methods: ClassVar[tuple[str, ...]] = ()
    round_stream: ClassVar[Stream] = FURTHER_SAMPLES
    padding: ClassVar[dict[str, int]] = {}  # what the rows' inputs (R, L, ...) are padded with, 0 if not named

    def __init__(self, config: Any, method: str, num_samples: int, exhaustive: bool, round_number: int):
        if method not in self.methods_of(config):
            raise ValueError(f"method={method!r} is not one of {', '.join(self.methods_of(config))}")
        if round_number and (method not in self.sampled_methods or num_samples % 2 ** (round_number - 1)):
            raise ValueError(
                f"round_number={round_number} of method={method!r} with num_samples={num_samples}: a sampled method "
                f"takes it, with a multiple of {2 ** (round_number - 1)} samples"
            )
        self.config, self.method, self.num_samples, self.round_number = config, method, num_samples, round_number
        # As many rows as the samples would be, those of earlier rounds included.
        self.most_rows = 0 if not exhaustive else num_samples * 2 if round_number else num_samples
        self.is_bound = True
        self.is_exact = method not in self.sampled_methods

    @classmethod
    def methods_of(cls, config: Any) -> tuple[str, ...]:
        """The methods of a model with this configuration."""
        return cls.methods or cls.sampled_methods

    @classmethod
    def bound_of(cls, config: Any) -> str:
        """The method whose value is reported: the model's own bound, or its exact value."""
        return cls.methods_of(config)[0]

    def is_enumerated(self, num_tokens: int) -> bool:
        """Whether the rows of a sequence of `num_tokens` scored tokens are all that there are: nothing is drawn."""
        return self.is_exact

    def rows(self, ids: Tensor, scored: Tensor, key: Tensor) -> Iterator[Rows]:
        """The rows of a sequence: ids (L,), scored (L,) bool, without padding; key: of its draws."""
        raise NotImplementedError

    def row_loss(self, model: Any, inputs: dict[str, Tensor], attention_mask: Tensor | None) -> Tensor:
        """Nats of each row, (R,) float64, without the rows' factors; inputs as of `Rows`, padded, on the device."""
        raise NotImplementedError

    def samples(self, key: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(keys (R,) int64, levels (R,) float64) of the sequence's samples, in pieces."""
        keys = sample_keys(key, self.num_samples, self.round_number, self.round_stream)
        levels = draw_levels(key, self.num_samples, self.round_number)
        yield from zip(keys.split(ROWS_PER_PIECE), levels.split(ROWS_PER_PIECE), strict=True)

    def summarise(self, nats: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """Factor x nats (R,) of one sequence's rows to (samples (K,), value, standard error, degrees), float64."""
        if self.is_enumerated(num_tokens):
            value = -nats.sum()
            return value.unsqueeze(0), value, nats.new_zeros(()), math.inf
        return -nats, -nats.mean(), stratified_stderr(nats), stratified_degrees(nats)


class PrimeV2LikelihoodMixin:
    """`log_likelihood` of a model of any family; `likelihood_class` is what the family fills in."""

    config: Any
    likelihood_class: type[Likelihood]

    @property
    def likelihood_methods(self) -> tuple[str, ...]:
        """The `method`s of `log_likelihood` that this config has."""
        return self.likelihood_class.methods_of(self.config)

    @property
    def bound_method(self) -> str:
        """The `method` whose value is reported: the model's own bound, or its exact value."""
        return self.likelihood_class.bound_of(self.config)

    def log_likelihood(
        self: Any, input_ids, attention_mask=None, prompt_mask=None, method: str | None = None, **kwargs
    ) -> PrimeV2LogLikelihood:
        """Log-likelihood of each sequence, or its lower bound, in nats: see likelihood_frame_prime_v2.py.

        method: one of `likelihood_methods`; None is `bound_method`, the model's own bound or exact value.
        """
        ids, mask, prompt, options = scoring_inputs(
            self, log_likelihood, kwargs, input_ids, attention_mask, prompt_mask=prompt_mask
        )
        return log_likelihood(self, ids, mask, prompt, method, **options)


@torch.no_grad()
def log_likelihood(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    method: str | None = None,
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
    are given and not scored. Methods (docs/derivation.md; `model.likelihood_methods` names those of a model):
        None            `model.bound_method`: the bound, or exact value, of the process that the model is trained for.
      masked diffusion
        "subtoken"      bound, digits hidden one by one: E_k n/k sum of -log m_ij; `num_samples` stratified samples.
        "token"         bound, whole tokens hidden; `num_samples` samples.
        "nested", "coarse_first", "windows"
                        bounds, stages of digits hidden (configs with stage_digits), in one of three orders;
                        `num_samples` samples.
        "chain"         exact for decoding left to right, one pass per scored token, no sampling. Of a model with
                        reveal_order="coarse_first": all first stages left to right, then all second ones, ...
        "orders"        bound, -log mean of exp(log p) over `num_samples` random orders of the config's reveal_order,
                        one pass per scored unit and order; tightens as num_samples grows.
        "sampler"       of what `generate` writes with `generation_config`: exact for samplers whose positions follow
                        from the text, else a bound from `num_samples` paths (`sampler_log_likelihood`).
        "paper_loss"    the paper's training loss, NOT a bound for S > 1: it can exceed the log-likelihood.
      autoregressive
        "causal"        exact; one row a sequence, nothing drawn. The first token is given the start token.
      uniform-state diffusion
        "uniform"       bound over all times from 0 to 1, both ends included; `num_samples` samples of (number of
                        replaced tokens, time, replacements), stratified over that number.
      interpolating diffusion
        "interpolating" bound, both terms; `num_samples` stratified samples, a row each. Exact for alpha_0 = 0.
        "chain"         exact for decoding left to right from all masked; one row, nothing drawn.
    exhaustive: sum over all masks (all orders) instead of drawing where they are no more than `num_samples`: the
        expectation itself, with standard error 0. Times of uniform-state diffusion are always drawn.
    seed: the draws of a sequence are a pure function of (seed, its ids, which of them are scored).
    keys (B,) int64: of the draws, instead of (seed, sequence); sequences with equal keys share their random numbers.
    round_number: r > 0 draws the r-th round of further samples, as many as there were before (`draw_levels`).
    return_samples: keep the single samples, for `paired_difference`.
    tokens_per_pass: rows x tokens of one pass of the network; changes no value beyond rounding.
    Raises ValueError for an unknown method, ids out of range, over-long sequences, rows without a scored token, and
    non-finite results (`NotFiniteError`).
    """
    method = model.bound_method if method is None else method
    plan = model.likelihood_class(model.config, method, num_samples, exhaustive, round_number)
    texts = keyed_texts(input_ids, attention_mask, prompt_mask, model.config, seed, keys)

    def rows() -> Iterator[Rows]:
        for text in texts:
            for each in plan.rows(text.ids, text.scored, text.key):
                each.sequence = text.number
                yield each

    nats: list[list[Tensor]] = [[] for _ in texts]
    with evaluating(model):
        for batch in batches(rows(), tokens_per_pass):
            row_nats = plan.row_loss(model, *join(batch, plan.padding, model.device)).cpu()
            for each, part in zip(row_nats.split([len(part) for part in batch]), batch, strict=True):
                nats[part.sequence].append(each * part.factor.cpu())
    num_scored = numbers_scored(texts)
    parts = [plan.summarise(torch.cat(each), count) for each, count in zip(nats, num_scored.tolist(), strict=True)]
    num_forward = torch.tensor([sum(map(len, each)) for each in nats])
    output = joined(parts, num_forward, num_scored, plan.is_bound, plan.is_exact, return_samples)
    refuse_not_finite(output.value)
    return output


class KeyedText(NamedTuple):
    """A text without padding: its row in the batch, ids (L,), scored (L,) bool, and the key () of its draws."""

    number: int
    ids: Tensor
    scored: Tensor
    key: Tensor


def keyed_texts(
    input_ids: Tensor, attention_mask: Tensor | None, prompt_mask: Tensor | None, config: Any, seed: int, keys: Any
) -> list[KeyedText]:
    """The texts of a batch, longest first; their keys are the given `keys` (B,), or hashes of (seed, text)."""
    texts = []
    for number, ids, scored in unpadded(input_ids, attention_mask, prompt_mask, config):
        key = sequence_key(ids, scored, seed) if keys is None else keys[number].to(ids.device)
        texts.append(KeyedText(number, ids, scored, key))
    check_length(texts[0].ids.unsqueeze(0), None, config)
    return texts


def numbers_scored(texts: list[KeyedText]) -> Tensor:
    """Scored tokens of each text, (B,) int64, in the batch's order."""
    return torch.tensor([int(text.scored.sum()) for text in sorted(texts, key=lambda each: each.number)])


def joined(
    parts: list[Any], num_forward: Tensor, num_scored: Tensor, is_bound: bool, is_exact: bool, return_samples: bool
) -> PrimeV2LogLikelihood:
    """The result from the (samples, value, standard error, degrees) of each text, in the batch's order."""
    samples, value, stderr, degrees = zip(*parts, strict=True)
    return PrimeV2LogLikelihood(
        torch.stack(value),
        torch.stack(stderr),
        num_forward,
        num_scored,
        is_bound,
        torch.tensor(degrees, dtype=torch.double),
        list(samples) if return_samples else None,
        is_exact,
    )


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
    for row in real.sum(1).argsort(descending=True, stable=True).tolist():
        yield row, input_ids[row][real[row]], scored[row][real[row]]


def batches(parts: Iterator[Rows], tokens_per_pass: int) -> Iterator[list[Rows]]:
    """Groups rows, splitting those of one sequence where needed, so that rows x longest stays within the limit."""
    batch: list[Rows] = []
    rows = longest = 0
    for part in parts:
        done = 0
        while done < len(part):
            longest = max(longest, part.length)
            room = max(1, tokens_per_pass // longest) - rows
            if room <= 0:
                yield batch
                batch, rows, longest = [], 0, 0
                continue
            batch.append(part.part(slice(done, done + room)))
            rows, done = rows + len(batch[-1]), done + len(batch[-1])
    if batch:
        yield batch


def join(batch: list[Rows], padding: dict[str, int], device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs of all rows, padded on the right, and their attention mask (None without padding), on `device`."""
    length = max(part.length for part in batch)

    def padded(tensor: Tensor, fill: int) -> Tensor:
        missing = length - tensor.shape[1]
        return pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing), value=fill) if missing else tensor

    inputs = {}
    for name, first in batch[0].inputs.items():
        several = [part.inputs[name] for part in batch]
        if first.dim() > 1:
            several = [padded(each, padding.get(name, 0)) for each in several]
        inputs[name] = torch.cat(several).to(device)
    lengths = torch.cat([torch.full((len(part),), part.length) for part in batch])
    real = torch.arange(length) < lengths.unsqueeze(1)
    return inputs, None if real.all() else real.long().to(device)
