"""What the processes of `generate` share: the canvas that they fill, passes of the network over it, the result."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from .code_table_prime_v2 import check_ids
from .generation_config_prime_v2 import DEFAULTS, GenerationOptions
from .generation_draws_prime_v2 import to_probabilities
from .random_prime_v2 import Stream, hash64
from .validation_inputs_prime_v2 import WITHOUT_PROMPT, check_mask, refuse_lone_mask, refuse_only_padding

DRAW_ELEMENTS = 2**22  # positions x V whose logits are computed at once: 16 MiB of float32, memory that is kept


@dataclass
class PrimeV2GenerationOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` returns.

    sequences (B, T) int64: prompt + new + suffix. num_forward (B,) int64: passes of the network for each sequence.
    network_seconds, sampling_seconds: wall time of the whole call in the network with its head, and in drawing tokens.
    tokens_per_forward (B,) float64: tokens generated, padding after EOS not counted, over num_forward.
    """

    sequences: Tensor | None = None
    num_forward: Tensor | None = None
    network_seconds: float | None = None
    sampling_seconds: float | None = None
    tokens_per_forward: Tensor | None = None


@dataclass
class Canvas:
    """B sequences of prompt + new + suffix, T columns, as far as they are known.

    ids (B, T) int64: V (the mask id) where a token is not fully known, 0 for padding; real (B, T) bool, False for
    padding; position_ids (B, T) int64; fillable (B, T) bool: tokens to be generated; given (B, T): ids as they came,
    for padding; new: the columns of the new tokens.
    """

    ids: Tensor
    real: Tensor
    position_ids: Tensor
    fillable: Tensor
    given: Tensor
    new: slice


def make_canvas(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    suffix_ids: Tensor | None,
    options: GenerationOptions,
) -> Canvas:
    """Lay out prompt + new + suffix on the model's device, `num_return_sequences` times each row, one after another.

    ValueError for what does not fit (see `generate`).
    """
    config, device = model.config, model.device
    mask_id, bos = config.mask_token_id, options.bos_token_id
    if input_ids is None:
        refuse_lone_mask(attention_mask)
        rows = 1 if suffix_ids is None else len(suffix_ids)
        input_ids = torch.full((rows, 0 if bos is None else 1), bos or 0)
    for name, ids in (("input_ids", input_ids), ("suffix_ids", suffix_ids)):
        if ids is not None and (ids.dim() != 2 or len(ids) == 0 or len(ids) != len(input_ids)):
            raise ValueError(
                f"{name} has shape {tuple(ids.shape)}; give token ids (B, tokens) with at least one row, and as many "
                f"rows of suffix_ids as of input_ids"
            )
    prompt = input_ids.to(device)
    suffix = prompt.new_empty(len(prompt), 0) if suffix_ids is None else suffix_ids.to(device)
    parts = [prompt, suffix]
    real = _real_tokens(parts, attention_mask)
    copies = options.num_return_sequences
    if copies > 1:
        parts, real = ([each.repeat_interleave(copies, dim=0) for each in several] for several in (parts, real))
        prompt, suffix = parts
    for part, kept in zip(parts, real, strict=True):
        check_ids(part[kept], mask_id + 1, f"the mask token {mask_id} included")
    masked = any(bool((part[kept] == mask_id).any()) for part, kept in zip(parts, real, strict=True))
    width = prompt.shape[1]
    lengths = options.max_new_tokens, options.max_length
    count = num_new_tokens(*lengths, width, suffix.shape[1], config.max_position_embeddings, masked)
    blank = torch.full((len(prompt), count), mask_id, device=device)
    given = torch.cat([prompt.long(), blank, suffix.long()], dim=1)
    real_columns = torch.cat([real[0], torch.ones_like(blank, dtype=torch.bool), real[1]], dim=1)
    ids = given.masked_fill(~real_columns, 0)
    position_ids = (real_columns.long().cumsum(1) - 1).clamp(min=0)
    fillable = real_columns & (ids == mask_id)
    return Canvas(ids, real_columns, position_ids, fillable, given, slice(width, width + count))


