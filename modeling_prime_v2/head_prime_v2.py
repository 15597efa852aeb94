"""What the models with a head share: the head, of its own or tied to the embedding, and logits of hidden states."""

from typing import Any

import torch
from torch import Tensor, nn

from .backbone_prime_v2 import PrimeV2PreTrainedModel
from .likelihood_frame_prime_v2 import PrimeV2LikelihoodMixin
from .linear_prime_v2 import HeadCall, apply_head, head_of
from .stage_head_prime_v2 import StageHead, num_rows


class PrimeV2HeadModel(PrimeV2PreTrainedModel, PrimeV2LikelihoodMixin):
    """A network, `model`, and its head, `lm_head`; `loss_is_bound` says what a family's loss is."""

    model: Any
    code_table: Any
    why_fixed: str = ""  # the vocabulary, as the end of a sentence

    @property
    def is_staged(self) -> bool:
        """Whether the head is one of stages, which families without codes do not have."""
        return getattr(self.config, "head", "full") == "stages"

    def add_head(self) -> None:
        """Draw the head's weights, (V, D) or the rows of its stages; a tied head has none."""
        config = self.config
        if config.tie_word_embeddings:
            return
        rows = config.vocab_size
        if self.is_staged:
            rows = num_rows(config.base, config.head_ends, rows)
        self.lm_head = nn.Linear(config.hidden_size, rows, bias=False)

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "lm_head", None)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"vocab_size={self.config.vocab_size} is {self.why_fixed}")

    def head(self, shared: Tensor | None = None) -> Tensor | HeadCall | StageHead:
        """The head (V, D), or how to call it; tied, it is the embedding of each token. shared (V, D) adds to it."""
        if self.config.tie_word_embeddings:
            return self.model.all_embeddings()
        if self.is_staged:
            return StageHead(self.lm_head, self.code_table, self.config.head_ends)
        return head_of(self.lm_head, self.config.vocab_size, shared)

    def token_logits(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (..., D) to logits (..., V), at least float32."""
        logits = apply_head(hidden_states, self.head())
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
