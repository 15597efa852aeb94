"""`generate` of masked diffusion, and its default sampler: the ancestral reverse process on sub-tokens.

For alpha = 1 - t on N uniform steps, a hidden unit (digit, token or stage: `RevealOrder`) is revealed in each of them
with equal probability (MDLM, arXiv:2406.07524, sec. 3; on sub-tokens MDM-Prime, arXiv:2505.18495). So the steps of all
units are drawn first. A step that reveals nothing leaves the state, hence the network's output, as it was: each
sequence runs the network only at its own non-empty steps, the same distribution with fewer passes.

The other samplers are in generation_rules_ (confidence, threshold and entropy bound; do_sample=False, the
deterministic decode, is the confidence sampler with the likeliest values) and generation_remasking_.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .backbone_prime_v2 import evaluating
from .diffusion_prime_v2 import RevealOrder
from .generation_config_prime_v2 import GenerationOptions, merge_options
from .generation_masked_prime_v2 import MaskedProcess
from .generation_process_prime_v2 import Blocks, Canvas, DraftStream, PrimeV2GenerationOutput, make_canvas
from .generation_remasking_prime_v2 import RemaskingProcess
from .generation_rules_prime_v2 import RuleProcess
from .greedy_matches_prime_v2 import PrimeV2GreedyMixin, most_confident, propose
from .greedy_stages_prime_v2 import greedy_stages
from .random_prime_v2 import Stream, uniforms
from .validation_inputs_prime_v2 import as_tensor, token_inputs


class PrimeV2GenerationMixin(PrimeV2GreedyMixin):
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

        input_ids (B, P): prompts, in any form of `token_inputs`. Tokens equal to mask_token_id are filled in where
            they stand; max_length=P then adds no token after them. P = 0: unconditional. None: the same for one row,
            after the BOS token if there is one.
        attention_mask (B, P), or (B, P + L2) for prompt and suffix: 0 for padding, on any side; padding changes no
            draw and is returned as it came.
        suffix_ids (B, L2): tokens that follow the new ones (infilling); mask tokens are filled in here too.
        generation_config, **kwargs: options, see `PrimeV2GenerationConfig`; a keyword wins, and resets when None.
        logits_processor: called as processor(ids (M, T), scores (M, V)), one row a position to be drawn in this pass
            (do_sample=False: a row for every hidden token), after the carry-over filter. `ids` is the position's
            sequence before the pass, where a token that is not fully known (and padding) holds a copy of the nearest
            known one to its left, else to its right, else 0. Tokens that contradict visible digits stay excluded; a
            partly visible token whose every candidate a processor excludes is drawn from the unprocessed scores.
        stopping_criteria: called as criteria(ids (B, T), None) after every pass, mask_token_id where a token is not
            fully known; sequences that meet it are finished by one last pass.
        streamer: gets put(ids before the first generated token), put_draft(the rest, mask_token_id where not fully
            known) after each pass if it has that method, put(the rest), end(). One sequence only. If it has the method
            put_states, also put_states(ids (1, T), digits (1, T, S), base where hidden) of the whole sequence without
            padding, before the first pass and after each. Where its attribute takes_logits is true, each pass also
            calls put_logits(places (M,) in that sequence, logits (M, V) after carry-over, before temperature and
            top_p) before put_states, in pieces: of what the pass scores and, of masked diffusion without a cache, of
            all hidden tokens.

        New tokens after the first EOS become padding; a sequence stops when nothing that is kept can still change.
        A draw is a function of seed, step, position, the row's ids and how many equal rows precede it, and with
        do_sample=False there is none: the same in every batch, up to the network's rounding.
        Raises ValueError for bad options, ids, shapes and lengths.
        """
        options = merge_options(self, generation_config, kwargs)
        input_ids, attention_mask = token_inputs(self, input_ids, attention_mask)
        suffix_ids = as_tensor(self, "suffix_ids", suffix_ids)
        canvas = make_canvas(self, input_ids, attention_mask, suffix_ids, options)
        if streamer is not None and len(canvas.ids) != 1:
            raise ValueError(
                f"a streamer takes one sequence, but the batch has {len(canvas.ids)}; generate them singly"
            )
        if getattr(streamer, "_takes_logits", False):
            raise ValueError("this streamer wants the logits of drafts, which are not kept; use one that takes ids")
        process = self.denoising_process(options, canvas, logits_processor or [])
        with evaluating(self):
            process.run(stopping_criteria or [], DraftStream(streamer, canvas))
        return process.output()

    def denoising_process(self: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        """What `generate` runs."""
        kinds = {"ancestral": AncestralProcess, "rule": RuleProcess, "remasking": RemaskingProcess}
        return kinds[options.sampler_kind](self, options, canvas, processors)

    def reveal_targets(self: Any, ids: Tensor, hidden: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Any]:
        """The most confident target of each row: whether it is right, which it is, and its one pass.

        Where stages are revealed in phases, all targets, and as many passes as they took.
        """
        if self.config.reveal_order == "coarse_first":
            right, passes = greedy_stages(self, ids, hidden, real)
            return right, hidden, passes
        states = self.encode(ids.masked_fill(hidden, self.config.mask_token_id))
        hidden_states = self.model(states, attention_mask=None if real.all() else real.long()).last_hidden_state
        proposed, confidence = torch.zeros_like(ids), torch.full_like(ids, -1.0, dtype=torch.double)
        proposed[hidden], confidence[hidden] = propose(self, hidden_states[hidden], states[hidden])
        chosen = most_confident(confidence, torch.ones_like(ids[:, 0]))
        return (ids == proposed)[chosen], chosen, 1

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Not called by `generate`, which has a canvas; peft's wrapper of causal models (CAUSAL_LM) asks for it."""
        raise NotImplementedError("a diffusion model has no inputs of one next token; call generate")

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
class Schedule:
    """When each unit is revealed. A row's pass m is its m-th step that reveals something.

    passes (B, T, U) int64: the pass that reveals the unit, -1 for tokens that are given; steps (B, K) int64: the step
    of each pass; num_passes: passes of each row.
    """

    passes: Tensor
    steps: Tensor
    num_passes: list[int]


def draw_schedule(
    keys: Tensor, canvas: Canvas, order: RevealOrder, blocks: Blocks, shares: tuple[float, ...] | None = None
) -> Schedule:
    """Draw the reveal steps, uniform over those of the block: row keys (B,) int64 to a Schedule, a function of them.

    Stages have their own steps of the block (`stage_steps`). Those of a token are revealed first to last, so their
    independent draws are as good as sorted.
    """
    units = torch.arange(order.units_per_token, device=keys.device)
    draws = uniforms(keys[:, None, None], Stream.REVEAL, canvas.position_ids.unsqueeze(-1), units)  # (B, T, U)
    starts, ends = (each.gather(1, blocks.of).unsqueeze(-1) for each in (blocks.starts, blocks.ends))
    first, last = stage_steps(order, ends - starts, shares)
    steps = (starts + (first + draws * (last - first)).long()).minimum(ends - 1)
    steps = steps.masked_fill(~canvas.fillable.unsqueeze(-1), int(blocks.ends.max())).flatten(1)
    ordered, index = steps.sort(1)
    ranks = (ordered.diff(dim=1, prepend=ordered.new_full((len(keys), 1), -1)) != 0).cumsum(1) - 1
    passes = torch.empty_like(steps).scatter_(1, index, ranks).view_as(draws)
    passes = passes.masked_fill(~canvas.fillable.unsqueeze(-1), -1)
    num_passes = (passes.amax((1, 2)) + 1).tolist()
    table = torch.zeros_like(steps).scatter_(1, ranks, ordered)
    return Schedule(passes, table[:, : max(num_passes)], num_passes)


def stage_steps(
    order: RevealOrder, num_steps: Tensor, shares: tuple[float, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Where the steps of each unit begin and end among `num_steps` (..., 1) int64 of a block, (..., U) float64.

    Coarse-first: the stages' shares (by default equal ones), rounded so that each stage has a step of its own where
    there are enough; with fewer steps than stages the later ones share the last step. Others: the unit's window.
    """
    units, device = order.units_per_token, num_steps.device
    if order.kind != "coarse_first":
        windows = torch.tensor(order.stage_windows or [(0, 1)] * units, dtype=torch.double, device=device)
        return windows[:, 0] * num_steps, windows[:, 1] * num_steps
    given = torch.tensor(shares or (1.0,) * units, dtype=torch.double, device=device)
    upto, numbers = given.cumsum(0) / given.sum(), torch.arange(1, units + 1, device=device)
    ends = (upto * num_steps + 1e-9).floor().maximum(numbers)  # rounding of the sum
    ends = ends.minimum((num_steps - units + numbers).clamp(min=1))
    return torch.cat([torch.zeros_like(ends[..., :1]), ends[..., :-1]], dim=-1), ends


class AncestralProcess(MaskedProcess):
    """Sampling: pass m serves the m-th non-empty step of every row that has one (`generate`)."""

    def __init__(
        self, model: Any, options: GenerationOptions, canvas: Canvas, processors: Any, keys: Tensor | None = None
    ):
        super().__init__(model, options, canvas, processors, keys)
        self.order = RevealOrder.from_config(model.config)
        shares = getattr(options.sampler_config, "stage_passes", None)
        self.schedule = draw_schedule(self.keys, canvas, self.order, self.blocks, shares)
        self.passes_left = list(self.schedule.num_passes)

    def run_pass(self, rows: list[int]) -> None:
        picked = torch.tensor(rows, device=self.canvas.ids.device)
        number = self.num_forward[rows[0]]  # the same for all rows that are not done
        target_mask = (self.schedule.passes[picked] == number).any(-1)
        for at, columns, logits in self.scores(picked, target_mask):
            rows_of = picked[at]
            digits = self.order.visible_digits(self.schedule.passes[rows_of, columns] > number)
            self.reveal(rows_of, columns, logits, self.schedule.steps[rows_of, number], digits)

    def finish_next(self, row: int) -> None:
        super().finish_next(row)
        self.schedule.passes[row].clamp_(max=self.num_forward[row])
