"""Sampling: the ancestral reverse process on sub-tokens, run only at the steps at which a sequence reveals something.

For alpha = 1 - t on N uniform steps, a hidden unit (digit, token or stage: `RevealOrder`) is revealed in each of them
with equal probability (MDLM, arXiv:2406.07524, sec. 3; on sub-tokens MDM-Prime, arXiv:2505.18495). So the steps of all
units are drawn first. A step that reveals nothing leaves the state, hence the network's output, as it was: each
sequence runs the network at its own non-empty steps alone, the same distribution with fewer passes.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from .code_table_prime_v2 import check_ids
from .diffusion_prime_v2 import RevealOrder
from .generation_config_prime_v2 import DEFAULTS, PrimeV2GenerationConfig, merge_options
from .random_prime_v2 import hash64, uniforms

DRAW_ELEMENTS = 2**23  # positions x V of float64 that are drawn at once, 64 MiB
_ROW, _REVEAL, _TOKEN = 21, 22, 23  # stream numbers, see diffusion_prime_v2


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


class PrimeV2GenerationMixin:
    """The `generate` of `PrimeV2ForMaskedDiffusion`, with the names of Transformers' own diffusion language model."""

    @torch.no_grad()
    def generate(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        suffix_ids: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: Any | None = None,
        **kwargs: Any,
    ) -> Tensor | PrimeV2GenerationOutput:
        """Token ids (B, T) of prompt + new + suffix, or a `PrimeV2GenerationOutput`.

        input_ids (B, P): prompts. Tokens equal to mask_token_id are filled in where they stand; max_length=P then adds
            no token after them. P = 0: unconditional. None: the same for one row, after the BOS token if there is one.
        attention_mask (B, P), or (B, P + L2) for prompt and suffix: 0 for padding, on any side; padding changes no
            draw and is returned as it came.
        suffix_ids (B, L2): tokens that follow the new ones (infilling); mask tokens are filled in here too.
        generation_config, **kwargs: options, see `PrimeV2GenerationConfig`; a keyword wins, and resets when None.
        logits_processor: called as processor(ids (M, T), scores (M, V)), one row a position to be drawn in this pass,
            after the carry-over filter. `ids` is the position's sequence before the pass, where a token that is not
            fully known (and padding) holds a copy of the nearest known one to its left, else to its right, else 0.
            Tokens that contradict visible digits stay excluded; a partly visible token whose every candidate a
            processor excludes is drawn from the unprocessed scores.
        stopping_criteria: called as criteria(ids (B, T), None) after every pass, mask_token_id where a token is not
            fully known; sequences that meet it are finished by one last pass.
        streamer: gets put(ids before the first generated token), put_draft(the rest, mask_token_id where not fully
            known) after each pass if it has that method, put(the rest), end(). One sequence only.

        New tokens after the first EOS become padding; a sequence stops when nothing that is kept can still change.
        A draw is a function of seed, step, position, the row's ids and how many equal rows precede it: the same in
        every batch, up to the network's rounding. Raises ValueError for bad options, ids, shapes and lengths.
        """
        options = merge_options(self, generation_config, kwargs)
        canvas = make_canvas(self, input_ids, attention_mask, suffix_ids, options)
        if streamer is not None and len(canvas.ids) != 1:
            raise ValueError(
                f"a streamer takes one sequence, but the batch has {len(canvas.ids)}; generate them singly"
            )
        if getattr(streamer, "_takes_logits", False):
            raise ValueError("this streamer wants the logits of drafts, which are not kept; use one that takes ids")
        process = _ReverseProcess(self, options, canvas, logits_processor or [])
        was_training = self.training
        self.eval()
        try:
            process.run(stopping_criteria or [], _DraftStream(streamer, canvas))
        finally:
            self.train(was_training)
        return process.output()

    def adjust_generation_fn(
        self: Any,
        generation_config: GenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: str | None,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by `from_pretrained`: load generation_config.json, if there is one, as the model's options."""
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
        elif pretrained_model_name_or_path is not None:
            try:
                self.generation_config = self.generation_config_class.from_pretrained(
                    pretrained_model_name_or_path, _from_auto=from_auto_class, _from_pipeline=from_pipeline, **kwargs
                )
            except OSError as error:
                # Without the file the defaults stay; a file that is not JSON is an error.
                if isinstance(error.__context__, ValueError):
                    raise


@dataclass
class Canvas:
    """B sequences of prompt + new + suffix, T columns, as far as they are known.

    ids (B, T) int64: V (the mask id) where a token is not fully known; states (B, T, S) int64, base = masked;
    real (B, T) bool, False for padding; position_ids (B, T) int64; fillable (B, T) bool: tokens to be generated;
    given (B, T): ids as they came, for padding; new: the columns of the new tokens.
    """

    ids: Tensor
    states: Tensor
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
    options: PrimeV2GenerationConfig,
) -> Canvas:
    """Lay out prompt + new + suffix on the model's device; ValueError for what does not fit (see `generate`)."""
    config, device = model.config, model.device
    mask_id, bos = config.mask_token_id, options.bos_token_id
    if input_ids is None:
        if attention_mask is not None:
            raise ValueError("attention_mask was given without input_ids, to which it belongs; leave it out")
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
    for part, kept in zip(parts, real, strict=True):
        check_ids(part[kept], mask_id + 1, f"the mask token {mask_id} included")
    masked = any(bool((part[kept] == mask_id).any()) for part, kept in zip(parts, real, strict=True))
    width = prompt.shape[1]
    count = num_new_tokens(options, width, suffix.shape[1], config.max_position_embeddings, masked)
    blank = torch.full((len(prompt), count), mask_id, device=device)
    given = torch.cat([prompt.long(), blank, suffix.long()], dim=1)
    real_columns = torch.cat([real[0], torch.ones_like(blank, dtype=torch.bool), real[1]], dim=1)
    ids = given.masked_fill(~real_columns, 0)
    position_ids = (real_columns.long().cumsum(1) - 1).clamp(min=0)
    fillable = real_columns & (ids == mask_id)
    return Canvas(ids, model.encode(ids), real_columns, position_ids, fillable, given, slice(width, width + count))


