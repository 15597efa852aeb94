"""What a network is fed when its attention is measured, and which positions each of its queries then sees."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prime_v2 import diffusion_prime_v2
from prime_v2 import diffusion_uniform_prime_v2 as diffusion_uniform_prime_v2
from prime_v2.diffusion_interpolating_prime_v2 import ScoredTexts, diffusion_inputs, random_places
from prime_v2.random_prime_v2 import Stream, hash64


@dataclass(frozen=True)
class Fed:
    """A batch of windows (B, L) as the network gets it.

    inputs: arguments of the network below its head; seen (1 or B, L, L) bool, whether a query (second axis) can attend
    to a position; shares: what the noise did to each window, (B,) float64 each; words: what was fed.
    """

    inputs: dict[str, Any]
    seen: Tensor
    words: str
    shares: dict[str, Tensor] = field(default_factory=dict)


def feed(model: Any, ids: Tensor, share: float | None, seed: int) -> Fed:
    """What the network is fed for clean ids (B, L).

    Causal: as for a likelihood, the start token and all but the last one; share must be None. Diffusion: states of the
    model's own forward process at the level `share` in [0, 1], 0 for clean; keyed by the seed and the window's ids, so
    that equal windows and levels have equal states, and a higher level changes more of the same units.
    """
    if is_causal_model(model):
        return _causal(model, ids, share)
    kind = model.config.model_type
    if kind not in DIFFUSION:
        raise ValueError(
            f"models of type {kind!r} cannot be analyzed: it is not said what they are fed; use a causal model or one "
            f"of {', '.join(map(repr, DIFFUSION))}"
        )
    check_masked_share(share)
    positions = torch.arange(ids.shape[1], device=ids.device)
    keys = hash64(seed, Stream.ANALYSIS, hash64(positions, ids).sum(1))
    return DIFFUSION[kind](model, ids, share, keys)


def is_causal_model(model: Any) -> bool:
    """Whether this is a `CausalScorer`, which knows the token that a window starts with."""
    return hasattr(model, "start_token_id")


def check_masked_share(share: float | None) -> None:
    """ValueError unless this is a number in [0, 1]."""
    if share is None or not 0 <= share <= 1:
        raise ValueError(f"masked_share={share} must be between 0 (clean text) and 1 (all masked); use 0.5")


def seen_everywhere(length: int) -> Tensor:
    """(1, L, L): in a bidirectional network."""
    return torch.ones(1, length, length, dtype=torch.bool)


def _causal(model: Any, ids: Tensor, share: float | None) -> Fed:
    if share is not None:
        raise ValueError(f"masked_share={share} is for masked diffusion; a causal model has None, clean text")
    if int(ids.max()) >= model.vocab_size:
        raise ValueError(
            f"token id {int(ids.max())} is not below vocab_size={model.vocab_size}; use the model's own tokenizer"
        )
    start = ids.new_full((len(ids), 1), model.start_token_id)
    words = f"clean text: start token {model.start_token_id} and the window without its last token"
    inputs = {"input_ids": torch.cat([start, ids[:, :-1]], dim=1), "use_cache": False}
    return Fed(inputs, seen_everywhere(ids.shape[1]).tril(), words)


def _masked(model: Any, ids: Tensor, share: float, keys: Tensor) -> Fed:
    """Prime-v2: digits hidden by the model's own reveal order and noise form."""
    config, digits = model.config, model.encode(ids)
    if share == 0:
        visible = torch.ones_like(digits, dtype=torch.bool)
        words = "clean text: every digit visible"
    else:
        levels = torch.full((len(ids),), share, dtype=torch.double, device=ids.device)
        order = diffusion_prime_v2.RevealOrder.from_config(config)
        scored, above = torch.ones_like(ids, dtype=torch.bool), config.whole_token_above
        visible = diffusion_prime_v2.draw_noise(scored, order, keys, levels, config.noise_form, above).visible
        whole = "" if above is None else f", whole tokens above {above}"
        words = f"draw_noise at level {share}: {config.noise_form} form, reveal order {config.reveal_order}{whole}"
    hidden = ~visible.expand_as(digits)
    shares = {
        "masked_digits": hidden.double().mean((1, 2)),
        "masked_tokens": hidden.all(-1).double().mean(1),
    }
    inputs = {"subtoken_ids": torch.where(hidden, config.base, digits)}
    return Fed(inputs, seen_everywhere(ids.shape[1]), words, shares)


def _uniform(model: Any, ids: Tensor, share: float, keys: Tensor) -> Fed:
    """Uniform-state: tokens replaced by random ones, and the time at which as many are."""
    levels = torch.full((len(ids),), share, dtype=torch.double, device=ids.device)
    scored = torch.ones_like(ids, dtype=torch.bool)
    noise = diffusion_uniform_prime_v2.draw_noise(ids, scored, keys, levels, model.config.vocab_size)
    shares = {"changed_tokens": (noise.ids != ids).double().mean(1), "time": noise.times}
    words = "clean text" if share == 0 else f"draw_noise at level {share}: tokens replaced by random ones"
    inputs = {"input_ids": noise.ids, "times": noise.times}
    return Fed(inputs, seen_everywhere(ids.shape[1]), words, shares)


def _interpolating(model: Any, ids: Tensor, share: float, keys: Tensor) -> Fed:
    """Interpolating: whole tokens hidden, the rest known in a random order; see `diffusion_inputs`."""
    rows, length = ids.shape
    scored = torch.ones_like(ids, dtype=torch.bool)
    places = torch.arange(length, device=ids.device).expand_as(ids)
    texts = ScoredTexts(ids, ~scored, scored, places, model.config.mask_token_id)
    num_hidden = math.ceil(share * length)
    fed = diffusion_inputs(texts, random_places(scored, keys), torch.full_like(ids[:, 0], length - num_hidden))
    itself = torch.eye(length, dtype=torch.bool, device=ids.device)
    seen = (fed.order_ids.unsqueeze(1) <= fed.visible_until.unsqueeze(2)) | itself
    words = "clean text" if share == 0 else f"{num_hidden} of {length} tokens masked"
    inputs = {"input_ids": fed.ids, "order_ids": fed.order_ids, "visible_until": fed.visible_until}
    shares = {"masked_tokens": torch.full((rows,), num_hidden / length, dtype=torch.double)}
    words += ", the others known one after the other in a random order"
    return Fed(inputs, seen, words, shares)


DIFFUSION: dict[str, Callable[[Any, Tensor, float, Tensor], Fed]] = {
    "prime_v2": _masked,
    "prime_v2_uniform": _uniform,
    "prime_v2_interpolating": _interpolating,
}
