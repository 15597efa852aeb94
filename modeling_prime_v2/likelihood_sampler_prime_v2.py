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
from .likelihood_frame_prime_v2 import TOKENS_PER_PASS, KeyedText, joined, keyed_texts, numbers_scored
from .likelihood_output_prime_v2 import PrimeV2LogLikelihood, jackknifed
from .random_prime_v2 import Stream, hash64


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

    generation_config: the sampler with its options, on top of the model's own; lengths and EOS are not read: a text is
        as long as it is given. A rule has one path to a text: the value is exact, and num_samples is not read.
    The value is -inf, exactly, for a text that a rule's top_p excludes. For a sampler with drawn paths it is -inf
    where none of them can write the text, and the standard error is NaN (`jackknifed`): others may.
    Raises ValueError for samplers without such a law: remasking, and do_sample=False, which writes a single text; and
    for round_number and exhaustive, options of methods that draw masks.
    """
    for name, value, idle in (("round_number", round_number, 0), ("exhaustive", exhaustive, True)):
        if value != idle:
            raise ValueError(
                f"{name}={value} of method='sampler': it belongs to methods that draw masks; leave it out"
            )
    with torch.random.fork_rng(devices=[]):  # merge_options draws a seed, which no path here is a function of
        options = merge_options(model, generation_config, {})
    if options.do_sample is False:
        raise ValueError("do_sample=False writes a single text, so no other has a likelihood; use do_sample=True")
    if options.sampler_kind == "remasking":
        raise ValueError(
            "a text has many paths under remasking, so its likelihood is no product; use another sampler_config, e.g. "
            "ConfidenceSamplerConfig()"
        )
    options = dataclasses.replace(options, eos_token_id=())
    is_rule = options.sampler_kind == "rule"
    texts = keyed_texts(input_ids, attention_mask, prompt_mask, model.config, seed, keys)
    numbers = torch.arange(1 if is_rule else num_samples)
    paths = [
        text._replace(key=key) for text in texts for key in hash64(text.key, Stream.PATH, numbers.to(text.key.device))
    ]
    nats: list[list[Tensor]] = [[] for _ in texts]
    num_forward = torch.zeros(len(texts), dtype=torch.long)
    with evaluating(model):
        while paths:
            size = max(1, tokens_per_pass // len(paths[0].ids))  # the longest comes first
            some, paths = paths[:size], paths[size:]
            process = replay(model, options, some)
            process.run([], DraftStream(None, process.canvas))
            for path, each, passes in zip(some, process.nats.cpu(), process.num_forward, strict=True):
                nats[path.number].append(each)
                num_forward[path.number] += passes
    parts = [summarised(-torch.stack(each), is_rule) for each in nats]
    return joined(parts, num_forward, numbers_scored(texts), True, is_rule, return_samples)


def summarised(log_p: Tensor, is_rule: bool) -> tuple[Tensor, Tensor, Tensor, float]:
    """(samples (K,), value, standard error, degrees) of the log-probabilities (K,) of a text's paths."""
    return (log_p, log_p[0], log_p.new_zeros(()), math.inf) if is_rule else jackknifed(log_p)


def replay(model: Any, options: GenerationOptions, paths: list[KeyedText]) -> Any:
    """The process of `options` that reveals the scored tokens of several texts, each on the path of its key."""
    device = model.device
    truth = pad_sequence([path.ids for path in paths], batch_first=True).to(device)
    fillable = pad_sequence([path.scored for path in paths], batch_first=True).to(device)
    lengths = torch.tensor([len(path.ids) for path in paths], device=device)
    positions = torch.arange(truth.shape[1], device=device).expand_as(truth)
    shown = truth.masked_fill(fillable, model.config.mask_token_id)
    real = positions < lengths.unsqueeze(1)
    canvas = Canvas(shown.clone(), real, positions, fillable, shown, slice(0, 0))
    kind = ReplayedRule if options.sampler_kind == "rule" else ReplayedAncestral
    process = kind(model, options, canvas, [], torch.stack([path.key for path in paths]).to(device))
    process.truth = truth
    process.nats = torch.zeros(len(truth), dtype=torch.double, device=device)
    return process
