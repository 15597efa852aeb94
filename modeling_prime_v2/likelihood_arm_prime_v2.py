"""Log-likelihood of autoregressive models, and whether they decode a text: one pass of the network a text.

log p(x) = sum over i of log p(x_i given x_<i), the first token given only the start token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backbone_prime_v2 import evaluating
from .chunked_loss_prime_v2 import token_nll
from .generation_greedy_prime_v2 import PrimeV2GreedyMatches, Texts, proposals
from .generation_process_prime_v2 import DRAW_ELEMENTS
from .likelihood_frame_prime_v2 import TOKENS_PER_PASS, Likelihood
from .likelihood_rows_prime_v2 import Rows


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


class PrimeV2ArmLikelihood(Likelihood):
    """One row a sequence, the sequence itself: nothing is drawn."""

    methods = ("causal",)

    def rows(self, ids: Tensor, scored: Tensor, key: Tensor) -> Iterator[Rows]:
        one = torch.ones(1, dtype=torch.double, device=ids.device)
        yield Rows({"ids": ids.unsqueeze(0), "scored": scored.unsqueeze(0)}, one)

    def row_loss(self, model: Any, inputs: dict[str, Tensor], attention_mask: Tensor | None) -> Tensor:
        tokens = next_tokens(inputs["ids"], inputs["scored"], start_token_id(model.config))
        hidden_states = model.model(tokens.inputs, use_cache=False).last_hidden_state[tokens.rows, tokens.columns]
        _, nats = token_nll(hidden_states, model.head(), tokens.ids, torch.ones_like(tokens.ids))
        # On the CPU: not every accelerator has float64.
        total = torch.zeros(len(inputs["ids"]), dtype=torch.double)
        return total.index_add_(0, tokens.rows.cpu(), nats.cpu().double())


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


__all__ = ["NextTokens", "PrimeV2ArmLikelihood", "greedy_matches", "next_tokens", "start_token_id"]
