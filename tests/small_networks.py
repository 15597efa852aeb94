"""Random networks small enough to sample from thousands of times, for the tests of `generate`."""

import pytest
import torch

from prime_v2 import PrimeV2Config
from prime_v2.modeling_prime_v2 import PrimeV2ForMaskedDiffusion

ORDERS = {
    "digit": {},
    "token": {"reveal_order": "token"},
    "nested": {"reveal_order": "nested", "stage_digits": [1, 2]},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The networks here are too small to share: on a busy machine a second thread makes them 70 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_model(vocab_size=50, seed=0, **kwargs) -> PrimeV2ForMaskedDiffusion:
    """A random network whose logits vary by about 1, so that its distribution is far from uniform."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}
    config = PrimeV2Config(vocab_size=vocab_size, max_position_embeddings=32, **(shape | kwargs))
    return PrimeV2ForMaskedDiffusion(config).eval()


def prompts(rows, width, vocab_size=50, seed=1):
    return torch.randint(vocab_size, (rows, width), generator=torch.Generator().manual_seed(seed))
