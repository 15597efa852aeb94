"""Any fields of any family's configuration: a model that is a distribution over texts, or a refusal."""

import itertools
import math

import pytest
import torch
from fuzzing import Refusal, attempt, cases, options
from hypothesis import given
from hypothesis import strategies as st

from prime_v2.families import FAMILIES

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8}
NAN, INF = float("nan"), float("inf")
ROPE = [
    None,
    {},
    {"rope_theta": 100.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4, "rope_theta": 1e4},
]
BAD_ROPE = [
    {"rope_type": "spiral"},
    {"rope_type": "yarn"},
    {"rope_type": "linear"},
    {"rope_type": None},
    {"rope_type": "linear", "factor": 0},
    {"rope_type": "linear", "factor": "2"},
    {"rope_type": "llama3", "factor": 2.0},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [], "original_max_position_embeddings": 4},
    {"rope_theta": None},
    {"rope_theta": -1.0},
    {"rope_theta": NAN},
    {"rope_theta": "1e4"},
    {"rope_theta": [1.0]},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    {"partial_rotary_factor": 0.5},
    [1.0],
]
NO_SIZES = [0, -1, -(2**40), 2**40, 10**400, None, 2.5, "8", True, [8], NAN]
NO_SHARES = [-0.5, 1.5, NAN, INF, -INF, "1", [1], None]
GOOD = {
    "hidden_size": [4, 8, 12, 16],
    "intermediate_size": [None, 1, 5, 16],
    "num_hidden_layers": [1, 2],
    "num_attention_heads": [1, 2, 4],
    "num_key_value_heads": [None, 1, 2],
    "head_dim": [None, 2, 6, 7],
    "qk_norm": [False, True],
    "max_position_embeddings": [8, 32],
    "initializer_range": [0.02, 0.5],
    "rms_norm_eps": [1e-6, 1e-5],
    "attention_bias": [False, True],
    "attention_dropout": [0, 0.0, 0.5],
    "mlp_bias": [False, True],
    "tie_word_embeddings": [False, True],
    "eos_token_id": [None, 0, [0]],
    "rope_parameters": ROPE,
}
BAD = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"), NO_SIZES),
    **dict.fromkeys(("intermediate_size", "num_key_value_heads", "head_dim"), [0, -1, 2**40, 3.5, "8", [8], True]),
    "max_position_embeddings": NO_SIZES,
    "attention_dropout": NO_SHARES,
    "rms_norm_eps": [0.0, -1e-5, NAN, INF, None, "1e-5"],
    "initializer_range": [0.0, -0.02, NAN, INF, None, "x"],
    "qk_norm": ["yes", None, 2],
    "tie_word_embeddings": ["no", 7],
    "mask_token_id": [0, -1, 10**9, "x"],
    "rope_parameters": BAD_ROPE,
    "auto_map": [7, ["x"], {"AutoModel": 3}],
}
CODED = {
    "base": [None, 2, 3, 16],
    "num_subtokens": [None, 1, 2, 4, 5],
    "code_source": ["shuffle", "data"],
    "shuffle_seed": [0, -1, 2**70],
    "shuffle_ratio": [0, 0.5, 1.0],
    "shuffle_domain": ["codes", "vocab"],
    "subtoken_embedding": ["sum", "concat", "concat_shared", "ancestors"],
    "tree_levels": [None, [1, 4], [4], [1, 2, 3, 4]],
    "head": ["full", "stages"],
    "head_digits": [None, [1, 4], [4], [1, 2, 3, 4]],
}
BAD_CODED = {
    "base": [0, 1, -2, 2**40, 10**400, 2.0, "2", [2], True],
    "num_subtokens": [0, -1, 62, 63, 10**9, 10**400, 2.0, "2", [2], True],
    "code_source": ["", "text", None, 3],
    "shuffle_seed": [None, 0.5, "0", [0]],
    "shuffle_ratio": NO_SHARES,
    "shuffle_domain": ["", "tokens", None],
    "subtoken_embedding": ["", "mean", None],
    "tree_levels": [[], [0, 4], [4, 1], [-4], [10**9], ["4"], 4],
    "head": ["", "classes", None, True],
    "head_digits": [[], [0, 4], [4, 1], [-4], [10**9], ["4"], 4],
}
LOSS = {"loss_weight": ["elbo", "low_variance"]}
BAD_LOSS = {"loss_weight": ["", "one", None, 1]}
PRIME = {
    "carry_over": [True, False],
    "objective": ["joint", "marginal"],
    "noise_form": ["count", "time"],
    "reveal_order": ["digit", "token", "nested", "coarse_first", "windows"],
    "training_order": [None, "nested", "coarse_first", "windows"],
    "stage_digits": [None, [1], [1, 2], [2, 4], [4], [1, 2, 3, 4]],
    "head_ancestors": [False, True],
    "whole_token_above": [None, 0.5],
}
BAD_PRIME = {
    "carry_over": ["yes", None],
    "objective": ["", "nll", None],
    "noise_form": ["both", None],
    "reveal_order": ["word", None],
    "training_order": ["word", "token", 1],
    "stage_digits": [[], [0], [4, 4], [4, 2], [-1, 4], [10**9], ["a"], [2.5], 3, "4"],
    "whole_token_above": [-0.5, 1.5, NAN, INF, "1"],
}
FIELDS = {
    "prime": (GOOD | CODED | LOSS | PRIME, BAD | BAD_CODED | BAD_LOSS | BAD_PRIME),
    "arm": (GOOD | CODED, BAD | BAD_CODED),
    "uniform": (
        GOOD | LOSS | {"time_conditioning": [True, False], "time_embedding_size": [2, 8]},
        BAD
        | BAD_LOSS
        | {"time_embedding_size": [0, 1, 7, -2, 2**40, "8", None, 2.0], "time_conditioning": ["x", None]},
    ),
    "interpolating": (
        GOOD | LOSS | {"alpha_0": [0, 0.3, 1, 1.0], "ar_share": [None, 0.0, 0.5, 1.0]},
        BAD | BAD_LOSS | {"alpha_0": NO_SHARES, "ar_share": [-0.5, 1.5, NAN, "x"]},
    ),
}


