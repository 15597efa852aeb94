"""Log-likelihood of autoregressive models: one pass of the network a text.

log p(x) = sum over i of log p(x_i given x_<i), the first token given only the start token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chunked_loss_prime_v2 import token_nll
from .likelihood_frame_prime_v2 import Likelihood
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
    ids (B, L) int64 in [0, V), padding only behind the text, where a causal network does not see it; scored (B, L).
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