def _real_tokens(parts: list[Tensor], attention_mask: Tensor | None) -> list[Tensor]:
    """Which tokens of prompt (B, P) and suffix (B, L2) are no padding, bool, from a mask (B, P) or (B, P + L2)."""
    real = [torch.ones_like(part, dtype=torch.bool) for part in parts]
    if attention_mask is None:
        return real
    (rows, width), suffix_width = parts[0].shape, parts[1].shape[1]
    if tuple(attention_mask.shape) not in ((rows, width), (rows, width + suffix_width)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids has {(rows, width)}; give "
            f"{(rows, width)}" + (f", or {(rows, width + suffix_width)} to cover suffix_ids" if suffix_width else "")
        )
    mask = attention_mask.to(parts[0].device).bool()
    empty = ~mask[:, :width].any(1)
    if width and empty.any():
        raise ValueError(
            f"row {int(empty.nonzero()[0])} of attention_mask is padding alone; drop that row, or generate without a "
            f"prompt by input_ids=None"
        )
    return [mask[:, :width], mask[:, width:] if mask.shape[1] > width else real[1]]


def num_new_tokens(options: PrimeV2GenerationConfig, prompt: int, suffix: int, limit: int, masked: bool) -> int:
    """How many tokens to append to a prompt; 0 only if there are masked tokens to fill and max_length asks for it."""
    room = limit - prompt - suffix
    least = 0 if masked else 1
    if options.max_new_tokens is not None:
        count, name = options.max_new_tokens, "max_new_tokens"
    elif options.max_length is not None:
        count, name = options.max_length - prompt - suffix, "max_length"
        if count < least:
            raise ValueError(
                f"max_length={options.max_length} leaves no room for new tokens beside a prompt of {prompt} and a "
                f"suffix of {suffix}; use max_length={min(limit, prompt + suffix + DEFAULTS['max_new_tokens'])}"
            )
    else:
        count, name = max(1, min(int(DEFAULTS["max_new_tokens"]), room)), "max_new_tokens"
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


@dataclass
class Schedule:
    """When each unit is revealed. A row's pass m is its m-th step that reveals something.

    passes (B, T, U) int64: the pass that reveals the unit, -1 for tokens that are given; steps (B, K) int64: the step
    of each pass; num_passes: passes of each row.
    """

    passes: Tensor
    steps: Tensor
    num_passes: list[int]


