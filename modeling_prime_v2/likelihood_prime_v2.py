"""Log-likelihood of sequences and its lower bounds, with standard errors (docs/derivation.md, "Bounds").

The draws of a sequence are a pure function of (seed, its ids, which of them are scored), so a value does not depend on
padding, on the other sequences of the batch or on their order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .diffusion_prime_v2 import Noise, RevealOrder, draw_noise, is_bound
from .random_prime_v2 import hash64, uniforms

# method: (reveal order of the noise, objective)
SAMPLED_METHODS = {
    "subtoken": ("digit", "subtoken"),
    "token": ("token", "subtoken"),
    "nested": ("nested", "subtoken"),
    "token_objective": ("digit", "token"),
}
METHODS = (*SAMPLED_METHODS, "chain", "orders")
# The bound of the order that a model was trained to reveal its units in.
BOUND_OF_ORDER = {order: method for method, (order, objective) in SAMPLED_METHODS.items() if objective == "subtoken"}
TOKENS_PER_PASS = 8192  # rows of (sequence x draw) share a forward pass up to this many tokens
ROWS_PER_PIECE = 256  # of one random order, so that a long sequence's states do not fill the memory
_SEQUENCE, _DRAW, _ORDER = 11, 12, 13  # stream numbers, see diffusion_prime_v2


@dataclass
class PrimeV2LogLikelihood(ModelOutput):
    """Per sequence: `value` (B,) float64 nats, `stderr` (B,) of its draws, `num_forward` (B,) rows the network ran.

    `is_bound`: value is the log-likelihood or, in expectation over the draws, a lower bound of it. Where it is False,
    value may exceed the log-likelihood and must not be turned into a perplexity.
    `num_scored` (B,): tokens scored, the divisor of nats per token.
    """

    value: Tensor | None = None
    stderr: Tensor | None = None
    num_forward: Tensor | None = None
    num_scored: Tensor | None = None
    is_bound: bool | None = None


@dataclass
class _Rows:
    """Rows of one sequence: (R, L) ids, their noise, the factor of each row's nats in the value, and the sequence."""

    ids: Tensor
    noise: Noise
    factor: Tensor
    sequence: int


@torch.no_grad()
def log_likelihood(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    method: str = "subtoken",
    num_samples: int = 128,
    seed: int = 0,
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
        "token_objective" the paper's training loss, NOT a bound for S > 1: it can exceed the log-likelihood.
    Raises ValueError for an unknown method, num_samples < 1, ids out of range, rows without a scored token, and
    non-finite results.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1; use 128")
    sequences = list(_unpadded(input_ids, attention_mask, prompt_mask, model.config))
    if method == "chain":
        order, objective = RevealOrder.from_config(model.config, "token"), "token"
        rows = (_chain_rows(ids, scored, i) for i, ids, scored in sequences)
    elif method == "orders":
        order, objective = RevealOrder.from_config(model.config), "subtoken"
        rows = (row for i, ids, scored in sequences for row in _order_rows(ids, scored, i, order, num_samples, seed))
    else:
        kind, objective = SAMPLED_METHODS[method]
        order = RevealOrder.from_config(model.config, kind)
        rows = (_sampled_rows(ids, scored, i, order, num_samples, seed) for i, ids, scored in sequences)
    was_training = model.training
    model.eval()
    nats: list[list[Tensor]] = [[] for _ in range(len(input_ids))]
    try:
        for batch in _batches(rows, tokens_per_pass):
            for row_nats, part in zip(_score(model, batch, order, objective), batch, strict=True):
                nats[part.sequence].append(row_nats.cpu() * part.factor.cpu())
    finally:
        model.train(was_training)
    value, stderr = _summarise([torch.cat(each) for each in nats], method, num_samples)
    num_scored = torch.zeros(len(input_ids), dtype=torch.long)
    for i, _, scored in sequences:
        num_scored[i] = scored.sum()
    bound = method in ("chain", "orders") or is_bound(objective, "elbo", model.config.num_subtokens, order, None)
    num_forward = torch.tensor([sum(len(part) for part in each) for each in nats])
    return PrimeV2LogLikelihood(value, stderr, num_forward, num_scored, bound)


def _summarise(nats: list[Tensor], method: str, num_samples: int) -> tuple[Tensor, Tensor]:
    """Rows of each sequence to (value, standard error), both (B,) float64 on the CPU."""
    if method == "chain":
        value = torch.stack([-each.sum() for each in nats]).cpu()
        stderr = torch.zeros_like(value)
    elif method == "orders":
        log_p = torch.stack([-each.view(num_samples, -1).sum(1) for each in nats])  # (B, K)
        value = log_p.logsumexp(1) - math.log(num_samples)
        spread = (
            (log_p - value.unsqueeze(1)).exp().std(1) if num_samples > 1 else value.new_full((len(nats),), torch.nan)
        )
        stderr = spread / math.sqrt(num_samples)  # of the log of a mean, to first order
    else:
        value = torch.stack([-each.mean() for each in nats]).cpu()
        stderr = torch.stack([stratified_stderr(each) for each in nats]).cpu()
    if not value.isfinite().all():
        row = int((~value.isfinite()).nonzero()[0])
        raise ValueError(
            f"the log-likelihood of row {row} is {float(value[row])}: the network's logits are not finite"
        )
    return value, stderr


def stratified_stderr(draws: Tensor) -> Tensor:
    """Standard error of the mean of K draws (K,), one from each of K equal strata in order; NaN for one draw.

    Half the squared difference of neighbouring strata estimates the variance within them; the drift from one stratum
    to the next only adds to it (collapsed strata, Cochran, "Sampling Techniques", 1977, section 5A.12). The two outer
    strata have one neighbour, whose difference counts twice so that every stratum has the same weight.
    """
    if len(draws) < 2:
        return draws.new_full((), torch.nan)
    squares = draws.diff().square()
    return (squares.sum() / 2 + (squares[0] + squares[-1]) / 4).sqrt() / len(draws)


def _unpadded(input_ids, attention_mask, prompt_mask, config) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(row, ids (L,), scored (L,) bool) without padding, longest first so that a pass holds rows of like length."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give (B, L) with at least one token")
    for name, mask in (("attention_mask", attention_mask), ("prompt_mask", prompt_mask)):
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(mask.shape)}, but input_ids {tuple(input_ids.shape)}")
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


