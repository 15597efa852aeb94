"""What a batch must be before the network sees it: ids, masks, numbers. Values are not looked at while compiling."""

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .code_table_prime_v2 import reads_values
from .validation_keywords_prime_v2 import arguments_of, refuse_unknown, shown

# Seeds that torch's generators take too.
SEEDS = (-(2**63), 2**64 - 1)
WITHOUT_PROMPT = ", or generate without a prompt by input_ids=None"
# Smallest value of the whole numbers among the options of `log_likelihood` and `greedy_matches`.
LEAST = {"num_samples": 1, "round_number": 0, "tokens_per_pass": 1}


def token_inputs(model: Any, input_ids: Any, attention_mask: Any = None) -> tuple[Any, Any]:
    """(input_ids, attention_mask) as tensors or None, from what a tokenizer and numpy give; tensors as they are.

    input_ids: a tensor; a list or array of ids, one row; a list of equally long lists, or an array (B, L); or what a
    tokenizer returns, a mapping (BatchEncoding) of input_ids and attention_mask in any of these forms.
    Raises ValueError for text, numbers that are no integers, rows of different lengths, other entries of a mapping.
    """
    if isinstance(input_ids, Mapping):
        others = [name for name in input_ids if name not in ("input_ids", "attention_mask")]
        others = [name for name in others if input_ids[name] is not None]
        if others or "input_ids" not in input_ids:
            raise ValueError(
                f"input_ids is a mapping with {', '.join(map(repr, input_ids))}; give one with input_ids and perhaps "
                f"attention_mask only, or its entries by name"
            )
        if attention_mask is not None and input_ids.get("attention_mask") is not None:
            raise ValueError("attention_mask was given twice, beside input_ids and in it; leave one of the two out")
        attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
        input_ids = input_ids["input_ids"]
    if isinstance(attention_mask, list | tuple | np.ndarray):  # others are objects of Transformers', or refused later
        attention_mask = as_tensor(model, "attention_mask", attention_mask)
    return as_tensor(model, "input_ids", input_ids), attention_mask


def scoring_inputs(
    model: Any, function: Callable, given: dict[str, Any], input_ids: Any, attention_mask: Any, **masks: Any
) -> tuple[Any, ...]:
    """(input_ids, attention_mask, each of the other `masks`, options) for `function`, which scores texts.

    `token_inputs` and `scoring_options` of what a public method got. Raises ValueError for what is refused there, and
    unless input_ids are (B, L) and the masks alike, of zeros and ones.
    """
    ids, mask = token_inputs(model, input_ids, attention_mask)
    if ids is None or ids.dim() != 2 or 0 in ids.shape:
        shape = "" if ids is None else f" has shape {tuple(ids.shape)}"
        raise ValueError(f"input_ids{shape or '=None'}; give (B, L) with at least one token")
    others = {name: as_tensor(model, name, each) for name, each in masks.items()}
    for name, each in {"attention_mask": mask, **others}.items():
        check_mask(name, each, tuple(ids.shape))
    return ids, mask, *others.values(), scoring_options(function, given, len(ids))


def as_tensor(model: Any, name: str, value: Any, dims: int = 2) -> Any:
    """A tensor (B, L), or of `dims` axes, on the model's device from lists or an array; tensors and None as they are.

    Ids must be integers; masks may be whatever `check_mask` looks at. ValueError for anything else.
    """
    if value is None or isinstance(value, Tensor):
        return value
    if not isinstance(value, list | tuple | np.ndarray):
        what = "text" if isinstance(value, str) else f"of type {type(value).__name__}"
        raise ValueError(f"{name} is {what}; give a tensor, as tokenizer(text, return_tensors='pt') does, or lists")
    try:
        array = np.asarray([np.asarray(row) for row in value] if isinstance(value, list | tuple) else value)
    except ValueError:
        raise ValueError(
            f"the rows of {name} have different lengths; pad them and give an attention_mask, as "
            f"tokenizer(texts, padding=True, return_tensors='pt') does"
        ) from None
    if not array.size:
        array = array.astype(np.int64)
    kind = array.dtype.kind
    if kind not in ("iubf" if name.endswith("mask") else "iub"):
        found = "text" if kind in "US" else str(array.dtype)
        raise ValueError(f"{name} must be integers, not {found}; give e.g. [[5, 7, 2]], what a tokenizer returns")
    if array.ndim == dims - 1:
        array = array[None]
    elif array.ndim != dims:
        raise ValueError(f"{name} has shape {array.shape}; give {dims} axes, rows first, or one row")
    return torch.as_tensor(array if kind in "bf" else array.astype(np.int64), device=model.device)


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...] | None = None) -> None:
    """ValueError unless a mask, None included, is bool or of zeros and ones; of `shape` where that is given.

    Values are read as of `reads_values`.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name} is of type {type(mask).__name__}; give a tensor of zeros and ones (B, L)")
    if shape is not None and tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, but input_ids {tuple(shape)}")
    if mask.dtype == torch.bool or not reads_values(mask):
        return
    faults = (mask != 0) & (mask != 1)  # NaN is neither
    if not faults.any():
        return
    value = mask[faults][0].item()
    additive = "; of a mask that is added to scores, 0 and -inf, give (mask == 0)" if mask.is_floating_point() else ""
    raise ValueError(f"{name} holds {value}, but a mask is bool, or 1 for what counts and 0 for the rest{additive}")


def check_embeds(inputs_embeds: Any, config: Any) -> None:
    """ValueError unless inputs_embeds, None included, are vectors (B, L, D) of the network's width."""
    if inputs_embeds is None:
        return
    right = isinstance(inputs_embeds, Tensor) and inputs_embeds.is_floating_point() and inputs_embeds.dim() == 3
    if not right or inputs_embeds.shape[-1] != config.hidden_size:
        raise ValueError(
            f"inputs_embeds={shown(inputs_embeds)} must be floating-point vectors (B, L, {config.hidden_size})"
        )


