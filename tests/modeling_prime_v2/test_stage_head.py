"""A head in stages: a law on tokens below every node, and a loss that equals plain loops over children."""

import itertools
from typing import Any

import pytest
import torch
from enumeration import (
    AnyOrder,
    OptimalDenoiser,
    all_sequences,
    correlated_law,
    count_form,
    entropy,
    nats_of_all_masks,
)
from networks import small_model, some_ids
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from prime_v2 import chunked_loss_prime_v2 as chunked
from prime_v2.chunked_loss_prime_v2 import HiddenTokens, hidden_nll, token_nll
from prime_v2.code_table_prime_v2 import PrimeV2CodeTable
from prime_v2.diffusion_prime_v2 import RevealOrder
from prime_v2.linear_prime_v2 import HeadCall
from prime_v2.stage_head_prime_v2 import StageHead, num_rows
from prime_v2.tokenization.codes import tree_codes
from prime_v2.training.flops import measure_flops

# float64 sums of some hundred terms of order 1.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
FORMS = [
    {"vocab_size": 11, "base": 2, "num_subtokens": 4, "ends": (2, 4)},
    {"vocab_size": 11, "base": 2, "num_subtokens": 4, "ends": (1, 3, 4)},
    {"vocab_size": 11, "base": 2, "num_subtokens": 4, "ends": (4,)},
    {"vocab_size": 5, "base": 2, "num_subtokens": 4, "ends": (1, 2, 3, 4)},  # nodes without tokens at every level
    {"vocab_size": 20, "base": 3, "num_subtokens": 3, "ends": (1, 3)},
    {"vocab_size": 7, "base": 7, "num_subtokens": 1, "ends": (1,)},
]


def made(form: dict, shuffle_seed: int = 0) -> tuple[Any, StageHead]:
    """(a code table, a head in stages over it, of width 6 and in float64)."""
    ends = form["ends"]
    fields = {key: value for key, value in form.items() if key != "ends"}
    table = small_model(shuffle_seed=shuffle_seed, **fields).code_table
    torch.manual_seed(1)
    layer = nn.Linear(6, num_rows(table.base, ends, table.vocab_size), bias=False).double()
    return table, StageHead(layer, table, ends)


def children(head: StageHead, table: PrimeV2CodeTable, prefix: tuple[int, ...]) -> dict[tuple[int, ...], int]:
    """The nodes with tokens below a node, by their digits, and each one's row: by loops over the code table."""
    ends = (0, *head.tree.ends)
    level = ends.index(len(prefix))
    first, end = sum(table.base**d for d in ends[1 : level + 1]), ends[level + 1]
    codes = [tuple(code) for code in table.codes[:-1].tolist()]
    nodes = {code[:end] for code in codes if code[: len(prefix)] == prefix}
    if end == table.num_subtokens:
        return {node: first + sorted(codes).index(node) for node in nodes}
    return {node: first + sum(d * table.base**i for i, d in enumerate(reversed(node))) for node in nodes}


def naive_nats(hidden, head, table, token: int, first: int, last: int) -> torch.Tensor:
    """-log p(the token's digits up to `last` | those up to `first`), differentiable."""
    total, ends = hidden.new_zeros(()), (0, *head.tree.ends)
    code = tuple(table.codes[token].tolist())
    for start, end in itertools.pairwise(ends):
        if start >= first and end <= last:
            rows = children(head, table, code[:start])
            scores = {node: hidden @ head.layer.weight[row] for node, row in rows.items()}
            total = total + torch.stack(list(scores.values())).logsumexp(0) - scores[code[:end]]
    return total


