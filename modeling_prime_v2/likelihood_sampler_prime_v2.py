"""`log_likelihood(method="sampler")`: the law of what `generate` writes, on texts that are given.

A sampler's passes are run on the text itself: where it reveals digits, those of the text are revealed, and the
probability that it would have drawn them is multiplied in. If the sampler's positions are a function of what is known
(every rule of `samplers_prime_v2`), there is one path to a text and the product is its exact probability, several
units a pass, blocks, caches, temperature and top_p included (DUEL, arXiv:2603.01367, for tokens). The ancestral
sampler's positions are drawn: -log of the mean over `num_samples` paths is a bound that tightens as they grow.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .backbone_prime_v2 import evaluating
from .generation_config_prime_v2 import GenerationOptions, merge_options
from .generation_prime_v2 import AncestralProcess
from .generation_process_prime_v2 import Canvas, DraftStream
from .generation_rules_prime_v2 import RuleProcess
from .likelihood_frame_prime_v2 import TOKENS_PER_PASS, unpadded
from .likelihood_output_prime_v2 import PrimeV2LogLikelihood, jackknifed
from .likelihood_rows_prime_v2 import sequence_key
from .random_prime_v2 import Stream, hash64
from .validation_inputs_prime_v2 import check_length


class Replay:
    """What replaces the draws of a process: the text's own tokens, `truth` (B, T), their nats added up in `nats`."""

    truth: Tensor
    nats: Tensor

    def values(self: Any, rows: Tensor, columns: Tensor, logits: Tensor, steps: Tensor, digits: Tensor) -> Tensor:
        table, ids = self.model.code_table, self.truth[rows, columns]
        probabilities = self.probabilities(logits)
        after = torch.where(digits, table.codes[ids], self.states[rows, columns])
        agrees = (probabilities * table.consistent(after)).sum(-1)
        self.nats.index_add_(0, rows, probabilities.sum(-1).log() - agrees.log())
        return ids


class ReplayedRule(Replay, RuleProcess):
    """The one path of a rule to each text."""


class ReplayedAncestral(Replay, AncestralProcess):
    """A drawn path of the ancestral sampler to each text."""


@torch.no_grad()
def sampler_log_likelihood(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    generation_config: Any = None,
    num_samples: int = 128,
    seed: int = 0,
    keys: Tensor | None = None,
    exhaustive: bool = True,
    round_number: int = 0,
    return_samples: bool = False,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> PrimeV2LogLikelihood:
    """Log-probability, in nats, that `generate` writes the scored tokens between the given ones; arguments as there.

    A text that top_p excludes has the value -inf.

    generation_config: the sampler with its options, on top of the model's own; lengths and EOS are not read: a text is
        as long as it is given. exhaustive changes nothing: a rule has one path, the paths of others are drawn.
    Raises ValueError for samplers without such a law: remasking, and do_sample=False, which writes a single text.
    """
    if round_number:
        raise ValueError("round_number belongs to methods that draw masks, and not to method='sampler'; leave it out")
    options = merge_options(model, generation_config, {"seed": 0})
    if options.do_sample is False:
        raise ValueError("do_sample=False writes a single text, so no other has a likelihood; use do_sample=True")
    if options.sampler_kind == "remasking":
        raise ValueError(
            "a text has many paths under remasking, so its likelihood is no product; use another sampler_config, e.g. "
            "ConfidenceSamplerConfig()"
        )
    options = dataclasses.replace(options, eos_token_id=())
    is_rule = options.sampler_kind == "rule"
    sequences = list(unpadded(input_ids, attention_mask, prompt_mask, model.config))
    check_length(sequences[0][1].unsqueeze(0), None, model.config)  # the longest
    rows = []  # (number of the sequence, ids (L,), scored (L,), key of its path)
    for number, ids, scored in sequences:
        key = sequence_key(ids, scored, seed) if keys is None else keys[number].to(ids.device)
        for path in hash64(key, Stream.PATH, torch.arange(1 if is_rule else num_samples, device=key.device)):
            rows.append((number, ids, scored, path))
    nats: list[list[Tensor]] = [[] for _ in sequences]
    num_forward = torch.zeros(len(sequences), dtype=torch.long)
    with evaluating(model):
        while rows:
            size = max(1, tokens_per_pass // len(rows[0][1]))  # the longest comes first
            some, rows = rows[:size], rows[size:]
            process = replay(model, options, *zip(*some, strict=True))
            process.run([], DraftStream(None, process.canvas))
            for (number, *_), each, passes in zip(some, process.nats.cpu(), process.num_forward, strict=True):
                nats[number].append(each)
                num_forward[number] += passes
    found = [summarised(-torch.stack(each), is_rule) for each in nats]
    samples, value, stderr, degrees = zip(*found, strict=True)
    kept = list(samples) if return_samples else None
    return PrimeV2LogLikelihood(
        torch.stack(value),
        torch.stack(stderr),
        num_forward,
        torch.tensor([int(scored.sum()) for _, _, scored in sorted(sequences, key=lambda each: each[0])]),
        True,
        torch.tensor(degrees, dtype=torch.double),
        kept,
        is_rule,
    )


def summarised(log_p: Tensor, is_rule: bool) -> tuple[Tensor, Tensor, Tensor, float]:
    """(samples (K,), value, standard error, degrees) of the log-probabilities (K,) of a text's paths."""
    if is_rule or bool((log_p == -math.inf).all()):  # no path: top_p excludes the text
        return log_p[:1], log_p[0], log_p.new_zeros(()), math.inf
    return jackknifed(log_p)


def replay(model: Any, options: GenerationOptions, numbers: Any, ids: Any, scored: Any, keys: Any) -> Any:
    """The process of `options` on several texts (L,) whose `scored` tokens are revealed; keys: of their paths."""
    device = model.device
    truth = pad_sequence(ids, batch_first=True).to(device)
    fillable = pad_sequence(scored, batch_first=True).to(device)
    lengths = torch.tensor([len(each) for each in ids], device=device)
    positions = torch.arange(truth.shape[1], device=device).expand_as(truth)
    shown = truth.masked_fill(fillable, model.config.mask_token_id)
    real = positions < lengths.unsqueeze(1)
    canvas = Canvas(shown.clone(), real, positions, fillable, shown, slice(0, 0))
    kind = ReplayedRule if options.sampler_kind == "rule" else ReplayedAncestral
    process = kind(model, options, canvas, [], torch.stack(list(keys)).to(device))
    process.truth = truth
    process.nats = torch.zeros(len(truth), dtype=torch.double, device=device)
    return process
