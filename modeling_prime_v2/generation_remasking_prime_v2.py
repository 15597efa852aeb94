"""`generate` with remasking: units that were revealed are hidden again and drawn anew (ReMDM, arXiv:2503.00307).

On N uniform steps from t to s, with alpha = 1 - t, a revealed unit is hidden again with probability
    sigma = min(eta, (1 - alpha_s) / alpha_t)   where t_off < t <= t_on, else 0
and a hidden one is revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), so that each is hidden
with probability 1 - alpha_s after the step, as without remasking (eq. 7). Which units are hidden when does not depend
on their values: steps that reveal nothing need no pass. In one that does the network reads what the step hides again,
too: its prediction is that of the state before the step. A text can be reached on many paths, which hide other tokens
in between, so this sampler's law is no product: `log_likelihood(method="sampler")` refuses it.
"""

from typing import Any

import torch
from torch import Tensor

from .diffusion_prime_v2 import RevealOrder
from .generation_config_prime_v2 import GenerationOptions
from .generation_masked_prime_v2 import MaskedProcess
from .generation_process_prime_v2 import Canvas
from .random_prime_v2 import Stream, uniforms


class RemaskingProcess(MaskedProcess):
    """Steps of the reverse process with remasking, over the units of the config's `reveal_order`."""

    def __init__(self, model: Any, options: GenerationOptions, canvas: Canvas, processors: Any):
        super().__init__(model, options, canvas, processors)
        self.order = RevealOrder.from_config(model.config)
        shape = (*canvas.fillable.shape, self.order.units_per_token)
        self.hidden_units = canvas.fillable.unsqueeze(-1).expand(shape).clone()
        self.num_steps = self.blocks.num_steps
        self.step = torch.zeros_like(self.num_steps)
        self.pending = torch.zeros_like(self.hidden_units)  # what the next pass of each row reveals
        self.hiding = torch.zeros_like(self.hidden_units)  # what is hidden again behind it
        self._advance(list(range(len(canvas.ids))))
        self.passes_left = (self.num_steps * self.pending.flatten(1).any(1)).tolist()

    def run_pass(self, rows: list[int]) -> None:
        picked = torch.tensor(rows, device=self.canvas.ids.device)
        for at, columns, logits in self.scores(picked, self.pending[picked].any(-1)):
            rows_of = picked[at]
            hidden = self.hidden_units[rows_of, columns] & ~self.hiding[rows_of, columns]
            digits = self.order.visible_digits(hidden)
            self.reveal(rows_of, columns, logits, self.step[rows_of], digits)
        self._advance(rows)

    def finish_next(self, row: int) -> None:
        super().finish_next(row)
        self.pending[row] |= self.hidden_units[row] & ~self.hiding[row]
        self.hidden_units[row] = self.hiding[row] = False
        self.step[row] = self.num_steps[row]

    def _advance(self, rows: list[int]) -> None:
        """Take each row to its next step that reveals something, hiding on the way, or to its end."""
        waiting = torch.tensor(rows, device=self.canvas.ids.device)
        self.pending[waiting] = self.hiding[waiting] = False
        while len(waiting):
            ended = self.step[waiting] >= self.num_steps[waiting]
            for row in waiting[ended].tolist():
                self.passes_left[row] = 1  # the pass that has just run
            waiting = waiting[~ended]
            hide, reveal = self._changes(waiting)
            self.step[waiting] += 1
            self.hidden_units[waiting] = (self.hidden_units[waiting] & ~reveal) | hide
            self.pending[waiting] = reveal
            needs_pass = reveal.flatten(1).any(1)
            self.hiding[waiting] = hide & needs_pass[:, None, None]
            self._hide(waiting)
            waiting = waiting[~needs_pass]

    def _changes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Units (R, T, U) bool that are hidden again, and that are revealed, in the next step of each row."""
        canvas, sampler = self.canvas, self.options.sampler_config
        present, before, after = self._step_of(rows)
        inside = (1 - before > sampler.t_off) & (1 - before <= sampler.t_on)
        sigma = torch.where(inside, ((1 - after) / before.clamp(min=1e-12)).clamp(max=sampler.eta), 0.0)
        reveal_share = torch.where(after >= 1, 1.0, (after - (1 - sigma) * before) / (1 - before).clamp(min=1e-12))
        units = torch.arange(self.order.units_per_token, device=rows.device)
        draws = uniforms(
            self.keys[rows].view(-1, 1, 1),
            Stream.REMASKING,
            canvas.position_ids[rows].unsqueeze(-1),
            units,
            self.step[rows].view(-1, 1, 1),
        )
        hidden = self.hidden_units[rows]
        eligible = present.unsqueeze(-1)
        return eligible & ~hidden & (draws < sigma), eligible & hidden & (draws < reveal_share)

    def _step_of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's next step: the tokens (R, T) bool of the block that it fills, alpha_t and alpha_s (R, 1, 1)."""
        blocks, step = self.blocks, self.step[rows].unsqueeze(1)
        number = (step >= blocks.ends[rows]).sum(1, keepdim=True).clamp(max=blocks.ends.shape[1] - 1)
        start, end = (each[rows].gather(1, number) for each in (blocks.starts, blocks.ends))
        alphas = ((each - start).double() / (end - start) for each in (step, step + 1))
        before, after = (each.unsqueeze(-1) for each in alphas)
        return self.canvas.fillable[rows] & (blocks.of[rows] == number), before, after

    def _decided(self) -> Tensor:
        """No token that the result keeps is hidden, nor can be hidden again in what is left of its block."""
        present, alpha_t, _ = self._step_of(torch.arange(len(self.canvas.ids), device=self.canvas.ids.device))
        remasked = present & (1 - alpha_t.squeeze(-1) > self.options.sampler_config.t_off) | self.hiding.any(-1)
        return super()._decided() & ~(remasked & self._kept()).any(1)

    def _hide(self, rows: Tensor) -> None:
        """Mask what is hidden in the states of the fillable tokens, before the network reads them."""
        canvas, base = self.canvas, self.model.code_table.base
        hidden = self.hidden_units[rows] & ~self.hiding[rows] | self.pending[rows]
        visible = self.order.visible_digits(hidden) | ~canvas.fillable[rows].unsqueeze(-1)
        states = torch.where(visible, self.states[rows], base)
        self.states[rows] = states
        unknown = (states == base).any(-1) & canvas.fillable[rows]
        canvas.ids[rows] = canvas.ids[rows].masked_fill(unknown, self.model.config.mask_token_id)
