"""What the models with a head share: the head, of its own or tied to the embedding, and logits of hidden states."""

from typing import Any

import torch
from torch import Tensor, nn

from .backbone_prime_v2 import PrimeV2PreTrainedModel
from .likelihood_frame_prime_v2 import PrimeV2LikelihoodMixin
from .linear_prime_v2 import HeadCall, apply_head, head_of


class PrimeV2HeadModel(PrimeV2PreTrainedModel, PrimeV2LikelihoodMixin):
    """A network, `model`, and its head, `lm_head`; `loss_is_bound` says what a family's loss is."""

    model: Any
    why_fixed: str = ""  # the vocabulary, as the end of a sentence

    def add_head(self) -> None:
        """Draw the head's weights (V, D); a tied head has none."""
        if not self.config.tie_word_embeddings:
            self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "lm_head", None)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"vocab_size={self.config.vocab_size} is {self.why_fixed}")

    def head(self) -> Tensor | HeadCall:
        """The head (V, D), or how to call it; tied, it is the embedding of each token."""
        if self.config.tie_word_embeddings:
            return self.model.all_embeddings()
        return head_of(self.lm_head, self.config.vocab_size)

    def token_logits(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (..., D) to logits (..., V), at least float32."""
        logits = apply_head(hidden_states, self.head())
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
