"""Small causal models and token ids that the tests of `prime-v2 analyze` measure."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)

from prime_v2.eval.causal import CausalScorer

LENGTH = 16


def causal_model(make=GPT2LMHeadModel, **options) -> CausalScorer:
    torch.manual_seed(0)
    if make is GPT2LMHeadModel:
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
        config = GPT2Config(vocab_size=11, bos_token_id=3, eos_token_id=3, **shape, **options)
    else:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "initializer_range": 0.5}
        config = LlamaConfig(
            vocab_size=11, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, **shape
        )
    return CausalScorer(make(config).eval())


def draw(count: int = 5, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(11, (count, length), generator=torch.Generator().manual_seed(seed))