def draw_schedule(keys: Tensor, canvas: Canvas, order: RevealOrder, num_steps: int) -> Schedule:
    """Draw the reveal steps, uniform over `num_steps`: row keys (B,) int64 to a Schedule, a pure function of them.

    The stages of a nested token are revealed first to last, so their iid draws are as good as sorted.
    """
    units = torch.arange(order.units_per_token, device=keys.device)
    draws = uniforms(keys[:, None, None], _REVEAL, canvas.position_ids.unsqueeze(-1), units)  # (B, T, U)
    steps = (draws * num_steps).long().clamp(max=num_steps - 1)
    steps = steps.masked_fill(~canvas.fillable.unsqueeze(-1), num_steps).flatten(1)
    ordered, index = steps.sort(1)
    ranks = (ordered.diff(dim=1, prepend=ordered.new_full((len(keys), 1), -1)) != 0).cumsum(1) - 1
    passes = torch.empty_like(steps).scatter_(1, index, ranks).view_as(draws)
    passes = passes.masked_fill(~canvas.fillable.unsqueeze(-1), -1)
    num_passes = (passes.amax((1, 2)) + 1).tolist()
    table = torch.zeros_like(steps).scatter_(1, ranks, ordered)
    return Schedule(passes, table[:, : max(num_passes)], num_passes)


def row_keys(canvas: Canvas, seed: int) -> Tensor:
    """int64 keys (B,): a hash of the seed, the row's ids and how many equal rows precede it; padding has no part."""
    hashes = hash64(canvas.position_ids, canvas.ids).masked_fill(~canvas.real, 0)
    contents = hashes.sum(1)
    ordered, index = contents.sort(stable=True)
    numbers = torch.arange(len(contents), device=contents.device)
    starts = torch.where(ordered.diff(prepend=ordered[:1] - 1) != 0, numbers, 0).cummax(0).values
    occurrence = torch.empty_like(numbers).scatter_(0, index, numbers - starts)
    return hash64(seed, _ROW, contents, occurrence)


