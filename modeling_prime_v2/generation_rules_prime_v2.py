"""`generate` with a rule: each pass scores the hidden units, reveals the best ones, and draws their values.

The rules are in `samplers_prime_v2`. A row goes through *phases*: its blocks from left to right and, for unit="stage",
the stages of each block. A phase has its share of the passes and reveals nothing of later phases. The file
likelihood_sampler_prime_v2.py runs the same passes over a given text and adds up what the sampler would have given it.
"""

from typing import Any

import torch
from torch import Tensor

from .generation_config_prime_v2 import GenerationOptions
from .generation_draws_prime_v2 import NO_TOKEN
from .generation_masked_prime_v2 import MaskedProcess
from .generation_process_prime_v2 import Blocks, Canvas
from .samplers_prime_v2 import RuleSamplerConfig, Units, choose


class RuleProcess(MaskedProcess):
    """Passes of a rule over a canvas; do_sample=False takes the likeliest value in place of a drawn one."""

    def __init__(
        self,
        model: Any,
        options: GenerationOptions,
        canvas: Canvas,
        processors: Any,
        keys: Tensor | None = None,
    ):
        super().__init__(model, options, canvas, processors, keys)
        self.sampler: RuleSamplerConfig = options.sampler_config
        self.units = Units(self.sampler.unit, model.code_table, tuple(model.config.stage_digits or ()))
        self.budget = phases(canvas, self.blocks, self.units, options)
        self.passes_left = self.budget.sum(1).tolist()
        self.used = torch.zeros_like(self.budget)
        self.finishing = torch.zeros(len(canvas.ids), dtype=torch.bool, device=canvas.ids.device)

    def run_pass(self, rows: list[int]) -> None:
        units = self.units
        picked = torch.tensor(rows, device=self.canvas.ids.device)
        tokens, quota = self._eligible(picked)
        hidden_states = self.timed_pass(picked, tokens)
        scores, processed = self._score(picked, tokens, hidden_states)
        eligible = units.hidden(self.states[picked]) & tokens.unsqueeze(-1)
        scores, sizes = scores.flatten(1, 2).unbind(-1)
        chosen = choose(self.sampler, scores, eligible.flatten(1), quota, sizes).view_as(eligible)
        at, columns = tokens.nonzero(as_tuple=True)
        wanted = chosen.any(-1)[at, columns]
        at, columns = at[wanted], columns[wanted]
        pieces: Any = self.pieces(hidden_states[wanted], picked[at], columns)
        if processed is not None:
            pieces = [(slice(0, len(at)), processed[wanted])]
        steps = torch.full_like(at, self.num_forward[rows[0]])  # rows that are not done have had as many passes
        for part, logits in pieces:
            where = picked[at[part]], columns[part]
            digits = units.digits(chosen[at[part], columns[part]], self.states[where])
            self.reveal(*where, logits, steps[part], digits | self.finishing[where[0]].unsqueeze(-1))
        for row in picked[~self.hidden()[picked].any(1)].tolist():
            self.passes_left[row] = 1  # the one that has just run
        self._tick("sampling")

    def _score(self, picked: Tensor, tokens: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """`confidence` (R, T, U, 2) float64 of the units of `tokens` (R, T), and the logits (M, V) that it is of.

        The logits are kept only where logits processors made them: those are called once a pass.
        """
        at, columns = tokens.nonzero(as_tuple=True)
        scores = torch.zeros(*tokens.shape, self.units.per_token, 2, dtype=torch.double, device=at.device)
        kept = []
        for part, logits in self.pieces(hidden_states, picked[at], columns):
            states = self.states[picked[at[part]], columns[part]]
            found = self.units.scores(logits, states, self.sampler.score).double()
            if not found[self.units.hidden(states)].isfinite().all():
                raise ValueError(NO_TOKEN)
            scores[at[part], columns[part]] = found
            if self.processors:
                kept.append(logits)
        return scores, torch.cat(kept) if kept else None

    def finish_next(self, row: int) -> None:
        super().finish_next(row)
        self.finishing[row] = True

    def _eligible(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (R, T) bool of each row's present phase, and how many of their units this pass must reveal (R,)."""
        hidden = self.hidden()[picked]
        stages = self.units.stages_visible(self.states[picked])
        num_stages = max(1, len(self.units.stage_ends))
        phase = (self.blocks.of[picked] * num_stages + stages).masked_fill(~hidden, self.budget.shape[1])
        present = phase.amin(1).clamp(max=self.budget.shape[1] - 1)
        finishing = self.finishing[picked]
        tokens = hidden & ((phase == present.unsqueeze(1)) | finishing.unsqueeze(1))
        left = self.budget[picked, present] - self.used[picked, present]
        self.used[picked, present] += 1
        count = (self.units.hidden(self.states[picked]) & tokens.unsqueeze(-1)).sum((1, 2))
        return tokens, torch.where(finishing, count, (count + left - 1) // left.clamp(min=1))

    def values(self, rows: Tensor, columns: Tensor, logits: Tensor, steps: Tensor, digits: Tensor) -> Tensor:
        if not self.options.do_sample:
            return logits.argmax(-1)
        return super().values(rows, columns, logits, steps, digits)


def phases(canvas: Canvas, blocks: Blocks, units: Units, options: GenerationOptions) -> Tensor:
    """The passes of each phase, (B, blocks x stages) int64.

    The passes of a row, at most one a unit, are spread evenly over its blocks, and over the stages of each by
    `stage_passes`; every phase that has something to reveal gets at least one.
    """
    steps = options.max_denoising_steps
    num_blocks, num_stages = blocks.ends.shape[1], max(1, len(units.stage_ends))
    shares = torch.tensor(options.sampler_config.stage_passes or (1.0,) * num_stages, dtype=torch.double)
    shares = (shares / shares.sum()).repeat(num_blocks).to(canvas.ids.device)  # (blocks * J,)
    ends = (shares.cumsum(0) * steps / blocks.count.clamp(min=1).unsqueeze(1) + 1e-9).long()  # rounding of the sum
    budget = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1])).clamp(min=1)
    tokens = torch.zeros_like(blocks.ends).scatter_add_(1, blocks.of, canvas.fillable.long())
    return budget.minimum((tokens * units.per_token).repeat_interleave(num_stages, dim=1))
