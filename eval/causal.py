"""Exact log-likelihoods of autoregressive models, with the interface of `model.log_likelihood`.

So one window of text, one sum and one table serve both kinds of model (docs/perplexity.md). A window of L tokens is
fed as [start, x_1 .. x_{L-1}]: all L tokens are scored, and a model with P positions takes windows of P tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from prime_v2.backbone_prime_v2 import evaluating
from prime_v2.likelihood_frame_prime_v2 import unpadded
from prime_v2.likelihood_output_prime_v2 import PrimeV2LogLikelihood, refuse_not_finite
from prime_v2.validation_inputs_prime_v2 import check_mask, checked_seed, whole_number

METHOD = "causal"
TOKENS_PER_PASS = 8192
LOGITS_PER_PASS = 2**27  # the network's own (rows, L, V) output: 512 MiB in float32, or one row where that has more
LOGITS_PER_CHUNK = 2**24  # float32 copies that log-softmax makes of it
# How far logits of earlier tokens may move when a later token changes, as a share of their spread: far above rounding
# in float32, and 4 steps of a shorter type where that is more. A network that looks ahead moves them further.
MAX_LEAK = 1e-3


class CausalScorer:
    """A causal language model that answers `log_likelihood` as a diffusion model does; `config`, `device`, `dtype`.

    model: any `AutoModelForCausalLM`, in evaluation mode while it scores. tokenizer: its own, asked first for the
    token that a window starts with (`start_token_id`).
    Raises ValueError for a model without such a token, and for one whose logits depend on later tokens (encoders such
    as BERT load as causal models too), since no likelihood follows from them.
    """

    def __init__(self, model: Any, tokenizer: Any = None):
        self.model = model
        self.config = model.config
        text = model.config.get_text_config()
        self.vocab_size: int = text.vocab_size
        self.max_length: int | None = getattr(text, "max_position_embeddings", None)
        self.start_token_id = start_token_id(model.config, tokenizer, self.vocab_size)
        self._check_causal()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.no_grad()
    def log_likelihood(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        method: str = METHOD,
        num_samples: int = 1,
        seed: int = 0,
    ) -> PrimeV2LogLikelihood:
        """Log-likelihood in nats of the tokens outside the prompt given those before them, per sequence.

        input_ids (B, L) ids; attention_mask (B, L), 0 for padding on any side; prompt_mask (B, L), 1 for tokens that
        are given and not scored. There is one pass of the network for a sequence and nothing is drawn: stderr is 0,
        num_samples and seed change nothing. Log-probabilities are float32, sums float64. A value depends on the other
        sequences of the batch only by rounding.
        Raises ValueError for another method than "causal", num_samples < 1, ids out of range, sequences longer than
        max_position_embeddings or without a scored token, and logits that are not finite (`NotFiniteError`).
        """
        check_method(method)
        whole_number("num_samples", num_samples, 1)
        checked_seed(seed)
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give (B, L) with at least one token")
        for name, mask in (("attention_mask", attention_mask), ("prompt_mask", prompt_mask)):
            check_mask(name, mask, tuple(input_ids.shape))
        texts = list(unpadded(input_ids, attention_mask, prompt_mask, self.model.config.get_text_config()))
        longest = len(texts[0][1])
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(f"{longest} tokens are more than max_position_embeddings={self.max_length}; use fewer")
        value, num_scored = torch.zeros(len(texts), dtype=torch.double), torch.zeros(len(texts), dtype=torch.long)
        tokens_per_pass = min(TOKENS_PER_PASS, LOGITS_PER_PASS // self.vocab_size)
        with evaluating(self.model):
            while texts:
                count = max(1, tokens_per_pass // len(texts[0][1]))  # the longest of those that are left
                rows, ids, scored = zip(*texts[:count], strict=True)
                value[list(rows)] = -self._nats(list(ids), list(scored))
                num_scored[list(rows)] = torch.tensor([int(each.sum()) for each in scored])
                del texts[:count]
        refuse_not_finite(value)
        return PrimeV2LogLikelihood(
            value, torch.zeros_like(value), torch.ones_like(num_scored), num_scored, True, is_exact=True
        )

    def _nats(self, texts: list[Tensor], scored: list[Tensor]) -> Tensor:
        """-log p of the scored tokens of each text, (R,) float64 on the CPU; ids and which are scored, (L,) each."""
        # Padding is on the right, where no causal model sees it.
        ids = pad_sequence(texts, batch_first=True, padding_value=self.start_token_id).to(self.device)
        real = pad_sequence([torch.ones_like(each) for each in texts], batch_first=True).to(self.device)
        fed = torch.cat([ids.new_full((len(ids), 1), self.start_token_id), ids[:, :-1]], dim=1)
        logits = self._logits(fed, None if real.all() else real).flatten(0, 1)  # (R * L, V)
        places = pad_sequence(scored, batch_first=True).to(self.device).flatten().nonzero().squeeze(1)
        nats = [
            functional.cross_entropy(logits[part].float(), ids.flatten()[part], reduction="none")
            for part in places.split(max(1, LOGITS_PER_CHUNK // logits.shape[1]))
        ]
        # On the CPU: not every accelerator has float64.
        sums, rows = torch.zeros(len(ids), dtype=torch.double), (places // ids.shape[1]).cpu()
        return sums.index_add_(0, rows, torch.cat(nats).cpu().double())

    def _logits(self, fed: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.model(input_ids=fed, attention_mask=attention_mask, use_cache=False).logits

    @torch.no_grad()
    def _check_causal(self) -> None:
        length = min(8, self.max_length or 8)
        if length < 2:
            return
        ids = (torch.arange(length, device=self.device) * 7 + 1).unsqueeze(0) % self.vocab_size
        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % self.vocab_size
        with evaluating(self.model):
            logits, changed = (self._logits(each, None)[:, :-1].float() for each in (ids, other))
        allowed = max(MAX_LEAK, 4 * torch.finfo(self.dtype).eps) * logits.std()
        if logits.isfinite().all() and (changed - logits).abs().max() > allowed:
            raise ValueError(
                f"the model (type {self.config.model_type!r}) is not causal: its logits depend on later tokens, so no "
                f"likelihood follows from them; use a causal language model"
            )


def start_token_id(config: Any, tokenizer: Any, vocab_size: int) -> int:
    """BOS or, without one, EOS: the tokenizer's, else the configuration's (of a list the first); in [0, vocab_size).

    Raises ValueError where there is none.
    """
    text = config.get_text_config()
    found = [getattr(place, name, None) for place in (tokenizer, text) for name in ("bos_token_id", "eos_token_id")]
    for number in (each[0] if isinstance(each, list) and each else each for each in found):
        if isinstance(number, int) and 0 <= number < vocab_size:
            return number
    raise ValueError(
        "neither the tokenizer nor the model has a BOS or EOS token to start a window with; set bos_token in "
        "tokenizer_config.json"
    )


def check_method(method: str) -> None:
    """ValueError unless `method` is the one that a causal model has."""
    if method != METHOD:
        raise ValueError(
            f"method={method!r} is for diffusion models; a causal model has only {METHOD!r}, its exact log-likelihood"
        )