@st.composite
def fields(draw, family):
    """(Fields of a configuration, the text's number of tokens)."""
    chosen, _ = draw(options(*FIELDS[family], most=8))
    shape = SMALL | {"vocab_size": draw(st.integers(1, 7))} | ({"bos_token_id": 0} if family == "arm" else {})
    return shape | chosen, draw(st.integers(1, 2))


@pytest.mark.parametrize("family", list(FIELDS))
def test_a_configuration_gives_a_distribution_or_is_refused(family):
    """Summed over all texts of a length, exp(log-likelihood) is 1 where it is exact and at most 1 where it is a bound.

    To 1e-4: float32 logits, at most 49 texts. The sums know nothing of how the likelihood is computed.
    """

    @cases(25, 1200)
    @given(fields(family))
    def check(case):
        chosen, length = case
        config = attempt(f"config of {family}", lambda: FAMILIES[family].config_class(**chosen))
        if isinstance(config, Refusal):
            return
        again = type(config).from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict()
        torch.manual_seed(0)
        model = FAMILIES[family].model_class(config).eval()
        texts = torch.tensor(list(itertools.product(range(config.vocab_size), repeat=length)))
        loss = model(input_ids=texts, labels=texts).loss
        assert loss.shape == () and loss.isfinite(), loss
        for method in model.likelihood_methods:
            found = model.log_likelihood(texts, method=method, num_samples=2 if method != "chain" else 1)
            total = found.value.exp().sum().item()
            exact = method in ("chain", "causal") or method == "interpolating" and config.alpha_0 == 0
            if exact:
                assert total == pytest.approx(1, abs=1e-4), (method, total)
            elif found.is_bound and not found.stderr.any():  # nothing drawn: the bound itself
                assert total <= 1 + 1e-4, (method, total)
            assert all(math.isfinite(each) for each in found.value)

    check()
