"""Small random networks of every family in evaluation mode, and the token ids that tests give to them."""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prime_v2.eval.causal import CausalScorer
from prime_v2.families import FAMILIES
from prime_v2.modeling_uniform_prime_v2 import PrimeV2TimeEmbedding, PrimeV2TimeScale

VOCAB_SIZE, START = 11, 3
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
OF_FAMILY: dict[str, dict] = {"arm": {"bos_token_id": START}, "uniform": {"time_embedding_size": 8}}
SUBTOKENS = {"num_subtokens": 4, "base": 2, "shuffle_seed": 5}
ORDERS: dict[str, dict] = {
    "digit": {},
    "token": {"reveal_order": "token"},
    "nested": {"reveal_order": "nested", "stage_digits": [1, 2]},
    "coarse first": {"reveal_order": "coarse_first", "stage_digits": [1, 2]},
    "windows": {"reveal_order": "windows", "stage_digits": [1, 2], "stage_windows": [[0, 0.75], [0.25, 1]]},
}


# Networks of two layers and 11 tokens


def small_config(family: str = "prime", **changes) -> Any:
    """11 tokens (in 4 binary digits, where the family has them), two layers of width 16."""
    return FAMILIES[family].config_class(**SHAPE | OF_FAMILY.get(family, {}) | changes)


def small_model(family: str = "prime", seed: int = 0, scale: float = 0.3, **changes) -> Any:
    """A random network, in evaluation mode; weights of this `scale` make its predictions far from uniform."""
    torch.manual_seed(seed)
    return FAMILIES[family].model_class(small_config(family, initializer_range=scale, **changes)).eval()


def small_arm(seed: int = 0, scale: float = 0.3, **changes) -> Any:
    """An autoregressive network over whole tokens, of texts that start with the token 3."""
    return small_model("arm", seed, scale, **changes)


def small_uniform(seed: int = 0, scale: float = 0.4, **changes) -> Any:
    """A uniform-state network whose predictions depend on the time.

    It does not read sin and cos of 1000 t and 100 t: integrals over t then need few points.
    """
    model = small_model("uniform", seed, scale, **changes)
    for module in model.modules():
        if isinstance(module, PrimeV2TimeScale):  # at first they are 0
            nn.init.normal_(module.weight, std=1.0)
        elif isinstance(module, PrimeV2TimeEmbedding):
            module.first.weight.data[:, [0, 1, 4, 5]] = 0
    return model


def small_interpolating(seed: int = 0, scale: float = 0.4, **changes) -> Any:
    """An interpolating network."""
    return small_model("interpolating", seed, scale, **changes)


def one_layer(vocab_size: int = 50, seed: int = 0, **changes) -> Any:
    """A masked network to sample from thousands of times; its logits vary by about 1."""
    shape = {"vocab_size": vocab_size, "num_hidden_layers": 1, "intermediate_size": None}
    return small_model(seed=seed, scale=0.5, **(shape | changes))


# Networks of every kind, of one layer and at most 12 tokens, made once a process

LIMIT = 12
TINY = SHAPE | {"intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": LIMIT}
STAGES = {"reveal_order": "nested", "stage_digits": [2, 4]}
KINDS: dict[str, tuple[str, dict]] = {
    "digits": ("prime", {}),
    "digits in base 3, tied": ("prime", {"base": 3, "tie_word_embeddings": True, "carry_over": False}),
    "tokens": ("prime", {"reveal_order": "token"}),
    "stages": ("prime", {**STAGES, "subtoken_embedding": "ancestors"}),
    "coarse first": ("prime", {**STAGES, "reveal_order": "coarse_first", "objective": "marginal"}),
    "MDM": ("prime", {"num_subtokens": 1, "qk_norm": True}),
    "ARM": ("arm", {"bos_token_id": START}),
    "ARM over digits": ("arm", {"bos_token_id": START, "num_subtokens": 4, "base": 2}),
    "tokens, head in stages": (
        "prime",
        {"reveal_order": "token", "subtoken_embedding": "ancestors", "head": "stages"},
    ),
    "stages, head in stages": ("prime", {**STAGES, "subtoken_embedding": "ancestors", "head": "stages"}),
    "ARM, head in stages": (
        "arm",
        {
            "bos_token_id": START,
            "num_subtokens": 4,
            "base": 2,
            "subtoken_embedding": "ancestors",
            "head": "stages",
            "head_digits": [1, 3, 4],
        },
    ),
    "uniform": ("uniform", {"time_embedding_size": 8}),
    "interpolating": ("interpolating", {"alpha_0": 0.5}),
    "interpolating, tree": (
        "interpolating",
        {"num_subtokens": 4, "base": 2, "subtoken_embedding": "ancestors", "head": "stages"},
    ),
}