def check_prepared_mask(mask: Any, attention: str | None) -> None:
    """ValueError unless a mask (B or 1, heads or 1, L, keys) is what this attention takes; other objects are let be.

    bool, True where it attends, for all but eager attention; or what is added to scores, 0 or very negative.
    """
    if not isinstance(mask, Tensor) or torch.compiler.is_compiling():
        return
    if mask.dtype == torch.bool:
        if attention == "eager":
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)} and is bool, which eager attention would add to its "
                f"scores; give (B, L), or zeros and {torch.finfo(torch.float32).min:g}"
            )
        return
    least = torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else None
    if least is None or reads_values(mask) and not ((mask == 0) | (mask <= least)).all():
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: such a mask is bool, or 0 where it attends and "
            f"torch.finfo(dtype).min or -inf elsewhere; give one of these, or (B, L)"
        )


def check_length(inputs: Tensor, attention_mask: Tensor | None, config) -> None:
    """ValueError unless inputs (B, L, ...) fit into the network and their mask (B, L) leaves a token in every row."""
    if torch.compiler.is_compiling():
        return
    if inputs.dim() < 2:
        raise ValueError(f"input_ids has shape {tuple(inputs.shape)}; give token ids (B, L)")
    batch, length = inputs.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"the batch has {batch} rows of {length} tokens; give at least one row of one token")
    if length > config.max_position_embeddings:
        raise ValueError(
            f"the input has {length} tokens, but max_position_embeddings={config.max_position_embeddings}; "
            f"cut it to {config.max_position_embeddings} tokens"
        )
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"attention_mask is of type {type(attention_mask).__name__}; give a tensor (B, L)")
    shape = tuple(attention_mask.shape)
    if shape != (batch, length):
        raise ValueError(f"attention_mask has shape {shape}, but the input has {(batch, length)}")
    check_mask("attention_mask", attention_mask)
    if reads_values(attention_mask):
        refuse_only_padding(attention_mask.bool())


def refuse_only_padding(real: Tensor, other: str = "") -> None:
    """ValueError where a row of real (B, L) bool, L > 0, has no token; other: what is possible beside dropping it."""
    empty = ~real.any(1)
    if real.shape[1] and empty.any():
        raise ValueError(f"row {int(empty.nonzero()[0])} of attention_mask has only padding; drop that row{other}")


def refuse_lone_mask(attention_mask: Tensor | None) -> None:
    """ValueError for a mask where there are no input_ids."""
    if attention_mask is not None:
        raise ValueError("attention_mask was given without input_ids, to which it belongs; leave it out")


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, numpy's included; bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(name: str, value: Any, least: int, most: int | None = None, use: int | None = None) -> int:
    """An integer, numpy's included, of at least `least`; ValueError otherwise, for bool too."""
    if not is_integer(value) or value < least or most is not None and value > most:
        bounds = f"of at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(
            f"{name}={shown(value)} must be an integer {bounds}; use {max(least, 0) if use is None else use}"
        )
    return int(value)


def checked_seed(seed: Any) -> int:
    """A seed as Python's integer; ValueError for anything else, bool and None included."""
    return whole_number("seed", seed, *SEEDS)


def checked_flag(name: str, value: Any) -> bool:
    """True or False, numpy's included; ValueError otherwise: text such as "false" would count as true."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={shown(value)} must be True or False")
    return bool(value)


def _of_sampler(name: str, value: Any) -> str | None:
    """What to do with an option of `generate` that was given to `log_likelihood`."""
    if name not in ("sampler_config", "max_denoising_steps", "block_length", "cache", "temperature", "top_p"):
        return None
    return f"give method='sampler' and generation_config=PrimeV2GenerationConfig({name}=...)"


def scoring_options(function: Callable, given: dict[str, Any], rows: int) -> dict[str, Any]:
    """The keywords of a `log_likelihood` or `greedy_matches` whose work `function` does, as checked Python numbers.

    Raises ValueError for names that it has not, seeds and counts that are no integers or too small, flags that are no
    bool, and keys that are not (B,) integers.
    """
    where = function.__name__.removeprefix("sampler_")  # what the caller called
    refuse_unknown(where, given, arguments_of(function), _of_sampler)
    checked = dict(given)
    for name, value in given.items():
        if name in LEAST:
            checked[name] = whole_number(name, value, LEAST[name])
        elif name in ("exhaustive", "return_samples"):
            checked_flag(name, value)
        elif name == "seed":
            checked[name] = checked_seed(value)
        elif name == "keys" and value is not None:
            keys = torch.as_tensor(value) if isinstance(value, list | tuple | np.ndarray) else value
            if not isinstance(keys, Tensor) or keys.shape != (rows,) or keys.dtype != torch.int64:
                raise ValueError(f"keys={shown(value)} must be {rows} integers of 64 bits, one a row")
            checked[name] = keys
    return checked