def sequence_key(ids: Tensor, scored: Tensor, seed: int) -> Tensor:
    """int64 key of a sequence: a hash of the seed, its ids (L,) and which of them are scored (L,)."""
    positions = torch.arange(len(ids), device=ids.device)
    return hash64(seed, _SEQUENCE, hash64(positions, ids, scored.long()).sum())


def _sampled_rows(ids, scored, sequence: int, order: RevealOrder, num_samples: int, seed: int) -> _Rows:
    draws = torch.arange(num_samples, device=ids.device)
    keys = hash64(sequence_key(ids, scored, seed), draws)
    levels = (draws + uniforms(keys, _DRAW)) / num_samples
    noise = draw_noise(scored.expand(num_samples, -1), order, keys, levels, "count")
    return _Rows(ids.expand(num_samples, -1), noise, noise.weight, sequence)


def _chain_rows(ids: Tensor, scored: Tensor, sequence: int) -> _Rows:
    targets = scored.nonzero().squeeze(1)  # (R,)
    hidden = scored & (torch.arange(len(ids), device=ids.device) >= targets.unsqueeze(1))  # (R, L)
    asked = torch.arange(len(ids), device=ids.device) == targets.unsqueeze(1)
    ones = torch.ones(len(targets), dtype=torch.double, device=ids.device)
    noise = Noise(~hidden.unsqueeze(-1), asked.long(), ones, asked)
    return _Rows(ids.expand(len(targets), -1), noise, ones, sequence)


def _order_rows(
    ids: Tensor, scored: Tensor, sequence: int, order: RevealOrder, num_orders: int, seed: int
) -> Iterator[_Rows]:
    """A row for each unit of each random order: what comes later is hidden, and that unit alone is asked for."""
    units, key = order.units_per_token, sequence_key(ids, scored, seed)
    maskable = scored.repeat_interleave(units)  # (L * U,)
    unit_numbers = torch.arange(len(maskable), device=ids.device)
    num_units = int(maskable.sum())
    for number in range(num_orders):
        draws = uniforms(key, _ORDER, number, unit_numbers)
        ranks = torch.where(maskable, draws, 2.0).argsort(stable=True).argsort()
        for start in range(0, num_units, ROWS_PER_PIECE):
            steps = torch.arange(start, min(num_units, start + ROWS_PER_PIECE), device=ids.device).unsqueeze(1)
            hidden = (maskable & (ranks >= steps)).view(len(steps), -1, units)
            asked = (maskable & (ranks == steps)).view(len(steps), -1, units)
            goal = asked if order.kind == "digit" else order.next_visible(hidden.sum(-1))
            asked_tokens, ones = asked.any(-1), torch.ones(len(steps), dtype=torch.double, device=ids.device)
            noise = Noise(order.visible_digits(hidden), asked_tokens.long(), ones, asked_tokens, goal)
            yield _Rows(ids.expand(len(steps), -1), noise, ones, sequence)


def _batches(parts: Iterator[_Rows], tokens_per_pass: int) -> Iterator[list[_Rows]]:
    """Groups rows, splitting those of one sequence where needed, so that rows x longest stays within the limit."""
    batch: list[_Rows] = []
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
            piece = slice(done, done + room)
            noise = part.noise.rows(piece)
            batch.append(_Rows(part.ids[piece], noise, part.factor[piece], part.sequence))
            rows, done = rows + len(batch[-1].ids), done + len(batch[-1].ids)
    if batch:
        yield batch


def _score(model, batch: list[_Rows], order: RevealOrder, objective: str) -> tuple[Tensor, ...]:
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
    goal = None
    if batch[0].noise.goal is not None:
        goal = join([part.noise.goal for part in batch], False)
    noise = Noise(visible, hidden_count, weight, maskable, goal)
    _, nats = model.nats_of_hidden(hidden_states, ids, noise, order, objective, weight)
    return nats.split([len(part.ids) for part in batch])