class _ReverseProcess:
    """Fills a canvas: passes of the network over the rows that still reveal something, then draws (`generate`)."""

    def __init__(self, model: Any, options: PrimeV2GenerationConfig, canvas: Canvas, processors: Any):
        self.model, self.options, self.canvas = model, options, canvas
        self.processors = LogitsProcessorList(processors if isinstance(processors, (list, tuple)) else [processors])
        self.order = RevealOrder.from_config(model.config)
        self.keys = row_keys(canvas, int(options.seed or 0))
        self.schedule = draw_schedule(self.keys, canvas, self.order, int(options.max_denoising_steps or 1))
        self.num_forward = [0] * len(canvas.ids)
        self.seconds, self._last = {"network": 0.0, "sampling": 0.0}, time.perf_counter()

    def run(self, criteria: Any, stream: "_DraftStream") -> None:
        """Pass m serves the m-th non-empty step of every row that has one; the other rows are done."""
        criteria = StoppingCriteriaList(criteria if isinstance(criteria, (list, tuple)) else [criteria])
        num_passes, number = self.schedule.num_passes, 0
        stream.start()
        while rows := [row for row, passes in enumerate(num_passes) if passes > number]:
            self.run_pass(number, rows)
            for row in rows:
                self.num_forward[row] += 1
            stream.draft(self.canvas.ids)
            if self.options.eos_token_id:
                for row in self._decided(number).nonzero().flatten().tolist():
                    num_passes[row] = min(num_passes[row], number + 1)
            if criteria:
                met = torch.as_tensor(criteria(self.canvas.ids.clone(), None)).expand(len(num_passes))
                for row in met.nonzero().flatten().tolist():
                    num_passes[row] = min(num_passes[row], number + 2)
                    self.schedule.passes[row].clamp_(max=number + 1)
            number += 1
        stream.finish(self.result()[0])

    def run_pass(self, number: int, rows: list[int]) -> None:
        """One pass of the network over `rows`, and the reveals that fall due."""
        canvas = self.canvas
        self._last = time.perf_counter()
        picked = torch.tensor(rows, device=canvas.ids.device)
        mask = None if canvas.real.all() else canvas.real[picked].long()
        hidden_states = self.model.model(
            canvas.states[picked], attention_mask=mask, position_ids=canvas.position_ids[picked]
        ).last_hidden_state
        at, columns = (self.schedule.passes[picked] == number).any(-1).nonzero(as_tuple=True)
        hidden_states = hidden_states[at, columns]  # (M, D)
        self._tick("network")
        known = self._known_ids(picked) if self.processors else None
        chunk = max(1, DRAW_ELEMENTS // self.model.config.vocab_size)
        for start in range(0, len(at), chunk):
            part = slice(start, start + chunk)
            context = None if known is None else known[at[part]]
            self._reveal(number, hidden_states[part], picked[at[part]], columns[part], context)

    def _reveal(self, number: int, hidden_states: Tensor, rows: Tensor, columns: Tensor, context: Any) -> None:
        """Draw x_i ~ q_i for the positions (rows, columns) (M,) and reveal the digits that fall due in this pass."""
        canvas, table, passes = self.canvas, self.model.code_table, self.schedule.passes[rows, columns]  # (M, U)
        states = canvas.states[rows, columns]  # (M, S)
        logits = self.model.filtered_logits(hidden_states, states)  # (M, V)
        self._tick("network")
        if context is not None or not self.model.config.carry_over:
            logits = _process(logits, table.consistent(states), self.processors, context, table.base, states)
        probabilities = to_probabilities(logits, self.options.temperature or 1.0, self.options.top_p or 1.0)
        draws = uniforms(
            self.keys[rows], _TOKEN, canvas.position_ids[rows, columns], self.schedule.steps[rows, number]
        )
        ids = draw_by_inverse_cdf(probabilities, draws)
        due = self.order.visible_digits(passes > number) & (states == table.base)
        canvas.states[rows, columns] = torch.where(due, table.codes[ids], states)
        whole = (passes <= number).all(-1)
        canvas.ids[rows, columns] = torch.where(whole, ids, self.model.config.mask_token_id)
        self._tick("sampling")

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
        if self.options.eos_token_id:
            new = self.canvas.ids[:, self.canvas.new]
            eos = torch.isin(new, torch.tensor(self.options.eos_token_id, device=new.device)).long()
            kept[:, self.canvas.new] = eos.cumsum(1) - eos == 0
        return kept

    def _decided(self, number: int) -> Tensor:
        """Rows (B,) bool whose result no later pass can change: every hidden token comes after an EOS."""
        hidden = (self.schedule.passes > number).any(-1)
        return ~(hidden & self._kept()).any(1)

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
        ids = torch.where(canvas.real, canvas.ids, canvas.given).masked_fill(~kept, self.options.pad_token_id or 0)
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


def _process(
    logits: Tensor,
    consistent: Tensor,
    processors: Any,
    context: Tensor | None,
    base: int,
    states: Tensor,
) -> Tensor:
    """Carry-over filter and logits processors: (M, V) to (M, V); what they exclude is -inf (see `generate`)."""
    logits = logits.masked_fill(~consistent, -torch.inf)
    if context is None:
        return logits
    scores = processors(context, logits.clone()).masked_fill(~consistent, -torch.inf)
    overruled = (scores == -torch.inf).all(1) & (states != base).any(1)
    return torch.where(overruled.unsqueeze(1), logits, scores)


def to_probabilities(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Logits (M, V) to float64 probabilities (M, V): temperature, softmax, then the smallest set of mass >= top_p.

    What is left after top_p is not normalised again. ValueError where no token is possible.
    """
    logits = logits.double()
    # The largest first becomes 0, so that no temperature overflows.
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if not probabilities.isfinite().all():
        raise ValueError(
            "a position has no possible token: the network's logits are not finite, or the logits processors exclude "
            "every token; check the weights and the processors"
        )
    if top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), 0.0)
    return probabilities


def draw_by_inverse_cdf(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Token ids (M,): the first whose cumulative probability exceeds draw x total.

    probabilities (M, V) float64, not necessarily normalised; draws (M,) float64 in (0, 1). Rounding of the cumulative
    sum, which on accelerators need not rise, can point at a token of probability 0: the likeliest replaces it.
    """
    cumulative = probabilities.cumsum(-1)
    ids = torch.searchsorted(cumulative, draws.unsqueeze(-1) * cumulative[:, -1:], right=True)
    ids = ids.clamp(max=probabilities.shape[-1] - 1)
    possible = probabilities.gather(-1, ids) > 0
    return torch.where(possible, ids, probabilities.argmax(-1, keepdim=True)).squeeze(-1)


class _DraftStream:
    """Feeds a streamer, if there is one: what precedes the first generated token, drafts of the rest, the rest."""

    def __init__(self, streamer: Any, canvas: Canvas):
        self.streamer = streamer
        if streamer is not None:
            first = int(canvas.fillable[0].int().argmax())
            columns = canvas.real[0].nonzero().squeeze(1)
            self.before, self.after = columns[columns < first], columns[columns >= first]
            self.prompt = canvas.ids[:, self.before].cpu()

    def start(self) -> None:
        if self.streamer is not None:
            self.streamer.put(self.prompt)

    def draft(self, ids: Tensor) -> None:
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(ids[:, self.after].cpu())

    def finish(self, ids: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(ids[:, self.after].cpu())
            self.streamer.end()


__all__ = ["PrimeV2GenerationConfig", "PrimeV2GenerationMixin", "PrimeV2GenerationOutput"]