def all_cases(head: StageHead, table: PrimeV2CodeTable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, digits visible, digits visible afterwards), every token between every two ends."""
    ends = (0, *head.tree.ends)
    pairs = [(a, b) for a, b in itertools.combinations(ends, 2)]
    cases = [(token, a, b) for token in range(table.vocab_size) for a, b in pairs]
    ids, first, last = torch.tensor(cases).unbind(1)
    return ids, first, last


def loss_of(hidden, head, table, ids, first, last, weights):
    digits = torch.arange(table.num_subtokens)
    tokens = HiddenTokens(ids, digits < first[:, None], weights, digits < last[:, None])
    return hidden_nll(hidden, head, table, tokens, "prefix")


@pytest.mark.parametrize("shuffle_seed", [0, 1])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", [2, 10**6])
def test_loss_and_gradients_equal_loops_over_the_children(form, shuffle_seed, rows, monkeypatch):
    """In chunks of two tokens too, which cut the tokens of one node apart."""
    table, head = made(form, shuffle_seed)
    monkeypatch.setattr(chunked, "chunk_elements", lambda device: rows * table.vocab_size)
    ids, first, last = all_cases(head, table)
    generator = torch.Generator().manual_seed(2)
    shuffled = torch.randperm(len(ids), generator=generator)
    ids, first, last = ids[shuffled], first[shuffled], last[shuffled]
    hidden = torch.randn(len(ids), 6, generator=generator, dtype=torch.double, requires_grad=True)
    weights = torch.rand(len(ids), generator=generator, dtype=torch.double)
    expected = torch.stack(
        [naive_nats(hidden[i], head, table, int(ids[i]), int(first[i]), int(last[i])) for i in range(len(ids))]
    )
    (3 * (expected * weights).sum()).backward()
    gradients = hidden.grad.clone(), head.layer.weight.grad.clone()
    hidden.grad = head.layer.weight.grad = None
    total, nats = loss_of(hidden, head, table, ids, first, last, weights)
    torch.testing.assert_close(nats, expected.detach(), **CLOSE)
    torch.testing.assert_close(total, (expected * weights).sum().detach(), **CLOSE)
    (3 * total).backward()
    torch.testing.assert_close(hidden.grad, gradients[0], **CLOSE)
    torch.testing.assert_close(head.layer.weight.grad, gradients[1], **CLOSE)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_all_tokens_sum_to_one_given_any_visible_node(form):
    """By the fused loss, and as the composed logits have them after the carry-over filter."""
    table, head = made(form)
    hidden = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    codes, logits = table.codes[:-1], head.call(hidden)
    torch.testing.assert_close(logits.exp().sum(), torch.ones((), dtype=torch.double), **CLOSE)
    for end in (0, *head.tree.ends[:-1]):
        for node in {tuple(code) for code in codes[:, :end].tolist()}:
            below = (codes[:, :end] == torch.tensor(node, dtype=torch.long)).all(1).nonzero().squeeze(1)
            first, last = torch.full_like(below, end), torch.full_like(below, table.num_subtokens)
            _, nats = loss_of(hidden.expand(len(below), -1), head, table, below, first, last, torch.ones(len(below)))
            torch.testing.assert_close((-nats).exp().sum(), torch.ones((), dtype=torch.double), **CLOSE)
            torch.testing.assert_close(logits[below].softmax(0), (-nats).exp(), **CLOSE)


def test_with_one_stage_it_is_the_full_head():
    table, head = made(FORMS[2])
    full = head.layer.weight[head.tree.order.argsort()]
    ids = some_ids(1, 40, 11)[0]
    hidden = torch.randn(40, 6, generator=torch.Generator().manual_seed(4), dtype=torch.double)
    torch.testing.assert_close(head.call(hidden), (hidden @ full.T).log_softmax(-1), **CLOSE)
    weights = torch.ones(40, dtype=torch.double)
    for found, expected in zip(
        token_nll(hidden, head, ids, weights), token_nll(hidden, full, ids, weights), strict=True
    ):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_a_head_that_something_acts_on_is_called():
    """A hook, as adapters and offloading have: the loss is that of the composed probabilities, gradients too."""
    table, head = made(FORMS[1])
    ids, first, last = all_cases(head, table)
    hidden = torch.randn(len(ids), 6, dtype=torch.double, requires_grad=True)
    total, nats = loss_of(hidden, head, table, ids, first, last, torch.ones(len(ids), dtype=torch.double))
    total.backward()
    expected, hidden.grad = hidden.grad.clone(), None
    head.layer.register_forward_hook(lambda module, args, output: 1.0 * output)
    called, called_nats = loss_of(hidden, head, table, ids, first, last, torch.ones(len(ids), dtype=torch.double))
    called.backward()
    torch.testing.assert_close(called_nats, nats, **CLOSE)
    torch.testing.assert_close(hidden.grad, expected, **CLOSE)


def test_no_token_is_a_loss_of_zero_with_gradients_of_zero():
    table, head = made(FORMS[0])
    hidden, nothing = torch.zeros(0, 6, dtype=torch.double, requires_grad=True), torch.zeros(0, dtype=torch.long)
    total, nats = loss_of(hidden, head, table, nothing, nothing, nothing, torch.zeros(0))
    total.backward()
    assert total == 0 and nats.shape == (0,) and not head.layer.weight.grad.any() and hidden.grad.shape == (0, 6)


def test_a_second_backward_pass_is_refused():
    table, head = made(FORMS[0])
    hidden = torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    total, _ = token_nll(hidden, head, torch.arange(3), torch.ones(3))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        total.backward()


class StagedDenoiser(OptimalDenoiser):
    """Its "hidden states" are the log-probabilities of all rows' nodes under the law's posterior."""

    def __init__(self, law, codes, length, base, head: StageHead):
        super().__init__(law, codes, length, base)
        self.below = torch.zeros(len(codes), head.layer.out_features, dtype=torch.double)
        for level in head.tree.levels:
            self.below[torch.arange(len(codes)), level.first + level.node] = 1

    def forward(self, states, *args, **kwargs) -> BaseModelOutput:
        tokens = super().forward(states).last_hidden_state.exp()
        return BaseModelOutput(last_hidden_state=(tokens @ self.below).log().clamp(min=self.IMPOSSIBLE))


def optimal_staged(order: dict) -> tuple[Any, torch.Tensor]:
    """(a model whose head in stages gives the conditionals of a law on two of five tokens, the law)."""
    law = correlated_law(5, 2)
    model = small_model(vocab_size=5, base=2, num_subtokens=3, head="stages", **order).double()
    rows = model.lm_head.out_features
    model.lm_head = nn.Linear(rows, rows, bias=False).double()
    model.lm_head.weight = nn.Parameter(torch.eye(rows, dtype=torch.double))
    model.model = StagedDenoiser(law, model.code_table.codes[:-1], 2, 2, model.head())
    return model, law


ORDERS = [
    {"reveal_order": "nested", "stage_digits": [1, 3]},
    {"reveal_order": "nested", "stage_digits": [1, 3], "head_digits": [1, 2, 3]},
    {"reveal_order": "nested", "stage_digits": [3], "head_digits": [2, 3]},
    {"reveal_order": "token"},
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_bound_of_an_optimal_head_equals_the_entropy(order):
    """Tokens and digits that are dependent."""
    model, law = optimal_staged(order)
    nats, counts = nats_of_all_masks(model, all_sequences(5, 2), RevealOrder.from_config(model.config), "marginal")
    assert float((law * count_form(nats, counts)).sum()) == pytest.approx(entropy(law), abs=1e-10)  # sums in float64


@pytest.mark.parametrize("more", [{}, {"head_digits": [1, 2, 3]}], ids=str)
def test_coarse_first_too_has_the_entropy_as_bound_and_the_law_left_to_right(more):
    model, law = optimal_staged({"reveal_order": "coarse_first", "stage_digits": [1, 3], **more})
    found = model.log_likelihood(all_sequences(5, 2), num_samples=100)
    assert found.stderr.eq(0).all() and found.is_bound
    assert -float((law * found.value).sum()) == pytest.approx(entropy(law), abs=1e-10)
    chain = model.log_likelihood(all_sequences(5, 2), method="chain")
    torch.testing.assert_close(chain.value, law.log(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_bound_of_a_random_head_is_never_below_its_exact_value(order):
    """The law that the network defines when units are revealed in a random order, from its logits, by recursion."""
    model = small_model(seed=3, vocab_size=5, base=2, num_subtokens=3, head="stages", **order).double()
    ids = all_sequences(5, 2)
    exact = AnyOrder(model, RevealOrder.from_config(model.config), ids)
    nats, counts = nats_of_all_masks(model, ids, RevealOrder.from_config(model.config), "marginal")
    bound = count_form(nats, counts)
    torch.testing.assert_close(bound, exact.bound, rtol=0, atol=2e-5)  # norms of the network are float32
    assert (bound > exact.nats - 2e-5).all() and (bound - exact.nats).max() > 1e-3
    assert float((-exact.nats).exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_a_step_has_the_products_of_the_children_and_not_of_all_tokens():
    """One hidden token of a tree of 64: 8 rows and 8 rows, each three times, beside the same network."""
    fields = {"vocab_size": 64, "base": 2, "num_subtokens": 6, "reveal_order": "token", "objective": "joint"}
    ids, labels = torch.tensor([[5, 9]]), torch.tensor([[5, -100]])
    counted = {}
    for head in ("full", "stages"):
        model = small_model(head=head, **fields).train()
        counted[head] = measure_flops(lambda model=model: model(ids, labels=labels).loss)
    assert counted["full"] - counted["stages"] == 3 * 2 * 16 * (64 - 8 - 8)


@pytest.mark.parametrize("vocab_size, most", [(512, 0.0), (391, 0.01)])
def test_a_step_costs_the_same_with_shuffled_and_with_grown_codes(vocab_size, most):
    """`prime-v2 compare` counts FLOPs before codes are grown. Full trees have equal nodes, others nearly equal ones.

    The 391 tokens leave 24 or 25 to each of 16 nodes that hold 32, shuffled ones 24 +- 3.
    """
    fields = {
        "vocab_size": vocab_size,
        "base": 2,
        "num_subtokens": 9,
        "reveal_order": "nested",
        "stage_digits": [4, 9],
    }
    ids, counted = some_ids(8, 32, vocab_size), []
    noise = {"noise_keys": torch.arange(8), "noise_levels": torch.linspace(0.1, 0.9, 8, dtype=torch.double)}
    grown = tree_codes(torch.randn(vocab_size, 4, generator=torch.Generator().manual_seed(6)).numpy(), 2, 9)
    for codes in (None, torch.from_numpy(grown)):
        model = small_model(head="stages", objective="joint", **fields).train()
        if codes is not None:
            model.code_table.codes[:-1] = codes
        counted.append(measure_flops(lambda model=model: model(ids, labels=ids, **noise).loss))
    assert abs(counted[1] / counted[0] - 1) <= most


def test_bfloat16_autocast_is_close_to_float32():
    table, head = made(FORMS[1])
    head.layer.float()
    ids, first, last = all_cases(head, table)
    hidden = torch.randn(len(ids), 6, requires_grad=True)
    total, _ = loss_of(hidden, head, table, ids, first, last, torch.ones(len(ids)))
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = loss_of(hidden, head, table, ids, first, last, torch.ones(len(ids)))
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(total.item(), rel=2e-2)  # 8 bits, scores of order 1


BAD = [
    (
        {"head": "stages"},
        "reveal_order='digit' shows any digits; use reveal_order='nested', 'coarse_first' or 'token'",
    ),
    ({"head": "classes"}, "head='classes' is not one of full, stages"),
    ({"reveal_order": "token", "head_digits": [2, 4]}, r"head_digits=\[2, 4\] is for head='stages', not 'full'"),
    ({"reveal_order": "token", "head": "stages", "head_digits": [2, 3]}, r"head_digits=\[2, 3\] must rise"),
    ({"reveal_order": "token", "head": "stages", "tie_word_embeddings": True}, "use tie_word_embeddings=False"),
    ({"reveal_order": "token", "head": "stages", "carry_over": False}, "use True"),
    (
        {"reveal_order": "token", "head": "stages", "head_ancestors": True, "tree_levels": [2, 4]},
        "head='stages' with head_ancestors=True",
    ),
    (
        {"reveal_order": "nested", "stage_digits": [2, 4], "head": "stages", "head_digits": [3, 4]},
        r"head_digits=\[3, 4\] must rise .* and hold the stages' ends \[2, 4\]",
    ),
]


@pytest.mark.parametrize("fields, why", BAD, ids=str)
def test_heads_that_cannot_be_are_refused(fields, why):
    with pytest.raises(Exception, match=why):
        small_model(**fields)


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"head": "stages"}, "head='stages' needs codes, but num_subtokens=1 leaves tokens whole"),
        ({"subtoken_embedding": "ancestors"}, "subtoken_embedding='ancestors' needs codes"),
        ({"num_subtokens": 4, "base": 2, "tree_levels": [2, 4]}, "is for subtoken_embedding='ancestors'"),
    ],
    ids=str,
)
def test_what_an_arm_cannot_have_is_refused(fields, why):
    with pytest.raises(Exception, match=why):
        small_model("arm", **fields)


def test_digits_that_are_visible_in_any_order_take_the_composed_probabilities():
    """A bound over any digits of a model in stages: that of the full head with the same probabilities."""
    model = small_model(reveal_order="nested", stage_digits=[2, 4], head="stages", num_subtokens=4)
    assert "subtoken" in model.likelihood_methods
    head = model.head()
    composed = HeadCall(head.call, head.vocab_size)
    model.head = lambda: composed
    expected = model.log_likelihood(some_ids(2, 3), method="subtoken").value
    del model.head
    torch.testing.assert_close(model.log_likelihood(some_ids(2, 3), method="subtoken").value, expected)


@pytest.mark.parametrize("trained", ["all of it", "the head only"])
def test_a_second_backward_pass_is_refused_and_gives_no_gradient_of_zero(trained):
    """The gradients are formed once, those of the rows after the network's (`LateGradient`)."""
    model = small_model(
        head="stages", objective="joint", vocab_size=64, num_subtokens=6, reveal_order="nested", stage_digits=[3, 6]
    ).train()
    model.model.requires_grad_(trained == "all of it")
    ids = some_ids(1, 8, 64)
    loss = model(ids, labels=ids, noise_keys=torch.arange(1), noise_levels=torch.tensor([0.5]).double()).loss
    loss.backward(retain_graph=True)
    assert model.lm_head.weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="already taken; compute the loss again"):
        loss.backward()