KINDS |= {name: (name, {}) for name in FAMILIES if name not in dict(KINDS.values())}  # a new family is a kind


def fresh_network(kind: str, **changes) -> Any:
    """A new network of this kind, in evaluation mode, with other fields."""
    family, fields = KINDS[kind]
    torch.manual_seed(0)
    config = FAMILIES[family].config_class(**TINY | {"initializer_range": 0.4} | fields | changes)
    return FAMILIES[family].model_class(config).eval()


@cache
def network(kind: str) -> Any:
    """The network of this kind, in evaluation mode; nobody changes it."""
    return fresh_network(kind)


def times_of(model: Any, batch: int) -> dict[str, Tensor]:
    """The times that a uniform-state network wants beside noised ids, nothing for others."""
    wanted = "times" in inspect.signature(model.forward).parameters
    return {"times": torch.full((batch,), 0.5)} if wanted else {}


# Models that are not of this package


def peer_of(model: PreTrainedModel) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """Transformers' Llama, or Qwen3 with normalised queries and keys, with the shape and weights of ours."""
    config, names = model.config, [*SHAPE, "bos_token_id", "num_key_value_heads", "head_dim", "rms_norm_eps"]
    kinds = (Qwen3Config, Qwen3ForCausalLM) if config.qk_norm else (LlamaConfig, LlamaForCausalLM)
    names += ["tie_word_embeddings", "rope_parameters", "attention_bias"] + ([] if config.qk_norm else ["mlp_bias"])
    peer = kinds[1](kinds[0](**{name: getattr(config, name) for name in names}, eos_token_id=None))
    weights = {peer_name(name): each for name, each in model.state_dict().items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    peer.load_state_dict(weights)
    return peer.eval()


def peer_name(name: str) -> str:
    return name.replace("embed_subtokens.table", "embed_tokens")


def causal_model(make=GPT2LMHeadModel, **options) -> CausalScorer:
    """A causal model as `prime-v2 analyze` takes it: GPT-2 or one of Llama's kind, 11 tokens."""
    torch.manual_seed(0)
    if make is GPT2LMHeadModel:
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
        config = GPT2Config(vocab_size=11, bos_token_id=3, eos_token_id=3, **shape, **options)
    else:
        shape = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
        config = LlamaConfig(**shape)
    return CausalScorer(make(config).eval())


# Token ids


def some_ids(batch: int = 3, length: int = 7, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def prompts(rows: int, width: int, vocab_size: int = 50, seed: int = 1) -> Tensor:
    """Ids for `one_layer`."""
    return some_ids(rows, width, vocab_size, seed)


def some_noise(batch: int = 3, start: int = 0) -> dict[str, Tensor]:
    """Noise of a batch of training rows: keys, and levels spread evenly."""
    levels = (torch.arange(batch, dtype=torch.double) + 0.5) / batch
    return {"noise_keys": torch.arange(start, start + batch), "noise_levels": levels}


def after_start(ids: Tensor) -> Tensor:
    """ids (B, L) to (B, 1 + L)."""
    return torch.cat([torch.full_like(ids[:, :1], START), ids], dim=1)


def padded(rows: list[Tensor], side: str, length: int, fill: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, attention_mask) of rows (L_i,), padded to `length`: on the "left", on the "right", on "both" sides (one
    place before the row), or "inside", before its last token."""
    ids, mask = torch.full((len(rows), length), fill), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        free = length - len(row)
        places = {
            "left": range(free, length),
            "right": range(len(row)),
            "both": range(min(1, free), min(1, free) + len(row)),
            "inside": [*range(len(row) - 1), length - 1],
        }[side]
        ids[i, list(places)], mask[i, list(places)] = row, 1
    return ids, mask
