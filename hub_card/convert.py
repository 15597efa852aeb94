"""Checkpoints of other code in the names and shapes of this package.

"lit_gpt" is the layout of TinyLlama's fork of lit-gpt, which SMDM (arXiv:2410.18514, github.com/ML-GSAI/SMDM) and
MDM-Prime-v2 (arXiv:2603.16077, github.com/chen-hao-chao/mdm-prime-v2, lit_gpt/) train with: Llama's network with
attention to both sides. Read from their code:

* `attn.attn` holds, for each group of queries in turn, the rows of its query heads, of its key and of its value.
* Rotary positions turn dimension i of a head with dimension i + head_dim / 2, over all of it, theta 10,000.
* `mlp.swiglu`: w3 (silu(w1 x) * w2 x). RMSNorm before each part, eps 1e-5. No biases, an untied head.
* Rows of `wte`: one a token and a last one for the mask; or, with sub-tokens, `j * (base + 1) + digit`, most
  significant digit first, `base` being the masked digit. Vectors of the digits are added up, or stand side by side.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from prime_v2.code_table_prime_v2 import MAX_SHUFFLED_CODES, build_code_table

NORM_EPS, ROPE_THETA = 1e-5, 10_000.0
WHOLE_TOKEN_ABOVE = 0.5  # of the published run on SlimPajama
# Heads by hidden size, of the published configurations whose intermediate size is 4 x hidden size.
HEADS = {256: 4, 384: 6, 512: 8, 576: 9, 640: 10, 768: 12, 896: 14, 1024: 16}
HEADS |= {1280: 10, 1408: 11, 1536: 12, 1792: 14, 2048: 16, 2176: 17}

EMBEDDING, LAST_NORM, HEAD = "transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"
FUSED, GATE = "attn.attn.weight", "mlp.swiglu.w1.weight"
# Axes of a tensor, by letter (`_lengths`), and our name.
TOP = {
    EMBEDDING: ("EW", "model.embed_subtokens.table.weight"),
    LAST_NORM: ("D", "model.norm.weight"),
    HEAD: ("PD", "lm_head.weight"),
}
LAYER = {
    "norm_1.weight": ("D", "input_layernorm.weight"),
    FUSED: ("QD", "self_attn.{}_proj.weight"),
    "attn.proj.weight": ("DD", "self_attn.o_proj.weight"),
    "norm_2.weight": ("D", "post_attention_layernorm.weight"),
    GATE: ("FD", "mlp.gate_proj.weight"),
    "mlp.swiglu.w2.weight": ("FD", "mlp.up_proj.weight"),
    "mlp.swiglu.w3.weight": ("DF", "mlp.down_proj.weight"),
}
IN_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")

# Layouts that are known and not converted: what the names of their tensors contain, and why.
REFUSED = {
    ("adaLN_modulation", "sigma_map."): (
        "an MDLM checkpoint cannot be expressed here: its blocks have LayerNorm with a shift, scale and gate made "
        "from the noise level (adaLN) and a GELU network with biases, where this network has RMSNorm, no input for "
        "the noise level, and SwiGLU without biases"
    ),
    ("linear_qkv", "linear_fc1"): (
        "a Megatron checkpoint is not converted: the layout of the published ones (MDM-Prime-v2 on C4) could not be "
        "established; give a file of the lit_gpt layout"
    ),
}


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a lit_gpt checkpoint say; `rows` is the head's, padding included.

    num_subtokens 1: one vector a token; else vectors of digits, joined as `embedding` says ("sum" or "concat").
    """

    rows: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    base: int
    num_subtokens: int
    embedding: str = "sum"

    def config_fields(self, max_length: int) -> dict[str, Any]:
        """Fields of `PrimeV2Config` besides those of the code table and the tokenizer."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return {
            **{name: getattr(self, name) for name in names},
            "max_position_embeddings": max_length,
            "rms_norm_eps": NORM_EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
            "initializer_range": (2 / (5 * self.hidden_size)) ** 0.5,
            "subtoken_embedding": self.embedding,
            "carry_over": False,
            "objective": "joint",
            "noise_form": "time",
            "whole_token_above": WHOLE_TOKEN_ABOVE if self.num_subtokens > 1 else None,
        }


def refuse_layout(tensors: Iterable[str]) -> None:
    """ValueError for the names of the tensors of a layout that is known and not converted."""
    for marks, reason in REFUSED.items():
        if any(mark in tensor for tensor in tensors for mark in marks):
            raise ValueError(reason)


def sizes_of(tensors: Mapping[str, Tensor], base: int, coded: bool, num_heads: int | None = None) -> Sizes:
    """Sizes of a lit_gpt checkpoint, every name and shape of which is checked.

    coded: whether `wte` holds vectors of digits of `base`, of a model with a permutation of the codes.
    num_heads: of the queries; None takes it from HEADS. Raises ValueError with the tensors that do not fit.
    """
    layers = _check_names(tensors)
    lengths = _lengths(tensors)
    _check_shapes(tensors, layers, lengths)
    hidden, rows = lengths["D"], lengths["P"]
    heads, groups = _heads(hidden, lengths["F"], lengths["Q"], num_heads)
    if coded:
        digits, embedding = _digits(lengths, base)
    else:
        _check_whole(lengths, base)
        base, digits, embedding = rows, 1, "sum"
    return Sizes(rows, hidden, lengths["F"], layers, heads, groups, base, digits, embedding)


def codes_of(permutation: Tensor, sizes: Sizes, vocab_size: int) -> Tensor:
    """The table C (V, S) int64 of a permutation (n,) of the base**S codes, or of the V ids, as `read_permutation`."""
    capacity = sizes.base**sizes.num_subtokens
    low, high = int(permutation.min()), int(permutation.max())
    if len(permutation) not in (capacity, vocab_size) or low < 0 or high >= capacity:
        raise ValueError(
            f"the permutation has {len(permutation)} values in [{low}, {high}], but the embedding is of "
            f"{sizes.num_subtokens} digits of base {sizes.base}: it must have {capacity} values, or one for each of "
            f"the {vocab_size} tokens, in [0, {capacity - 1}]"
        )
    if vocab_size > len(permutation):
        raise ValueError(
            f"the tokenizer has {vocab_size} tokens, more than the {len(permutation)} codes of the permutation; give "
            f"the tokenizer that the model was trained with"
        )
    every_code = build_code_table(high + 1, sizes.base, sizes.num_subtokens, shuffle_ratio=0.0)
    return every_code[permutation[:vocab_size]]


def check_rows(sizes: Sizes, vocab_size: int, drop_padding: bool) -> None:
    """ValueError unless the head has a row for each token of the tokenizer, or more of them that may be dropped."""
    if vocab_size > sizes.rows:
        raise ValueError(
            f"the tokenizer has {vocab_size} tokens, but {HEAD} has {sizes.rows} rows; give the tokenizer that the "
            f"model was trained with"
        )
    if vocab_size < sizes.rows and not drop_padding:
        raise ValueError(
            f"{HEAD} has {sizes.rows} rows, but the tokenizer has {vocab_size} tokens; give the tokenizer that the "
            f"model was trained with, or --drop-padding if the last {sizes.rows - vocab_size} rows are padding"
        )


def our_weights(tensors: Mapping[str, Tensor], sizes: Sizes, vocab_size: int) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names, in one type that loses nothing; V rows of the head remain.

    Raises ValueError for a tensor with a value that is not finite.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are not finite; give a checkpoint of a run that went well")
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = IN_LAYER.fullmatch(name)
        if match is None:
            found[TOP[name][1]] = tensor
        else:
            number, part = match.groups()
            ours = f"model.layers.{number}.{LAYER[part][1]}"
            parts = split_fused(tensor, sizes) if part == FUSED else {"": tensor}
            found |= {ours.format(key): value for key, value in parts.items()}
    if vocab_size < sizes.rows:
        head, embedding = TOP[HEAD][1], TOP[EMBEDDING][1]
        found[head] = found[head][:vocab_size].clone()
        if sizes.num_subtokens == 1:  # the mask is the last row, behind the padding
            found[embedding] = torch.cat([found[embedding][:vocab_size], found[embedding][-1:]])
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in found.items()}


def split_fused(weight: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    """A fused projection (Q, D) to those of queries, keys and values, whose heads are in the same order."""
    groups, hidden = sizes.num_key_value_heads, sizes.hidden_size
    heads_and_two = sizes.num_attention_heads // groups + 2
    grouped = weight.reshape(groups, heads_and_two, -1, hidden)
    parts = {"q": grouped[:, :-2], "k": grouped[:, -2], "v": grouped[:, -1]}
    return {name: part.reshape(-1, hidden).clone() for name, part in parts.items()}


def _check_names(tensors: Mapping[str, Tensor]) -> int:
    """The number of layers; ValueError unless the names are those of a lit_gpt checkpoint, no more and no fewer."""
    numbers = {int(match[1]) for name in tensors if (match := IN_LAYER.fullmatch(name)) and match[2] in LAYER}
    layers = len(numbers)
    wanted = {*TOP, *(f"transformer.h.{number}.{part}" for number in range(max(1, layers)) for part in LAYER)}
    faults = [
        f"{what} {_some(sorted(names))}"
        for what, names in {"unknown": tensors.keys() - wanted, "missing": wanted - tensors.keys()}.items()
        if names
    ]
    if faults:
        raise ValueError(f"the names are not those of the lit_gpt layout: {'; '.join(faults)}")
    return layers


def _lengths(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Lengths of the axes: D hidden size, P rows of the head, F intermediate size, Q fused rows, E and W of `wte`."""

    def length(name: str, axis: int = 0) -> int:
        shape = tensors[name].shape
        return shape[axis] if len(shape) > axis else 0

    first = "transformer.h.0."
    lengths = {"D": length(LAST_NORM), "P": length(HEAD), "F": length(first + GATE), "Q": length(first + FUSED)}
    return {**lengths, "E": length(EMBEDDING), "W": length(EMBEDDING, 1)}


