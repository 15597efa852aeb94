"""Small random networks of every family, made once a process, for the fuzz tests."""

from functools import cache
from typing import Any

import torch

from prime_v2.families import FAMILIES

VOCAB_SIZE, LIMIT = 11, 12
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": LIMIT,
    "initializer_range": 0.4,
}
STAGES = {"reveal_order": "nested", "stage_digits": [2, 4]}
KINDS: dict[str, tuple[str, dict]] = {
    "digits": ("prime", {}),
    "digits in base 3, tied": ("prime", {"base": 3, "tie_word_embeddings": True, "carry_over": False}),
    "tokens": ("prime", {"reveal_order": "token"}),
    "stages": ("prime", {**STAGES, "subtoken_embedding": "ancestors"}),
    "MDM": ("prime", {"num_subtokens": 1, "qk_norm": True}),
    "ARM": ("arm", {"bos_token_id": 3}),
    "ARM over digits": ("arm", {"bos_token_id": 3, "num_subtokens": 4, "base": 2}),
    "uniform": ("uniform", {"time_embedding_size": 8}),
    "interpolating": ("interpolating", {"alpha_0": 0.5}),
}


@cache
def network(kind: str) -> Any:
    """The network of this kind, in evaluation mode; nobody changes it."""
    family, fields = KINDS[kind]
    torch.manual_seed(0)
    config = FAMILIES[family].config_class(**SHAPE | fields)
    return FAMILIES[family].model_class(config).eval()