def _real_tokens(parts: list[Tensor], attention_mask: Tensor | None) -> list[Tensor]:
    """Which tokens of prompt (B, P) and suffix (B, L2) are no padding, bool, from a mask (B, P) or (B, P + L2)."""
    real = [torch.ones_like(part, dtype=torch.bool) for part in parts]
    check_mask("attention_mask", attention_mask)
    if attention_mask is None:
        return real
    (rows, width), suffix_width = parts[0].shape, parts[1].shape[1]
    if tuple(attention_mask.shape) not in ((rows, width), (rows, width + suffix_width)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids has {(rows, width)}; give "
            f"{(rows, width)}" + (f", or {(rows, width + suffix_width)} to cover suffix_ids" if suffix_width else "")
        )
    mask = attention_mask.to(parts[0].device).bool()
    refuse_only_padding(mask[:, :width], WITHOUT_PROMPT)
    return [mask[:, :width], mask[:, width:] if mask.shape[1] > width else real[1]]


def num_new_tokens(
    max_new_tokens: int | None, max_length: int | None, prompt: int, suffix: int, limit: int, masked: bool = False
) -> int:
    """How many tokens to append to a prompt; 0 only if there are masked tokens to fill and max_length asks for it."""
    room = limit - prompt - suffix
    least = 0 if masked else 1
    if max_new_tokens is not None:
        count, name = max_new_tokens, "max_new_tokens"
    elif max_length is not None:
        count, name = max_length - prompt - suffix, "max_length"
        if count < least:
            raise ValueError(
                f"max_length={max_length} leaves no room for new tokens beside a prompt of {prompt} and a "
                f"suffix of {suffix}; use max_length={min(limit, prompt + suffix + DEFAULTS['max_new_tokens'])}"
            )
    else:
        count, name = max(1, min(DEFAULTS["max_new_tokens"], room)), "max_new_tokens"
    if count > room:
        if room < 1:
            advice = f"cut the prompt or the suffix to {limit - 1} tokens together"
        else:
            advice = f"use {name}={room if name == 'max_new_tokens' else limit}"
        raise ValueError(
            f"a prompt of {prompt}, {count} new tokens and a suffix of {suffix} are {prompt + count + suffix} tokens, "
            f"but max_position_embeddings={limit}; {advice}"
        )
    return count