def _check_shapes(tensors: Mapping[str, Tensor], layers: int, lengths: dict[str, int]) -> None:
    every = {name: axes for name, (axes, _) in TOP.items()}
    every |= {f"transformer.h.{i}.{part}": axes for i in range(layers) for part, (axes, _) in LAYER.items()}
    faults = []
    for name, axes in every.items():
        shape, wanted = tuple(tensors[name].shape), tuple(lengths[axis] for axis in axes)
        if shape != wanted or not all(shape):
            faults.append(f"{name} {shape} instead of {wanted}")
    if faults:
        raise ValueError(f"shapes that do not fit together: {_some(faults)}; give a whole lit_gpt checkpoint")


def _heads(hidden: int, intermediate: int, fused: int, num_heads: int | None) -> tuple[int, int]:
    """Heads of the queries, and of the keys."""
    heads = num_heads
    if heads is None:
        heads = HEADS.get(hidden) if intermediate == 4 * hidden else None
    if heads is None:
        raise ValueError(
            f"no published model has the hidden size {hidden} with the intermediate size {intermediate}, and the "
            f"number of heads is not in the shapes; give it, e.g. --num-heads {max(1, hidden // 64)}"
        )
    if hidden % heads:
        raise ValueError(f"--num-heads {heads} does not divide the hidden size {hidden}; give the model's own number")
    keys, rest = divmod(fused - hidden, 2 * (hidden // heads))
    if rest or keys < 1 or heads % keys:
        raise ValueError(
            f"{FUSED} has {fused} rows, which are no {heads} query heads of size {hidden // heads} with keys and "
            f"values for groups of them; give the model's own --num-heads"
        )
    return heads, keys


def _digits(lengths: dict[str, int], base: int) -> tuple[int, str]:
    """Digits a token, and how their vectors are joined."""
    rows, width, hidden = lengths["E"], lengths["W"], lengths["D"]
    digits, rest = divmod(rows, base + 1)
    # Few enough that their codes can be listed; compared by logarithm, since the number of codes may be enormous.
    if rest or not digits or digits * math.log(base) > math.log(MAX_SHUFFLED_CODES):
        raise ValueError(
            f"{EMBEDDING} has {rows} rows, which are no {base + 1} values for each of a few digits of base {base}; "
            f"give the model's own --base, or leave --permutation out for a model of whole tokens"
        )
    if width == hidden:
        return digits, "sum"
    if width * digits == hidden:
        return digits, "concat"
    if width == hidden // digits:
        raise ValueError(
            f"{EMBEDDING} has {digits} vectors of width {width} a token, filled up to the hidden size {hidden} with "
            f"zeros, which this network cannot express; only widths {hidden} and {hidden}/{digits} without rest are"
        )
    raise ValueError(
        f"{EMBEDDING} has width {width}; {digits} digits of base {base} need the hidden size {hidden}, or its "
        f"{digits}th part"
    )


def _check_whole(lengths: dict[str, int], base: int) -> None:
    """ValueError unless `wte` has a row for each row of the head and one for the mask."""
    rows, wanted = lengths["E"], lengths["P"] + 1
    if rows == wanted - 1:
        raise ValueError(
            f"{EMBEDDING} has {rows} rows, as many as {HEAD}, so none for the mask: this is an autoregressive model, "
            f"and only masked diffusion models are converted"
        )
    if rows != wanted and rows % (base + 1) == 0:
        raise ValueError(
            f"{EMBEDDING} has {rows} rows, so vectors of {rows // (base + 1)} digits of base {base}; give the file of "
            f"the permutation that the model was trained with, --permutation FILE"
        )
    if rows != wanted or lengths["W"] != lengths["D"]:
        raise ValueError(
            f"{EMBEDDING} is ({rows}, {lengths['W']}); a model of whole tokens has ({wanted}, {lengths['D']}), a row "
            f"for each of the {wanted - 1} rows of {HEAD} and one for the mask"
        )


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
