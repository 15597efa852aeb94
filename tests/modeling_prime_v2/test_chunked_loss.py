"""The chunked head against full logits and loops: values, gradients, memory, extreme logits, autocast."""

import pytest
import torch
from enumeration import naive_nats
from networks import small_config, small_model
from observers import LargestTensor

from prime_v2 import chunked_loss_prime_v2 as chunked_loss_prime_v2
from prime_v2.chunked_loss_prime_v2 import HiddenTokens, hidden_nll
from prime_v2.code_table_prime_v2 import PrimeV2CodeTable
from prime_v2.diffusion_prime_v2 import RevealOrder, draw_noise

KINDS = ["token", "digits", "prefix"]
WINDOWS = {"reveal_order": "windows", "stage_digits": [1, 4], "stage_windows": [[0, 0.75], [0.25, 1]]}
TABLES = [
    {"vocab_size": 11, "base": 2, "num_subtokens": 4},
    {"vocab_size": 11, "base": 2, "num_subtokens": 6},
    {"vocab_size": 20, "base": 3, "num_subtokens": 3},
    {"vocab_size": 7, "base": 7, "num_subtokens": 1},
]
# float64 sums of at most 20 terms of order 1, weights up to 10.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}


def table_of(**fields) -> PrimeV2CodeTable:
    table = PrimeV2CodeTable(small_config(**fields))
    table.codes.copy_(table.build())
    return table


def some_tokens(table, count: int, kind: str, seed: int = 0) -> HiddenTokens:
    """Random ids and visible digits, at least one hidden, with weights as of a small noise level."""
    generator = torch.Generator().manual_seed(seed)
    digits = table.num_subtokens
    ids = torch.randint(table.vocab_size, (count,), generator=generator)
    weights = 1 + 9 * torch.rand(count, generator=generator, dtype=torch.double)
    if kind != "prefix":
        visible = torch.rand(count, digits, generator=generator) < 0.5
        visible[torch.arange(count), torch.randint(digits, (count,), generator=generator)] = False
        return HiddenTokens(ids, visible, weights)
    order = RevealOrder("nested", digits, tuple(range(1, digits + 1)))
    hidden_count = torch.randint(1, digits + 1, (count,), generator=generator)
    visible = order.visible_digits(torch.arange(digits) < hidden_count.unsqueeze(1))
    return HiddenTokens(ids, visible, weights, order.next_visible(hidden_count))


def states_and_head(table, count: int, width: int = 5, dtype=torch.double, scale: float = 1.0):
    generator = torch.Generator().manual_seed(7)
    hidden_states = scale * torch.randn(count, width, generator=generator, dtype=torch.double)
    head = torch.randn(table.vocab_size, width, generator=generator, dtype=torch.double)
    return hidden_states.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()


def both_forms(table, kind, carry_over=True, count=23, dtype=torch.double, scale=1.0):
    """[loss, nats, gradient of hidden states, gradient of head] of the chunked form and of float64 autograd."""
    tokens = some_tokens(table, count, kind)
    results = []
    for form in (dtype, torch.double):
        hidden_states, head = (
            each.detach().to(form).requires_grad_() for each in states_and_head(table, count, dtype=dtype, scale=scale)
        )
        if not results:
            loss, nats = hidden_nll(hidden_states, head, table, tokens, kind, carry_over)
        else:
            nats = naive_nats(
                hidden_states,
                head,
                table.codes[:-1],
                tokens.ids,
                tokens.visible,
                kind,
                carry_over,
                tokens.target_digits,
            )
            loss = (nats * tokens.weights).sum()
        # A factor that is not 1, as accumulation or the division by the number of tokens gives.
        gradients = torch.autograd.grad(loss * 0.37, [hidden_states, head])
        results.append([each.detach().double() for each in (loss, nats, *gradients)])
    return results


