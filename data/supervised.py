"""Questions with answers to train on: prompt, answer and EOS in one row, of which the answer and its EOS are scored.

Rows are `block_size` tokens long. What follows the EOS is padding, filled with EOS: either hidden from attention and
loss (attention_mask 0), or, with `score_padding`, read and scored like text, so that a model that fills a canvas of
fixed length learns where answers end (docs/finetuning.md).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prime_v2.data.documents import read_rows
from prime_v2.data.splits import Fingerprint, split_of
from prime_v2.tokenization.plain_text import first_loss, plain_ids

ANSWER, PROMPT = "{answer}", "{prompt}"
NOT_SCORED = -100  # Transformers' label of a token that takes no part in the loss
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Supervision:
    """How the rows of a file become examples: the options of train.py of the same names."""

    data: str
    prompt_field: str
    answer_field: str
    example_template: str
    max_documents: int | None
    block_size: int
    score_padding: bool
    dev_share: float
    test_share: float
    seed: int


class Examples:
    """Encoded examples: `len(examples)`; `examples[i]` is a dict of input_ids, labels and attention_mask, (L,) int64.

    ids (N, L) int64, padded with EOS; prompt_lengths and lengths (N,) int64: tokens of the prompt, and of prompt,
    answer and EOS. As of `PackedBlocks`: block_size, tokens (scored ones), bytes (of the answers), documents,
    fingerprint and tokenizer_loss; dropped: examples that did not fit.
    """

    def __init__(
        self,
        ids: Tensor,
        prompt_lengths: Tensor,
        lengths: Tensor,
        *,
        score_padding: bool = False,
        text_bytes: int = 0,
        fingerprint: str = "",
        dropped: int = 0,
        tokenizer_loss: str | None = None,
    ):
        self.ids, self.prompt_lengths, self.lengths = ids, prompt_lengths, lengths
        self.score_padding, self.dropped, self.tokenizer_loss = score_padding, dropped, tokenizer_loss
        self.block_size = ids.shape[1]
        self.ends = torch.full_like(lengths, self.block_size) if score_padding else lengths
        self.tokens = int((self.ends - prompt_lengths).sum())
        self.bytes, self.documents, self.fingerprint = text_bytes, len(ids), fingerprint

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, columns = self.ids[index], torch.arange(self.block_size)
        real = columns < self.ends[index]
        scored = real & (columns >= self.prompt_lengths[index])
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(~scored, NOT_SCORED),
            "attention_mask": real.long(),
        }

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    def first(self, count: int) -> "Examples":
        """The first `count` examples; their bytes in proportion to their tokens."""
        part = Examples(
            self.ids[:count],
            self.prompt_lengths[:count],
            self.lengths[:count],
            score_padding=self.score_padding,
            tokenizer_loss=self.tokenizer_loss,
        )
        part.bytes = round(self.bytes_per_token * part.tokens)
        return part

    def windows(self) -> list[tuple[Tensor, Tensor]]:
        """(ids (n, l), prompt_mask (n, l) bool) of all examples of l tokens, for each l, without hidden padding."""
        groups = []
        for length in self.ends.unique().tolist():
            rows = self.ends == length
            groups.append((self.ids[rows, :length], torch.arange(length) < self.prompt_lengths[rows].unsqueeze(1)))
        return groups


def render(template: str, prompt: str, answer: str) -> tuple[str, str]:
    """(text of the prompt, text of the answer); white space between them belongs to the answer, as in lm-eval.

    ValueError for a template without {prompt} before exactly one {answer}.
    """
    before, found, after = template.partition(ANSWER)
    if not found or PROMPT not in before or ANSWER in after or PROMPT in after:
        raise ValueError(
            f"--example_template {template!r} must hold {PROMPT} before one {ANSWER}; use e.g. '{PROMPT}\\n{ANSWER}'"
        )
    context = before.replace(PROMPT, prompt)
    kept = context.rstrip()
    return kept, context[len(kept) :] + answer + after


def read_examples(options: Supervision) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of every row, as texts of the template; ValueError for a row without either."""
    fields = (options.prompt_field, options.answer_field)
    for number, (prompt, answer) in enumerate(read_rows(options.data, fields)):
        if options.max_documents is not None and number >= options.max_documents:
            return
        for name, text in zip(fields, (prompt, answer), strict=True):
            if not text.strip():
                raise ValueError(f"{options.data} example {number + 1}: the field {name!r} is empty; drop that row")
        yield render(options.example_template, prompt, answer)


def read_splits(options: Supervision, tokenizer: Any) -> dict[str, Examples]:
    """The splits train, dev and test of a file of questions and answers, by each question's text and the seed.

    Equal questions fall on one side. An example that is longer than block_size is dropped and counted. ValueError for
    a tokenizer without EOS, bad rows, and a split without an example.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token to end answers with; use one that has")
    texts: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for prompt, answer in read_examples(options):
        side = split_of(prompt, seed=options.seed, dev_share=options.dev_share, test_share=options.test_share)
        texts[side].append((prompt, answer))
    return {split: _encoded(split, texts[split], options, tokenizer) for split in SPLITS}


def _encoded(split: str, texts: list[tuple[str, str]], options: Supervision, tokenizer: Any) -> Examples:
    rows, fingerprint, text_bytes = [], Fingerprint(), 0
    prompts, answers = (plain_ids(tokenizer, [pair[part] for pair in texts]) for part in (0, 1))
    for (prompt, answer), prompt_ids, answer_ids in zip(texts, prompts, answers, strict=True):
        if len(prompt_ids) + len(answer_ids) >= options.block_size:
            continue
        rows.append((prompt_ids, [*answer_ids, tokenizer.eos_token_id]))
        fingerprint.add(json.dumps([prompt, answer]))
        text_bytes += len(answer.encode())
    if not rows:
        longest = f"; {len(texts)} are longer than --block_size {options.block_size}" if texts else ""
        raise ValueError(
            f"the {split} split of {Path(options.data).name} has no example (dev_share={options.dev_share}, "
            f"test_share={options.test_share}{longest}); use more examples or other shares"
        )
    ids = torch.full((len(rows), options.block_size), tokenizer.eos_token_id, dtype=torch.long)
    for row, (prompt_ids, answer_ids) in zip(ids, rows, strict=True):
        row[: len(prompt_ids) + len(answer_ids)] = torch.tensor([*prompt_ids, *answer_ids])
    return Examples(
        ids,
        torch.tensor([len(prompt_ids) for prompt_ids, _ in rows]),
        torch.tensor([len(prompt_ids) + len(answer_ids) for prompt_ids, answer_ids in rows]),
        score_padding=options.score_padding,
        text_bytes=text_bytes,
        fingerprint=fingerprint.hexdigest(),
        dropped=len(texts) - len(rows),
        tokenizer_loss=first_loss(tokenizer, [answer for _, answer in texts], answers),
    )
