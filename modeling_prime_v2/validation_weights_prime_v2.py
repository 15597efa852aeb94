"""What the weights of a checkpoint must be, looked at in the headers of its files before any memory is taken for them.

Transformers draws a tensor that a file lacks anew, with a warning, and casts integers to the floats that a network
wants: both give a model that answers, wrongly. Here such a file is refused.
"""

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
TABLE = "code_table.codes"


def refuse_pickles(use_safetensors: bool | None) -> bool:
    """The only value of `use_safetensors` that this package knows, True; ValueError for False."""
    if use_safetensors is False:
        raise ValueError(
            "use_safetensors=False asks for pickled weights, which can run code when they are read; leave it out, and "
            "save the weights as model.safetensors"
        )
    return True


def check_headers(model: nn.Module, files: Iterable[str], place: str) -> None:
    """ValueError unless safetensors `files` hold the tensors of `model`, with their shapes and kinds of numbers.

    A code table that the configuration draws may be absent, one that comes with the weights may not. A backbone
    leaves out what belongs to the head.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        found |= read_header(file)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    whole = getattr(model, "base_model", model) is not model
    unknown = {name for name in found if whole or name.startswith(prefix)}
    missing, misfits, kinds = [], [], []
    for name, tensor in model.state_dict().items():
        stored_as = next((each for each in (name, prefix + name, name.removeprefix(prefix)) if each in found), None)
        if stored_as is None:
            if name not in tied and not (name.endswith(TABLE) and _draws_table(model)):
                missing.append(name)
            continue
        stored = found[stored_as]
        unknown.discard(stored_as)
        if stored[0] != tuple(tensor.shape):
            misfits.append(f"{name} with {list(stored[0])} instead of {list(tensor.shape)}")
        elif stored[1] not in (FLOATS if tensor.is_floating_point() else INTEGERS):
            kinds.append(f"{name} with {stored[1]} instead of {_kind(tensor)}")
    asked = "that config.json asks for"
    for faults, fault, which in (
        (missing, "lack", asked),
        (misfits, "have other shapes for", asked),
        (kinds, "have other types for", asked),
        (sorted(unknown), "hold", "that config.json does not ask for"),
    ):
        if faults:
            number = "1 tensor" if len(faults) == 1 else f"{len(faults)} tensors"
            raise ValueError(
                f"the weights of {place} {fault} {number} {which}, the first being {faults[0]}; save the model again"
            )


def read_header(file: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor of a safetensors file; ValueError for a file that is none."""
    try:
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118  # not a mapping
            return {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be loaded ({str(error).rstrip('.')}); save the model again") from None


def check_codes(codes: Tensor, base: int) -> None:
    """ValueError unless codes (V + 1, S) are a code table: V distinct rows of digits below base, then a masked one."""
    if codes.is_meta:
        return
    table = codes[:-1].cpu()
    if table.min() < 0 or table.max() >= base:
        raise ValueError(
            f"the code table of the weights has digits in [{int(table.min())}, {int(table.max())}], but a digit of "
            f"base {base} is in [0, {base - 1}]; save the model again"
        )
    packed = torch.zeros(len(table), dtype=torch.long)
    for digit in table.unbind(1):
        packed = packed * base + digit
    distinct = len(packed.unique())
    if distinct != len(table):
        raise ValueError(
            f"the code table of the weights gives {len(table)} tokens {distinct} codes; every token needs a code of "
            f"its own: save the model again"
        )
    if (codes[-1] != base).any():
        raise ValueError(
            f"the last row of the code table of the weights is {codes[-1].tolist()}, but it is the mask token's, all "
            f"{base}; save the model again"
        )


def _draws_table(model: Any) -> bool:
    return getattr(model.config, "code_source", "shuffle") == "shuffle"


def _kind(tensor: Tensor) -> str:
    return "floating-point numbers" if tensor.is_floating_point() else "integers"
