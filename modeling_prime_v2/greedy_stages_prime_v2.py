"""`greedy_matches` of a model that reveals its stages in phases: the deterministic decode, compared stage by stage."""

from typing import Any

import torch
from torch import Tensor

from .generation_config_prime_v2 import GenerationOptions
from .generation_process_prime_v2 import Canvas, DraftStream
from .generation_rules_prime_v2 import RuleProcess
from .samplers_prime_v2 import ConfidenceSamplerConfig


class ComparedStages(RuleProcess):
    """The decode of texts `truth` (B, T) int64; a row ends with its first wrong stage. right (B,) bool."""

    truth: Tensor
    right: Tensor

    def values(self, rows: Tensor, columns: Tensor, logits: Tensor, steps: Tensor, digits: Tensor) -> Tensor:
        ids, codes = super().values(rows, columns, logits, steps, digits), self.model.code_table.codes
        wrong = ((codes[ids] != codes[self.truth[rows, columns]]) & digits).any(-1)
        self.right[rows[wrong]] = False
        return ids

    def run_pass(self, rows: list[int]) -> None:
        super().run_pass(rows)
        for row in rows:
            if not self.right[row]:
                self.passes_left[row] = 1  # the one that has just run


def greedy_stages(model: Any, ids: Tensor, hidden: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the decode of one unit a pass writes the hidden tokens of R rows, (R,) bool, and its passes (R,) int64.

    ids (R, L) of the texts; hidden, real (R, L) bool: tokens to be decoded, and tokens that are no padding.
    """
    sampler = ConfidenceSamplerConfig(unit="stage")
    num_steps = ids.shape[1] * len(model.config.stage_digits)
    options = GenerationOptions(max_denoising_steps=num_steps, sampler_config=sampler, do_sample=False)
    shown = ids.masked_fill(hidden, model.config.mask_token_id)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    canvas = Canvas(shown.clone(), real, positions, hidden, shown, slice(0, 0))
    process = ComparedStages(model, options, canvas, [])
    process.truth, process.right = ids, torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    process.run([], DraftStream(None, canvas))
    return process.right, torch.tensor(process.num_forward)
