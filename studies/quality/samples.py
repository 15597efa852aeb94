"""What a sampler writes, and the law that it writes by: sampled sets of texts, and nats per token of real text."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prime_v2.studies.quality.plan import Cell, Plan, config_of, is_causal, law_method

Progress = Callable[[int, int], None]


def write(model: Any, cell: Cell, plan: Plan, windows: Tensor, progress: Progress) -> tuple[Tensor, dict[str, Any]]:
    """(texts (N, length) int64, what they cost): `plan.samples` texts, none left out, EOS a token like any other.

    windows (N, length): their first `cell.prompt` tokens are given. Costs: passes a text, seconds of the wall clock
    and of the network, new tokens a second of the wall clock.
    """
    prompts = windows[:, : cell.prompt].to(model.device)
    call: dict[str, Any] = {"max_new_tokens": plan.length - cell.prompt, "eos_token_id": []}
    if is_causal(model):
        call |= {"do_sample": True, "temperature": cell.temperature}
    else:
        call["generation_config"] = config_of(model, cell)
    texts: list[Tensor] = []
    passes: list[int] = []
    network, started = 0.0, time.monotonic()
    for start in range(0, len(prompts), plan.batch):
        rows = prompts[start : start + plan.batch]
        output = model.generate(rows, seed=plan.seed + start // plan.batch, return_dict_in_generate=True, **call)
        texts.append(output.sequences.cpu())
        passes += output.num_forward.tolist()
        network += output.network_seconds
        progress(len(rows), 0)
    seconds = time.monotonic() - started
    ids = torch.cat(texts)
    return ids, {
        "mean_passes": float(np.mean(passes)),
        "seconds": seconds,
        "network_seconds": network,
        "tokens_per_second": len(ids) * call["max_new_tokens"] / seconds,
    }


def law(model: Any, cell: Cell, plan: Plan, windows: Tensor, progress: Progress) -> dict[str, Any]:
    """Nats of each window under what the cell's sampler writes, given its first `cell.prompt` tokens.

    Keys: method, is_exact; nats_of_sequences to 1e-3; mean_passes of a window, of the replayed sampler (None for
    another method); draws of each window, 0 where exact.
    """
    method = law_method(model, cell.sampler)
    nats: list[Tensor] = []
    passes: list[Tensor] = []
    options: dict[str, Any] = {"method": method, "seed": plan.seed, "num_samples": plan.draws}
    if method == "sampler":
        options["generation_config"] = config_of(model, cell)
    for rows in windows.split(plan.batch):
        if cell.prompt:
            options["prompt_mask"] = (torch.arange(rows.shape[1]) < cell.prompt).expand_as(rows).to(model.device)
        output = model.log_likelihood(rows.to(model.device), **options)
        nats.append(-output.value.cpu())
        passes.append(output.num_forward.double().cpu())
        progress(len(rows), 0)
    every = torch.cat(nats)
    if every.isinf().any():
        raise ValueError(
            f"{cell} never writes window {int(every.isinf().nonzero()[0])} of the held-out text, of which top_p "
            f"excludes a token; set top_p=1.0 in the model's generation_config.json"
        )
    is_exact = bool(output.is_exact)
    mean_passes = float(torch.cat(passes).mean()) / (1 if is_exact else plan.draws)
    return {
        "method": method,
        "is_exact": is_exact,
        "draws": 0 if is_exact else plan.draws,
        "mean_passes": mean_passes if method == "sampler" else None,
        "nats_of_sequences": [round(float(each), 3) for each in every],
    }