class DenoisingProcess:
    """Fills a canvas: passes of the network over the rows that are not done, each revealing something of every row.

    A subclass sets `passes_left` (B), how many passes each row takes, and says in `run_pass` what one reveals.
    """

    def __init__(self, model: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        self.model, self.options, self.canvas = model, options, canvas
        self.processors = LogitsProcessorList(processors if isinstance(processors, (list, tuple)) else [processors])
        self.num_forward = [0] * len(canvas.ids)
        self.passes_left = [0] * len(canvas.ids)
        self.seconds, self._last = {"network": 0.0, "sampling": 0.0}, time.perf_counter()
        self.stream = DraftStream(None, canvas)

    def run(self, criteria: Any, stream: "DraftStream") -> None:
        """Pass after pass over the rows that have one left, until none has."""
        criteria = StoppingCriteriaList(criteria if isinstance(criteria, (list, tuple)) else [criteria])
        self.stream = stream
        stream.start(self.canvas.ids, self.digits())
        while rows := [row for row, passes in enumerate(self.passes_left) if passes > 0]:
            self.run_pass(rows)
            for row in rows:
                self.num_forward[row] += 1
                self.passes_left[row] -= 1
            stream.draft(self.canvas.ids, self.digits())
            if self.options.eos_token_id:
                for row in self._decided().nonzero().flatten().tolist():
                    self.passes_left[row] = 0
            if criteria:
                met = torch.as_tensor(criteria(self.canvas.ids.clone(), None)).expand(len(self.passes_left))
                for row in met.nonzero().flatten().tolist():
                    if self.passes_left[row] > 1:
                        self.finish_next(row)
        stream.finish(self.result()[0])

    def run_pass(self, rows: list[int]) -> None:
        """One pass of the network over `rows`, and the reveals that it decides."""
        raise NotImplementedError

    def finish_next(self, row: int) -> None:
        """Let the row's next pass be its last one, and reveal all that is hidden."""
        self.passes_left[row] = 1

    def hidden(self) -> Tensor:
        """Tokens (B, T) bool that are not fully known."""
        return self.canvas.ids == self.model.config.mask_token_id

    def digits(self) -> Tensor:
        """What is known of each token's digits, (B, T, S) int64: a whole token is its only digit."""
        return self.canvas.ids.unsqueeze(2)

    def scores(self, picked: Tensor, target_mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One pass over the rows `picked` (R,): logits (M, V) of the tokens of `target_mask` (R, T) bool, in pieces.

        Yields (numbers within `picked` (M,), columns (M,), logits after the logits processors).
        """
        at, columns = target_mask.nonzero(as_tuple=True)
        for part, logits in self.pieces(self.timed_pass(picked, target_mask), picked[at], columns):
            yield at[part], columns[part], logits

    def shown(self, picked: Tensor) -> Tensor:
        """Tokens (R, T) bool whose logits a streamer gets beside those that the pass decides on; by default none."""
        return torch.zeros_like(self.canvas.real[picked])

    def timed_pass(self, picked: Tensor, target_mask: Tensor) -> Tensor:
        """`hidden_states`, its time taken; a streamer that takes logits gets those of `shown`, of the same pass."""
        seen = target_mask | self.shown(picked) if self.stream.takes_logits else target_mask
        self._last = time.perf_counter()
        hidden_states = self.hidden_states(picked, seen)
        self._tick("network")
        if not self.stream.takes_logits:
            return hidden_states
        at, columns = seen.nonzero(as_tuple=True)
        wanted = target_mask[at, columns]
        for _ in self.pieces(hidden_states[~wanted], picked[at[~wanted]], columns[~wanted], processed=False):
            pass  # `pieces` gives them to the streamer
        return hidden_states[wanted]

    def pieces(
        self, hidden_states: Tensor, rows: Tensor, columns: Tensor, processed: bool = True
    ) -> Iterator[tuple[slice, Tensor]]:
        """Logits at rows and columns (M,) from their hidden states (M, D), in pieces that fit in memory.

        Yields (which of the M, logits (m, V) after the logits processors, if `processed`).
        """
        context = None
        if self.processors and processed:
            picked, index = rows.unique(return_inverse=True)
            context = self._known_ids(picked)[index]
        chunk = max(1, DRAW_ELEMENTS // self.model.config.vocab_size)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            given = None if context is None else context[part]
            logits = self.logits(hidden_states[part], rows[part], columns[part], given)
            self.stream.logits(columns[part], logits)
            yield part, logits
            self._tick("sampling")

    def hidden_states(self, picked: Tensor, target_mask: Tensor) -> Tensor:
        """One pass of the network over the rows `picked` (R,): (M, D), of the tokens of `target_mask` (R, T) bool."""
        raise NotImplementedError

    def logits(self, hidden_states: Tensor, rows: Tensor, columns: Tensor, context: Tensor | None) -> Tensor:
        """Logits (M, V) at rows and columns (M,), after the logits processors, which are given `context` (M, T)."""
        logits = self.model.token_logits(hidden_states)
        self._tick("network")
        return logits if context is None else cast(Any, self.processors)(context, logits)

    def padding_mask(self, picked: Tensor) -> Tensor | None:
        """The attention mask of the rows `picked`, (R, T) int64; None where no row has padding."""
        return None if self.canvas.real.all() else self.canvas.real[picked].long()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (M, V) to float64 probabilities (M, V) at the call's temperature and top_p."""
        return to_probabilities(logits, self.options.temperature, self.options.top_p)

    def _known_ids(self, picked: Tensor) -> Tensor:
        """Ids (R, T) for the logits processors: a token not known copies a known neighbour, see `generate`."""
        ids = self.canvas.ids[picked]
        known = self.canvas.real[picked] & (ids != self.model.config.mask_token_id)
        columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        source = columns.masked_fill(~known, -1).cummax(1).values
        first = known.int().argmax(1, keepdim=True)  # 0 where nothing is known
        source = torch.where(source < 0, first, source)
        return ids.gather(1, source).masked_fill(~known.any(1, keepdim=True), 0)

    def _kept(self) -> Tensor:
        """Columns that the result keeps (B, T) bool: all but the new tokens after the first EOS."""
        kept = torch.ones_like(self.canvas.real)
        kept[:, self.canvas.new] = until_eos(self.canvas.ids[:, self.canvas.new], self.options.eos_token_id)
        return kept

    def _decided(self) -> Tensor:
        """Rows (B,) bool whose result no later pass can change: every hidden token comes after an EOS."""
        return ~(self.hidden() & self._kept()).any(1)

    def _tick(self, name: str) -> None:
        """Add the time since the last tick; an accelerator is waited for only when the times are returned."""
        if self.options.return_dict_in_generate and self.canvas.ids.device.type != "cpu":
            torch.accelerator.synchronize(self.canvas.ids.device)
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now

    def result(self) -> tuple[Tensor, Tensor]:
        """Token ids (B, T), padded after EOS, padding of the input as it came; and tokens generated (B,)."""
        canvas, kept = self.canvas, self._kept()
        ids = torch.where(canvas.real, canvas.ids, canvas.given).masked_fill(~kept, self.options.pad_token_id)
        return ids, (canvas.fillable & kept).sum(1)

    def output(self) -> Tensor | PrimeV2GenerationOutput:
        ids, generated = self.result()
        if not self.options.return_dict_in_generate:
            return ids
        num_forward = torch.tensor(self.num_forward)
        per_forward = generated.cpu().double() / num_forward
        return PrimeV2GenerationOutput(
            ids, num_forward, self.seconds["network"], self.seconds["sampling"], per_forward
        )


def until_eos(new: Tensor, eos_token_id: Sequence[int]) -> Tensor:
    """Which of the new tokens (B, N) come before the end of the text or are it, the first EOS token: (B, N) bool."""
    eos = torch.isin(new, torch.tensor(eos_token_id, dtype=torch.long, device=new.device)).long()
    return eos.cumsum(1) - eos == 0


@dataclass
class Blocks:
    """The blocks that `block_length` cuts each row's generated tokens into, filled from left to right.

    of (B, T) int64: the block of each generated token (of the others it means nothing); count (B,) int64; ends (B, N)
    int64: the step at which each block is finished, of `num_steps` spread evenly, at least one a block.
    """

    of: Tensor
    count: Tensor
    ends: Tensor

    @classmethod
    def make(cls, canvas: Canvas, block_length: int | None, num_steps: int) -> "Blocks":
        """The blocks of a canvas; block_length None is one block."""
        lengths = canvas.fillable.sum(1)
        longest = max(1, int(lengths.max()))
        size = min(block_length or longest, longest)
        count = (lengths + size - 1) // size
        numbers = torch.arange(1, max(1, int(count.max())) + 1, device=lengths.device)
        ends = (num_steps * numbers // count.clamp(min=1).unsqueeze(1)).maximum(numbers)
        return cls((canvas.fillable.cumsum(1) - 1).clamp(min=0) // size, count, ends)

    @property
    def starts(self) -> Tensor:
        """The step at which each block begins, (B, N) int64."""
        return torch.cat([torch.zeros_like(self.ends[:, :1]), self.ends[:, :-1]], dim=1)

    @property
    def num_steps(self) -> Tensor:
        """Steps of each row, (B,) int64."""
        return self.ends.gather(1, (self.count.clamp(min=1) - 1).unsqueeze(1)).squeeze(1)


def row_keys(canvas: Canvas, seed: int) -> Tensor:
    """int64 keys (B,): a hash of the seed, the row's ids and how many equal rows precede it; padding has no part."""
    contents = content_keys(canvas)
    ordered, index = contents.sort(stable=True)
    numbers = torch.arange(len(contents), device=contents.device)
    starts = torch.where(ordered.diff(prepend=ordered[:1] - 1) != 0, numbers, 0).cummax(0).values
    occurrence = torch.empty_like(numbers).scatter_(0, index, numbers - starts)
    return hash64(seed, Stream.ROW, contents, occurrence)


def content_keys(canvas: Canvas) -> Tensor:
    """int64 keys (B,): a hash of the row's ids; padding has no part."""
    return hash64(canvas.position_ids, canvas.ids).masked_fill(~canvas.real, 0).sum(1)


class DraftStream:
    """Feeds a streamer, if there is one, with a sequence as it is generated (see `generate`)."""

    def __init__(self, streamer: Any, canvas: Canvas):
        self.streamer = streamer
        self.takes_logits = bool(getattr(streamer, "takes_logits", False))
        if streamer is not None:
            first = int(canvas.fillable[0].int().argmax())
            columns = canvas.real[0].nonzero().squeeze(1)
            self.columns, self.before, self.after = columns, columns[columns < first], columns[columns >= first]

    def start(self, ids: Tensor, digits: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(ids[:, self.before].cpu())
            self._put_states(ids, digits)

    def logits(self, columns: Tensor, logits: Tensor) -> None:
        """Logits (M, V) that a pass gave the tokens at columns (M,)."""
        if self.takes_logits:
            self.streamer.put_logits(torch.searchsorted(self.columns, columns), logits)

    def draft(self, ids: Tensor, digits: Tensor) -> None:
        self._put_states(ids, digits)
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(ids[:, self.after].cpu())

    def finish(self, ids: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(ids[:, self.after].cpu())
            self.streamer.end()

    def _put_states(self, ids: Tensor, digits: Tensor) -> None:
        if hasattr(self.streamer, "put_states"):
            self.streamer.put_states(ids[:, self.columns].cpu(), digits[:, self.columns].cpu())
