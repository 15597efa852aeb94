"""The published zero-shot score, only for reproduction: Monte Carlo of the paper's loss, one request at a time.

Described by the authors' evaluation script (chen-hao-chao/mdm-prime-v2, lit_gpt/evaluate_prime.py, commit e491c9b):
time form with weight 1/(t + 1e-6), t spread evenly over each batch of 32 draws, classifier-free guidance against a
masked context, a temperature that falls with t, and masks shared by runs of digits. It is no bound on -log p, and the
settings of each task were tuned on its test set (`eval/tasks/published_settings.yaml`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from prime_v2.likelihood_rows_prime_v2 import sequence_key
from prime_v2.linear_prime_v2 import apply_head
from prime_v2.random_prime_v2 import Stream, hash64, uniforms
from prime_v2.validation_inputs_prime_v2 import checked_seed, whole_number

ROWS_PER_BATCH = 32
WEIGHT_OFFSET = 1e-6
SETTINGS_FILE = Path(__file__).with_name("tasks") / "published_settings.yaml"


@dataclass(frozen=True)
class PublishedSettings:
    """cfg: guidance strength w, logits = masked + (1 + w)(given - masked), 0 for none. temperature: at t = 0, rising
    to 1 at t = 1. mask_unit: see `mask_unit_schedule`."""

    num_samples: int = 256
    cfg: float = 0.0
    temperature: float = 1.0
    mask_unit: str | int = 1
    seed: int = 0

    def __post_init__(self):
        whole_number("num_samples", self.num_samples, 1, use=256)
        checked_seed(self.seed)
        if not self.cfg >= 0:
            raise ValueError(f"cfg={self.cfg} must be 0 (off) or positive; use 0.5")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; use 1.0")


def mask_unit_schedule(mask_unit: str | int, num_subtokens: int) -> tuple[list[float], list[int]]:
    """(Boundaries of t, digits that share a mask between them); the published `chunk`.

    "1": each digit on its own; "S": the digits of a token together; a number of digits; or a schedule
    "0.0_0.5/1_S": units of 1 digit for t <= 0.5, of a token above. Raises ValueError for anything else.
    """
    text = str(mask_unit)
    points, _, sizes = text.rpartition("/")
    try:
        starts = [float(each) for each in (points or "0.0").split("_")]
        digits = [num_subtokens if each == "S" else int(each) for each in sizes.split("_")]
    except ValueError:
        starts, digits = [], []
    rising = all(first < second for first, second in zip(starts, starts[1:], strict=False))
    if not starts or len(starts) != len(digits) or min(digits) < 1 or starts[0] != 0 or not rising or starts[-1] >= 1:
        raise ValueError(
            f"mask_unit={text!r} is not 1, S, a number of digits, or a schedule of t such as 0.0_0.5/1_S "
            f"(starts of t from 0.0 rising below 1, digits)"
        )
    return starts[1:], digits


@torch.no_grad()
def published_score(model: Any, ids: Tensor, num_context: int, settings: PublishedSettings) -> Tensor:
    """Draws (K,) float64 of the published score in nats; its mean stands for log p(continuation) and is no bound.

    ids (L,) clean, the first `num_context` given. The carry-over filter is the model's own, applied to the guided
    logits: the published script has none, and so have models with `carry_over=False`. K network passes, 2 K with cfg.
    """
    config, device = model.config, model.device
    ids = ids.to(device)
    scored = torch.arange(len(ids), device=device) >= num_context
    key = hash64(sequence_key(ids, scored, settings.seed), Stream.PUBLISHED)
    digits = model.encode(ids.unsqueeze(0))
    draws = []
    for batch, start in enumerate(range(0, settings.num_samples, ROWS_PER_BATCH)):
        count = min(ROWS_PER_BATCH, settings.num_samples - start)
        steps = torch.arange(count, device=device).double() / count
        t = (uniforms(key, Stream.PUBLISHED_TIME, batch) + steps) % 1  # (R,)
        hidden = _hidden(t, scored, hash64(key, Stream.PUBLISHED_RUN, batch), settings, config.num_subtokens)
        states = torch.where(hidden, config.base, digits)
        logits = _guided_logits(model, states, scored, settings.cfg)  # (R, targets, V)
        if config.carry_over:
            logits.masked_fill_(~model.code_table.consistent(states[:, scored]), -torch.inf)
        temperature = (1 - settings.temperature) * t + settings.temperature
        log_q = (logits / temperature[:, None, None].float()).log_softmax(-1)
        nats = -log_q.gather(-1, ids[scored].expand(count, -1).unsqueeze(-1)).squeeze(-1).double()
        draws.append(-nats.sum(1) / (t + WEIGHT_OFFSET))
    return torch.cat(draws).cpu()


def _hidden(t: Tensor, scored: Tensor, key: Tensor, settings: PublishedSettings, num_subtokens: int) -> Tensor:
    """(R, L, S) bool: digits of the continuation that are hidden at t (R,); a run of digits shares one draw."""
    boundaries, sizes = mask_unit_schedule(settings.mask_unit, num_subtokens)
    size = torch.tensor(sizes, device=t.device)[torch.bucketize(t, torch.tensor(boundaries, device=t.device).double())]
    run = torch.arange(len(scored) * num_subtokens, device=t.device) // size.unsqueeze(1)  # (R, L * S)
    rows = torch.arange(len(t), device=t.device).unsqueeze(1)
    hidden = uniforms(key, rows, run) < t.unsqueeze(1)
    return hidden.view(len(t), -1, num_subtokens) & scored.unsqueeze(-1)


def _guided_logits(model: Any, states: Tensor, scored: Tensor, cfg: float) -> Tensor:
    """(R, targets, V) logits at the continuation, at least float32, without a filter."""
    rows = len(states)
    if cfg > 0:
        masked = states.masked_fill(~scored[None, :, None], model.config.base)
        states = torch.cat([states, masked])
    hidden_states = model.model(states).last_hidden_state[:, scored]
    logits = apply_head(hidden_states, model.head())
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if cfg > 0:
        logits, masked_logits = logits[:rows], logits[rows:]
        logits = masked_logits + (1 + cfg) * (logits - masked_logits)
    return logits


def published_settings(task: str, seed: int = 0) -> PublishedSettings:
    """The published settings of a task, which were tuned on its test set; ValueError for a task without any."""
    table = yaml.safe_load(SETTINGS_FILE.read_text(encoding="utf-8"))["tasks"]
    for name, values in table.items():
        if task == name or task.startswith(f"{name}_"):
            return PublishedSettings(**values, seed=seed)
    raise ValueError(f"no settings were published for the task {task!r}, only for {', '.join(table)}")
