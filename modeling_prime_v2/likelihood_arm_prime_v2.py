"""Log-likelihood of autoregressive models, and whether they decode a text: one pass of the network a text.

log p(x) = sum over i of log p(x_i given x_<i), the first token given the start token alone. Nothing is drawn.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .chunked_loss_prime_v2 import token_nll
from .generation_greedy_prime_v2 import PrimeV2GreedyMatches, Texts, proposals
from .generation_process_prime_v2 import DRAW_ELEMENTS
from .likelihood_prime_v2 import TOKENS_PER_PASS, PrimeV2LogLikelihood, refuse_not_finite, unpadded

METHOD = "causal"


def start_token_id(config: Any) -> int:
    """The token before the first one: BOS or, without one in [0, V), EOS (of a list the first); else ValueError."""
    bos, eos = config.bos_token_id, config.eos_token_id
    for token in (bos, eos[0] if isinstance(eos, list) and eos else eos):
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            return token
    raise ValueError(
        f"bos_token_id={bos} and eos_token_id={eos}: neither is a token of this model that could start a text; set "
        f"one of them in its config to an id in [0, {config.vocab_size - 1}]"
    )


@dataclass
class NextTokens:
    """What the network is fed so as to predict the N scored tokens of B texts, and where it predicts them.

    inputs (B, L) int64; ids (N,) the scored tokens; rows, columns (N,): the hidden state there predicts the token.
    """

    inputs: Tensor
    ids: Tensor
    rows: Tensor
    columns: Tensor


def next_tokens(ids: Tensor, scored: Tensor, start: int) -> NextTokens:
    """Feed each text after the start token and without its last token, so that L inputs predict L tokens.

    A text whose first token is given (not scored) and is the start token itself gets no second one.
    ids (B, L) int64 in [0, V), padding behind the text alone, where a causal network does not see it; scored (B, L).
    """
    shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    has_start = (ids[:, :1] == start) & ~scored[:, :1]  # (B, 1)
    rows, places = scored.nonzero(as_tuple=True)
    columns = places - has_start[rows, 0].long()
    return NextTokens(torch.where(has_start, ids, shifted), ids[rows, places], rows, columns)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def log_likelihood(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    method: str = METHOD,
    num_samples: int = 1,
    seed: int = 0,
    keys: Tensor | None = None,
    exhaustive: bool = True,
    round_number: int = 0,
    return_samples: bool = False,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> PrimeV2LogLikelihood:
    """Exact log-likelihood of the tokens outside the prompt, each given all tokens before it, per sequence in nats.

    input_ids (B, L) clean ids; attention_mask (B, L), 0 for padding on any side; prompt_mask (B, L), 1 for tokens that
    are given and not scored. The first token is given the start token, see `next_tokens`.
    method: "causal". Nothing is drawn: stderr is 0, degrees are infinite, `num_samples`, seed, keys and exhaustive
        change nothing, and `samples` on request hold only the value.
    tokens_per_pass: rows x tokens of one pass of the network; changes no value beyond rounding.
    Raises ValueError for another method, num_samples < 1, a round_number, ids out of range, rows without a scored
    token, no start token, and non-finite results (`NotFiniteError`).
    """
    if method != METHOD:
        raise ValueError(f"method={method!r} is not {METHOD!r}, the exact log-likelihood, all that this model has")
    if round_number:
        raise ValueError(
            f"round_number={round_number} of method={METHOD!r}: this model draws nothing; use round_number=0"
        )
    value, num_scored = torch.zeros(len(input_ids), dtype=torch.double), torch.zeros(len(input_ids), dtype=torch.long)
    texts = list(unpadded(input_ids, attention_mask, prompt_mask, model.config))
    with evaluating(model):
        for batch in _batches(texts, tokens_per_pass):
            rows = [row for row, _, _ in batch]
            ids, scored = (pad_sequence([each[i] for each in batch], batch_first=True) for i in (1, 2))
            value[rows], num_scored[rows] = -_nats(model, ids, scored), scored.sum(1).cpu()
    refuse_not_finite(value)
    draws = list(value.unsqueeze(1)) if return_samples else None
    degrees = torch.full_like(value, math.inf)
    return PrimeV2LogLikelihood(
        value, torch.zeros_like(value), torch.ones_like(num_scored), num_scored, True, degrees, draws, is_exact=True
    )


def _batches(texts: list, tokens_per_pass: int) -> Iterator[list]:
    """Groups of (row, ids, scored), longest first, such that rows x longest is within the limit, or a single row."""
    start = 0
    while start < len(texts):
        stop = start + max(1, tokens_per_pass // len(texts[start][1]))
        yield texts[start:stop]
        start = stop


def _nats(model: Any, ids: Tensor, scored: Tensor) -> Tensor:
    """-log p of the scored tokens of each text, (B,) float64 on the CPU; ids and scored (B, L), padding behind."""
    tokens = next_tokens(ids.to(model.device), scored.to(model.device), start_token_id(model.config))
    hidden_states = model.model(tokens.inputs, use_cache=False).last_hidden_state[tokens.rows, tokens.columns]
    _, nats = token_nll(hidden_states, model.head(), tokens.ids, torch.ones_like(tokens.ids))
    # On the CPU: not every accelerator has float64.
    return torch.zeros(len(ids), dtype=torch.double).index_add_(0, tokens.rows.cpu(), nats.cpu().double())


@torch.no_grad()
def greedy_matches(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    target_mask: Tensor,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> PrimeV2GreedyMatches:
    """Whether `generate(do_sample=False)` continues what precedes the targets with exactly the ids that they have.

    input_ids (B, L) int64 in [0, V); attention_mask (B, L), 0 for padding on any side, None for no padding;
    target_mask (B, L) bool: the last tokens of each text, any number of them (padding is none). The number of tokens
    is known, so EOS is a token like others.

    The most probable token after each prefix of the text itself: one pass for a text with targets, none for one
    without, which matches. The network's rounding, coarse in bfloat16, may decide between nearly equal probabilities.
    Raises ValueError for bad shapes, ids out of range, targets followed by given tokens, logits not finite.
    """
    texts = Texts(model, input_ids, attention_mask, target_mask)
    check_targets_last(texts.hidden, texts.lengths)
    num_forward = torch.zeros(len(input_ids), dtype=torch.long)
    matches = torch.ones(len(input_ids), dtype=torch.bool)
    with evaluating(model):
        for rows in texts.batches(texts.with_targets(texts.longest_first), tokens_per_pass):
            part, width = torch.tensor(rows, device=model.device), texts.lengths[rows[0]]
            num_forward[rows] = 1
            matches[rows] = _continues(model, texts.ids[part, :width], texts.hidden[part, :width]).cpu()
    return PrimeV2GreedyMatches(matches, num_forward)


def check_targets_last(targets: Tensor, lengths: list[int]) -> None:
    """ValueError unless each text's targets (B, L) bool are its last tokens; texts of `lengths`, padding behind."""
    columns = torch.arange(1, targets.shape[1])
    inside = columns < torch.tensor(lengths).unsqueeze(1)
    broken = (targets[:, :-1] & ~targets[:, 1:] & inside.to(targets.device)).any(1)
    if broken.any():
        raise ValueError(
            f"row {int(broken.nonzero()[0])} has targets followed by given tokens, but an autoregressive model "
            f"decodes left to right and cannot fill in; let the targets be the last tokens of the row"
        )


def _continues(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """Whether each target (B, L) bool is the most probable token after those before it: (B,) bool."""
    tokens = next_tokens(ids, targets, start_token_id(model.config))
    hidden_states = model.model(tokens.inputs, use_cache=False).last_hidden_state[tokens.rows, tokens.columns]
    chunk = max(1, DRAW_ELEMENTS // model.config.vocab_size)
    proposed = torch.cat([proposals(model.token_logits(each))[0] for each in hidden_states.split(chunk)])
    wrong = torch.zeros_like(ids[:, 0]).index_add_(0, tokens.rows, (proposed != tokens.ids).long())
    return wrong == 0


__all__ = ["METHOD", "NextTokens", "greedy_matches", "log_likelihood", "next_tokens", "start_token_id"]
