"""The causal model that judges texts: exp of its exact nats per token is their generative perplexity.

That is the field's name. It says how likely the judge finds the texts, and is a perplexity of the judge, not of the
model that wrote them: text that repeats itself has a low one, so it is read beside the unigram entropy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prime_v2.eval.causal import CausalScorer
from prime_v2.studies.quality.statistics import Texts
from prime_v2.tokenization.plain_text import plain_ids

TEXTS_PER_CALL = 256
FEWEST_FOR_MAUVE = 64  # its k-means has a tenth as many clusters as texts


@dataclass(frozen=True)
class Judged:
    """Texts as the judge reads them: scored ids (T_i,) each, their nats (N,) float64; cut: texts it read in part."""

    texts: Texts
    nats: np.ndarray
    cut: int


class Judge:
    """A causal language model with its tokenizer, and that of the models it judges.

    re_encodes: whether the two tokenizers differ, so that texts are decoded and encoded anew before they are judged.
    """

    def __init__(self, model: Any, tokenizer: Any, of_models: Any):
        self.scorer = model if isinstance(model, CausalScorer) else CausalScorer(model, tokenizer)
        self.tokenizer, self.of_models = tokenizer, of_models
        self.re_encodes = not same_tokens(tokenizer, of_models)

    def check(self, length: int) -> None:
        """ValueError unless texts of `length` tokens fit: re-encoded ones are cut where they do not."""
        most = self.scorer.max_length
        if not self.re_encodes and most is not None and length > most:
            raise ValueError(
                f"the judge reads {most} tokens at most, not length={length}; use {most} or another judge"
            )

    def read(self, ids: Tensor, prompt: int) -> Judged:
        """Judge texts (N, L) of the models' ids, given their first `prompt` tokens, which are not scored."""
        rows, cut = list(ids), 0
        given = [prompt] * len(rows)
        if self.re_encodes:
            given = [len(self._encoded(row[:prompt])) for row in rows]
            rows = [torch.cat([self._encoded(row[:prompt]), self._encoded(row[prompt:])]) for row in rows]
            most = self.scorer.max_length or max(map(len, rows))
            cut = sum(len(row) > most for row in rows)
            rows = [row[:most] for row in rows]
        nats = [
            self._nats(rows[start : start + TEXTS_PER_CALL], given[start : start + TEXTS_PER_CALL])
            for start in range(0, len(rows), TEXTS_PER_CALL)
        ]
        return Judged([row[first:].numpy() for row, first in zip(rows, given, strict=True)], np.concatenate(nats), cut)

    def _nats(self, rows: Sequence[Tensor], given: Sequence[int]) -> np.ndarray:
        ids = pad_sequence(list(rows), batch_first=True)
        real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        places = torch.arange(ids.shape[1])
        prompt = places < torch.tensor(given).unsqueeze(1)
        output = self.scorer.log_likelihood(
            ids, attention_mask=real, prompt_mask=prompt.long() if any(given) else None
        )
        return -output.value.numpy()

    def _encoded(self, ids: Tensor) -> Tensor:
        """The judge's ids of what the models' ids say, document by document; at least an EOS."""
        ends = self.of_models.eos_token_id
        pieces: list[list[int]] = [[]]
        for token in ids.tolist():
            if token == ends:
                pieces.append([])
            else:
                pieces[-1].append(token)
        texts = self.of_models.batch_decode(pieces, skip_special_tokens=True)
        encoded = plain_ids(self.tokenizer, texts)
        separator = self.tokenizer.eos_token_id
        if separator is None:
            raise ValueError("the judge's tokenizer has no eos_token to put between documents; use another judge")
        joined = encoded[0]
        for each in encoded[1:]:
            joined = [*joined, separator, *each]
        return torch.tensor(joined or ([separator] if len(ids) else []), dtype=torch.long)

    @torch.no_grad()
    def features(self, texts: Texts) -> np.ndarray:
        """The last hidden state of each text at its last token, (N, D) float32, which MAUVE compares sets by."""
        found = []
        for ids in texts:
            start = torch.tensor([self.scorer.start_token_id, *ids.tolist()])[-(self.scorer.max_length or 10**9) :]
            output = self.scorer.model(
                input_ids=start.unsqueeze(0).to(self.scorer.device), output_hidden_states=True, use_cache=False
            )
            found.append(output.hidden_states[-1][0, -1].float().cpu().numpy())
        return np.stack(found)


def same_tokens(one: Any, other: Any) -> bool:
    """Whether an id names the same token in both tokenizers."""
    return one is other or one.get_vocab() == other.get_vocab()


def check_mauve(samples: int) -> None:
    """ValueError where MAUVE is not installed, or the samples are fewer than it needs; called before the work."""
    try:
        import mauve  # noqa: F401
    except ImportError:
        raise ValueError(
            "MAUVE needs the package mauve-text (GPL-3.0), which is not installed; pip install mauve-text, "
            "or leave --mauve out"
        ) from None
    if samples < FEWEST_FOR_MAUVE:
        raise ValueError(f"MAUVE needs at least {FEWEST_FOR_MAUVE} samples, not {samples}; draw {FEWEST_FOR_MAUVE}")


def mauve_of(samples: np.ndarray, real: np.ndarray, seed: int) -> float:
    """MAUVE in [0, 1] (arXiv:2102.01454) of two sets of features (N, D), 1 for equal ones."""
    import mauve

    return float(mauve.compute_mauve(p_features=real, q_features=samples, seed=seed, verbose=False).mauve)


def check_judge(config: Any) -> None:
    """ValueError for a judge of ours that is not causal: a bound of text is no generative perplexity."""
    from prime_v2.families import FAMILY_OF_TYPE, label_of

    family = FAMILY_OF_TYPE.get(config.model_type)
    if family is not None and family.bound != "causal":
        raise ValueError(
            f"the judge is of the family {label_of(config)}, which has a bound of a text's likelihood only; use a "
            f"causal model, e.g. an ARM trained on the same text"
        )
