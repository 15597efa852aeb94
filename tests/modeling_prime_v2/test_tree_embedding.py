"""Vectors of the nodes of the code tree: each state has the rows that it should, against loops; rank; refusals."""

import itertools

import pytest
import torch
from networks import small_config, small_model

from prime_v2.tree_embedding_prime_v2 import PrimeV2TreeEmbedding

STAGES = {"reveal_order": "nested", "stage_digits": [1, 3, 4], "base": 2, "num_subtokens": 4}


def leading_states(config) -> torch.Tensor:
    """Every state of the nested order, (N, S)."""
    states = []
    for end in (0, *config.stage_digits):
        for digits in itertools.product(range(config.base), repeat=end):
            states.append([*digits, *[config.base] * (config.num_subtokens - end)])
    return torch.tensor(states)


@pytest.mark.parametrize("base", [2, 3])
def test_ancestors_add_the_vectors_from_the_root(base):
    config = small_config(**{**STAGES, "base": base}, subtoken_embedding="ancestors")
    embedding = PrimeV2TreeEmbedding(config)
    states, ends = leading_states(config), [0, *config.stage_digits]
    assert len(states) == embedding.table.num_embeddings
    row_of = {tuple(state): row for row, state in enumerate(states.tolist())}
    for state, vector in zip(states.tolist(), embedding(states.unsqueeze(0))[0], strict=True):
        known = sum(digit != base for digit in state)
        expected = sum(
            embedding.table.weight[row_of[tuple(state[:end] + [base] * (4 - end))]] for end in ends if end <= known
        )
        torch.testing.assert_close(vector, expected)


def test_vectors_may_stand_at_more_levels_than_the_stages_end():
    fields = {**STAGES, "stage_digits": [3, 4], "subtoken_embedding": "ancestors", "tree_levels": [1, 2, 3, 4]}
    embedding = PrimeV2TreeEmbedding(small_config(**fields))
    states = torch.tensor([[2, 2, 2, 2], [1, 0, 1, 2], [1, 0, 1, 1]])
    first = [0, 1, 3, 7, 15]  # rows before each level: 1, 2, 4, 8 nodes
    paths = [[0], [0, 1 + 1, 3 + 0b10, 7 + 0b101], [0, 1 + 1, 3 + 0b10, 7 + 0b101, 15 + 0b1011]]
    assert first[-1] + 16 == embedding.table.num_embeddings
    for vector, path in zip(embedding(states.unsqueeze(0))[0], paths, strict=True):
        torch.testing.assert_close(vector, embedding.table.weight[path].sum(0))


def test_tokens_share_rows_of_the_head_with_those_of_the_same_nodes():
    model = small_model(**STAGES, head_ancestors=True)
    head, nodes = model.head(), model.head_nodes.table.weight
    for v, code in enumerate(model.code_table.codes[:-1].tolist()):
        shared = nodes[code[0]] + nodes[2 + code[0] * 4 + code[1] * 2 + code[2]]
        torch.testing.assert_close(head[v], model.lm_head.weight[v] + shared)
    ids = torch.arange(6)[None]
    model.train()(ids, labels=ids).loss.backward()
    assert (nodes.grad[:2].abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        ({"subtoken_embedding": "sum"}, 4 + 1),  # S (b - 1) + 1
        ({"subtoken_embedding": "ancestors", **STAGES}, 11),
    ],
)
def test_nodes_lift_the_rank_of_the_token_embeddings(fields, rank):
    """11 tokens in 4 binary digits."""
    model = small_model(**fields)
    vectors = model.model.embed_subtokens(model.encode(torch.arange(11)).unsqueeze(0))[0]
    assert torch.linalg.matrix_rank(vectors.detach().double(), tol=1e-5) == rank


def test_a_model_with_it_trains_samples_and_bounds():
    model = small_model(**STAGES, subtoken_embedding="ancestors", objective="marginal").train()
    ids = torch.arange(12).view(2, 6) % 11
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert model.model.embed_subtokens.table.weight.grad.abs().sum() > 0
    assert set(model.likelihood_methods) == {"nested", "coarse_first", "token", "chain", "orders", "sampler"}
    assert model.log_likelihood(ids, method=model.bound_method, num_samples=4).is_bound
    out = model.generate(torch.tensor([[1, 2]]), max_new_tokens=4, max_denoising_steps=8, seed=0)
    assert out.shape == (1, 6)
    with pytest.raises(ValueError, match="method='subtoken' hides digits in any order, but .*ancestors.*use one of"):
        model.log_likelihood(ids, method="subtoken")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"subtoken_embedding": "ancestors"}, "vectors for leading digits only, .* or subtoken_embedding='sum'"),
        ({**STAGES, "tree_levels": [1, 2, 4]}, r"tree_levels=\[1, 2, 4\] must rise .* hold the stages' ends"),
        ({**STAGES, "tree_levels": [1, 2, 3, 4]}, "is for subtoken_embedding='ancestors' and head_ancestors"),
        ({"head_ancestors": True}, r"needs a level above the tokens, but there is \[4\]"),
        ({**STAGES, "head_ancestors": True, "tie_word_embeddings": True}, "a tied head has no rows of its own"),
        (
            {"vocab_size": 50257, "base": 2, "num_subtokens": 26, "subtoken_embedding": "ancestors",
             "reveal_order": "token", "shuffle_domain": "vocab"},
            "would need 67108865 rows, more than 16777216; use fewer digits",
        ),
    ],
)  # fmt: skip
def test_impossible_embeddings_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        small_config(**fields)
