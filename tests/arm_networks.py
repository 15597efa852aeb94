"""Small random autoregressive models, and Transformers' own of the same shape."""

import itertools

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from prime_v2.configuration_arm_prime_v2 import PrimeV2ArmConfig
from prime_v2.modeling_arm_prime_v2 import PrimeV2ForCausalLM

VOCAB_SIZE, START = 11, 3
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": START,
}
SUBTOKENS = {"num_subtokens": 4, "base": 2, "shuffle_seed": 5}


def small_arm_config(**changes) -> PrimeV2ArmConfig:
    """11 tokens, two layers of width 16, texts that start with the token 3."""
    return PrimeV2ArmConfig(**SHAPE | changes)


def small_arm(seed: int = 0, scale: float = 0.3, **changes) -> PrimeV2ForCausalLM:
    """A random network, in evaluation mode; weights of this `scale` make its predictions far from uniform."""
    torch.manual_seed(seed)
    return PrimeV2ForCausalLM(small_arm_config(initializer_range=scale, **changes)).eval()


def peer_of(model: PrimeV2ForCausalLM) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """Transformers' Llama, or Qwen3 with normalised queries and keys, of the same shape and weights."""
    config, names = model.config, [*SHAPE, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"]
    kinds = (Qwen3Config, Qwen3ForCausalLM) if config.qk_norm else (LlamaConfig, LlamaForCausalLM)
    names += ["rope_parameters", "attention_bias"] + ([] if config.qk_norm else ["mlp_bias"])
    peer = kinds[1](kinds[0](**{name: getattr(config, name) for name in names}, eos_token_id=None))
    weights = {peer_name(name): each for name, each in model.state_dict().items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    peer.load_state_dict(weights)
    return peer.eval()


def peer_name(name: str) -> str:
    return name.replace("embed_subtokens.table", "embed_tokens")


def some_ids(batch: int = 3, length: int = 7, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def after_start(ids: Tensor) -> Tensor:
    """ids (B, L) to (B, 1 + L)."""
    return torch.cat([torch.full_like(ids[:, :1], START), ids], dim=1)


def padded(rows: list[Tensor], side: str, length: int, fill: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, attention_mask) of rows (L_i,), padded to `length` on one side or, "inside", before the last token."""
    ids, mask = torch.full((len(rows), length), fill), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        free = length - len(row)
        places = {
            "left": range(free, length),
            "right": range(len(row)),
            "inside": [*range(len(row) - 1), length - 1],
        }[side]
        ids[i, list(places)], mask[i, list(places)] = row, 1
    return ids, mask


@torch.no_grad()
def law(model: PrimeV2ForCausalLM, length: int, prompt: tuple[int, ...] = ()) -> dict[tuple, float]:
    """Probability of each continuation of `length` tokens, prompt included in the key; logits one prefix at a time."""
    vocab_size, known = model.config.vocab_size, {}
    total = {}
    for new in itertools.product(range(vocab_size), repeat=length):
        probability = 1.0
        for i, token in enumerate(new):
            prefix = (START, *prompt, *new[:i])
            if prefix not in known:
                known[prefix] = model(torch.tensor([prefix])).logits[0, -1].double().softmax(-1).tolist()
            probability *= known[prefix][token]
        total[(*prompt, *new)] = probability
    return total