@pytest.mark.parametrize("carry_over", [True, False])
@pytest.mark.parametrize("fields", TABLES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_those_of_full_logits(kind, fields, carry_over):
    for chunked, naive in zip(*both_forms(table_of(**fields), kind, carry_over), strict=True):
        torch.testing.assert_close(chunked, naive, **FLOAT64)


@pytest.mark.parametrize("rows", [1, 2, 7, 22, 23, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_the_chunks_changes_nothing(kind, rows, monkeypatch):
    table = table_of(**TABLES[0])
    monkeypatch.setattr(chunked_loss_prime_v2, "CHUNK_ELEMENTS_CPU", rows * table.vocab_size + 1)
    for chunked, naive in zip(*both_forms(table, kind), strict=True):
        torch.testing.assert_close(chunked, naive, **FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close_to_float64(kind):
    # float32 carries 6e-8; logits reach 10, and 23 rows are summed.
    for chunked, naive in zip(*both_forms(table_of(**TABLES[1]), kind, dtype=torch.float32), strict=True):
        torch.testing.assert_close(chunked, naive, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
@pytest.mark.parametrize("scale", [30.0, 1000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_marginals_too_small_for_a_softmax_are_exact(kind, scale, dtype):
    """Logits hundreds to thousands apart: probabilities down to e**-5000 and beyond, where every softmax is 0."""
    table = table_of(**TABLES[1])
    chunked, naive = both_forms(table, kind, dtype=dtype, scale=scale)
    assert naive[1].max() > 1.5 * scale
    # Rounding is relative to the largest logit, 10 times the scale; the gradients of the head carry hidden states.
    absolute = (2e-6 if dtype == torch.float32 else 1e-13) * 10 * scale
    torch.testing.assert_close(chunked[1], naive[1], rtol=1e-6, atol=absolute)
    torch.testing.assert_close(chunked[0], naive[0], rtol=1e-6, atol=100 * absolute)
    for ours, reference in zip(chunked[2:], naive[2:], strict=True):
        assert ours.isfinite().all()
        assert (ours - reference).norm() < (1e-2 if dtype == torch.float32 else 1e-9) * reference.norm()


def test_a_marginal_of_one_times_ten_to_the_minus_27_is_not_cut_off():
    """Between float32's smallest softmax and the threshold of the exact path, on both of its sides."""
    table = table_of(vocab_size=2, base=2, num_subtokens=1, shuffle_ratio=0.0)
    for gap in (40.0, 57.0, 58.0, 62.0, 80.0, 100.0, 700.0, 5000.0):
        hidden_states = torch.tensor([[gap, 0.0]])
        tokens = HiddenTokens(torch.tensor([1]), torch.tensor([[False]]), torch.ones(1))
        _, nats = hidden_nll(hidden_states, torch.eye(2), table, tokens, "digits")
        assert nats.item() == pytest.approx(gap, rel=1e-6)  # log(1 + e**-gap) is below e**-40


def test_no_gradient_is_computed_where_none_is_asked(monkeypatch):
    asked = []

    class Spy(chunked_loss_prime_v2._Chunk):
        def __init__(self, table, kind, carry_over, need_gradient, dtype):
            asked.append(need_gradient)
            super().__init__(table, kind, carry_over, need_gradient, dtype)

    monkeypatch.setattr(chunked_loss_prime_v2, "_Chunk", Spy)
    table = table_of(**TABLES[0])
    tokens = some_tokens(table, 3, "digits")
    hidden_states, head = states_and_head(table, 3)
    with torch.no_grad():
        hidden_nll(hidden_states, head, table, tokens, "digits")
    hidden_nll(hidden_states.detach(), head.detach(), table, tokens, "digits")
    hidden_nll(hidden_states, head.detach(), table, tokens, "digits")[0].backward()
    assert asked == [False, False, True]
    assert hidden_states.grad is not None
    assert head.grad is None


def test_gradients_of_the_head_alone():
    """A frozen backbone."""
    table = table_of(**TABLES[0])
    tokens = some_tokens(table, 5, "digits")
    hidden_states, head = states_and_head(table, 5)
    both = torch.autograd.grad(hidden_nll(hidden_states, head, table, tokens, "digits")[0], head)[0]
    alone = torch.autograd.grad(hidden_nll(hidden_states.detach(), head, table, tokens, "digits")[0], head)[0]
    torch.testing.assert_close(alone, both, rtol=0, atol=0)


def test_no_hidden_token_is_a_loss_of_zero_with_gradients_of_zero():
    """The time form may hide nothing; every rank must still take part in the all-reduce."""
    table = table_of(**TABLES[0])
    hidden_states, head = states_and_head(table, 0)
    tokens = HiddenTokens(torch.empty(0, dtype=torch.long), torch.empty(0, 4, dtype=torch.bool), torch.empty(0))
    loss, nats = hidden_nll(hidden_states, head, table, tokens, "digits")
    loss.backward()
    assert loss.item() == 0
    assert len(nats) == 0
    assert (head.grad == 0).all()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='words' is not one of"):
        hidden_nll(torch.ones(1, 2), torch.ones(11, 2), table_of(**TABLES[0]), None, "words")


def test_a_second_derivative_is_refused():
    table = table_of(**TABLES[0])
    hidden_states, head = states_and_head(table, 3)
    loss, _ = hidden_nll(hidden_states, head, table, some_tokens(table, 3, "token"), "token")
    (gradient,) = torch.autograd.grad(loss.square(), head, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_second_backward_pass_is_refused():
    """The first scales the gradients where they lie."""
    table = table_of(**TABLES[0])
    hidden_states, head = states_and_head(table, 3)
    loss, _ = hidden_nll(hidden_states, head, table, some_tokens(table, 3, "token"), "token")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken; compute the loss again"):
        loss.backward()


# In the model


def model_and_batch(batch: int = 3, length: int = 6, **fields):
    model = small_model(**fields)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    noise = {
        "noise_keys": torch.arange(batch),
        "noise_levels": (torch.arange(batch, dtype=torch.double) + 0.5) / batch,
    }
    return model, ids, noise


def naive_loss(model, ids, noise_keys, noise_levels):
    """The model's own definition of its loss from full logits, in one expression per token."""
    config, order = model.config, RevealOrder.from_config(model.config)
    noise = draw_noise(torch.ones_like(ids, dtype=torch.bool), order, noise_keys, noise_levels, config.noise_form)
    states = torch.where(noise.visible, model.encode(ids), config.base)
    hidden_states = model.model(states).last_hidden_state
    kind = {"joint": "token", "marginal": {"digit": "digits", "token": "token"}.get(order.kind, "prefix")}
    total = 0.0
    # Without carry-over the paper's loss has a term for the tokens that are seen whole too.
    everywhere = config.objective == "joint" and order.kind == "digit" and not config.carry_over
    asked, staged, weight = torch.ones_like(ids) if everywhere else noise.hidden_count, bool(order.stage_digits), None
    if order.kind in ("coarse_first", "windows"):
        eligible, hidden = noise.eligible_count, noise.hidden_count
        asked = eligible if config.objective == "marginal" else hidden
        units = ids.shape[1] * order.units_per_token
        weight = [units / int(each) for each in asked.sum(1)]  # the count form: n / e, for the joint n / k
    for row, column in asked.nonzero().tolist():
        hidden = noise.hidden_count[row, column]
        nats = naive_nats(
            hidden_states[row, column][None],
            model.head(),
            model.code_table.codes[:-1],
            ids[row, column][None],
            noise.visible[row, column][None],
            kind[config.objective],
            config.carry_over,
            order.next_visible(hidden[None]) if staged else None,
        )
        if staged and config.objective == "marginal":
            nats = nats * asked[row, column]
        total = total + nats * ((weight or noise.weight)[row] if config.loss_weight == "elbo" else 1)
    return total.squeeze() / ids.numel()


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": "joint"},
        {"objective": "marginal"},
        {"objective": "marginal", "carry_over": False},
        {"objective": "marginal", "loss_weight": "low_variance", "noise_form": "time"},
        {"objective": "joint", "carry_over": False},
        {"objective": "joint", "reveal_order": "token", "carry_over": False},
        {"objective": "marginal", "reveal_order": "nested", "stage_digits": [1, 3, 4]},
        {"objective": "marginal", "reveal_order": "coarse_first", "stage_digits": [1, 3, 4]},
        {"objective": "joint", "reveal_order": "coarse_first", "stage_digits": [1, 3, 4]},
        {"objective": "joint", "reveal_order": "coarse_first", "stage_digits": [2, 4], "loss_weight": "low_variance"},
        {"objective": "marginal", **WINDOWS},
        {"objective": "joint", **WINDOWS, "subtoken_embedding": "ancestors"},
        {"objective": "marginal", "tie_word_embeddings": True, "noise_form": "time"},
        {"objective": "joint", "tie_word_embeddings": True, "subtoken_embedding": "concat"},
        {"objective": "marginal", "vocab_size": 7, "base": 7},
    ],
    ids=str,
)
def test_loss_and_gradient_of_every_parameter_equal_those_of_full_logits(fields):
    model, ids, noise = model_and_batch(**fields)
    model.double()
    loss = model(ids, labels=ids, **noise).loss
    expected = naive_loss(model, ids, **noise)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    references = torch.autograd.grad(expected, parameters)
    # The norms compute in float32.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0, check_dtype=False)
    for name, gradient, reference in zip(names, gradients, references, strict=True):
        error = (gradient - reference).norm() / reference.norm().clamp(min=1e-3)
        assert error < 1e-4, name


@pytest.mark.parametrize("objective", ["joint", "marginal"])
def test_bfloat16_autocast_is_close_to_float32(objective):
    """A tiny size: bfloat16 products are slow on many processors."""
    model, ids, noise = model_and_batch(objective=objective, scale=0.1)
    model.train()
    full = model(ids, labels=ids, **noise).loss
    full.backward()
    reference = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids, **noise).loss
    loss.backward()
    assert loss.dtype == torch.float32
    # bfloat16 rounds to 2**-9; a loss of a few nats of some hidden states off by a few roundings each.
    torch.testing.assert_close(loss, full, rtol=0.02, atol=0)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - reference[name]).norm() / reference[name].norm()
        assert error < 0.15, name


@pytest.mark.parametrize("fields", [{"objective": "joint"}, {"objective": "marginal"}], ids=str)
def test_a_training_step_never_holds_a_tensor_of_batch_by_length_by_vocabulary(fields, monkeypatch):
    vocab_size = 1024
    model, ids, noise = model_and_batch(4, 32, vocab_size=vocab_size, **fields)
    monkeypatch.setattr(chunked_loss_prime_v2, "CHUNK_ELEMENTS_CPU", 8 * vocab_size)
    limit = ids.numel() * vocab_size  # 131,072; the next largest, the parameters of the head, are 16,384
    # The lowest level hides one digit in all; take levels at which nearly every token has a hidden digit.
    noise["noise_levels"] = torch.full((4,), 0.9, dtype=torch.double)
    with LargestTensor() as chunked:
        model(ids, labels=ids, **noise).loss.backward()
    assert 8 * vocab_size <= chunked.numel <= limit / 4
    with LargestTensor() as full:
        torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()
    assert full.numel >= limit, "the check sees full logits where there are any"
