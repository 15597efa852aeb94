"""What `log_likelihood` promises whatever the family and the method. A new entry of `FAMILIES` falls under all of it.

The values themselves are held against enumerated ones in the files of the families.
"""

import tracemalloc

import pytest
import torch
from enumeration import all_sequences
from networks import KINDS, LIMIT, VOCAB_SIZE, fresh_network, network, padded, some_ids

# float32 networks: batches of other shapes round differently, some 1e-6 a logit, times weights of up to n + 1.
NETWORK = {"rtol": 1e-5, "atol": 1e-4}
CASES = [(kind, method) for kind in KINDS for method in network(kind).likelihood_methods]
ROWS = [some_ids(1, length, seed=length)[0] for length in (3, 7, 1, 5, 9, 2)]


@pytest.fixture(params=CASES, ids=[f"{kind} by {method}" for kind, method in CASES])
def case(request):
    """(the network, `log_likelihood` by a method with 4 samples, whether it draws them)."""
    kind, method = request.param
    model = network(kind)

    def score(ids, mask=None, **options):
        return model.log_likelihood(ids, mask, **{"method": method, "num_samples": 4, **options})

    return model, score, bool((score(some_ids(1, 9)).stderr > 0).all())


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param


def test_the_result_is_a_float64_value_a_sequence(case):
    model, score, _ = case
    found = score(some_ids(3, 5))
    for name in ("value", "stderr", "degrees"):
        each = getattr(found, name)
        assert each.shape == (3,) and each.dtype == torch.float64 and not each.requires_grad, name
    assert (found.value < 0).all() and (found.stderr >= 0).all()
    assert found.num_scored.tolist() == [5] * 3 and (found.num_forward >= 1).all()
    assert isinstance(found.is_bound, bool) and found.samples is None


def test_the_orders_of_a_text_are_not_kept_in_memory(case):
    """9 tokens have 362,880 orders, which took 50 MB, and 12 of them 60 GB."""
    _, score, _ = case
    ids = some_ids(1, 9)
    score(ids)  # what is made once
    tracemalloc.start()
    score(ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_padding_batch_and_order_change_no_value(case):
    _, score, _ = case
    alone = [score(row[None]) for row in ROWS]
    value, stderr = (torch.cat([getattr(each, name) for each in alone]) for name in ("value", "stderr"))
    for side in ("left", "right", "inside"):
        ids, mask = padded(ROWS, side, 10, fill=99)
        found = score(ids, mask)
        torch.testing.assert_close(found.value, value, **NETWORK)
        torch.testing.assert_close(found.stderr, stderr, equal_nan=True, **NETWORK)
        assert found.num_scored.tolist() == [len(row) for row in ROWS]
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    torch.testing.assert_close(score(ids[order], mask[order]).value, value[order], **NETWORK)


def test_the_size_of_a_forward_pass_changes_no_value(case):
    model, score, _ = case
    ids, mask = padded(ROWS, "right", 9)
    whole, shapes = score(ids, mask), []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append((args[0] if args else kwargs["input_ids"]).shape[:2]),
        with_kwargs=True,
    )
    for tokens_per_pass in (1, 7, 20, 64):
        shapes.clear()
        pieces = score(ids, mask, tokens_per_pass=tokens_per_pass)
        torch.testing.assert_close(pieces.value, whole.value, **NETWORK)
        torch.testing.assert_close(pieces.stderr, whole.stderr, equal_nan=True, **NETWORK)
        assert torch.equal(pieces.num_forward, whole.num_forward)
        assert all(rows == 1 or rows * width <= tokens_per_pass for rows, width in shapes)
        assert sum(rows for rows, _ in shapes) == whole.num_forward.sum()
    hook.remove()


def test_a_prompt_is_given_and_not_scored(case):
    """Wherever it stands: the value depends on it, and is not that of the whole text."""
    _, score, _ = case
    ids, prompt = some_ids(2, 6), torch.tensor([[1, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % VOCAB_SIZE
    found = score(ids, prompt_mask=prompt)
    assert found.num_scored.tolist() == [4, 3]
    assert (found.value != score(ids).value).all()
    keys = torch.arange(2)
    changed = [score(each, prompt_mask=prompt, keys=keys).value for each in (ids, other)]
    assert (changed[0] != changed[1]).all()


def test_a_seed_gives_its_samples_and_another_others_and_torchs_generator_is_left_alone(case):
    _, score, draws = case
    ids, state = some_ids(3, 9), torch.get_rng_state()
    first, again, other = (score(ids, seed=seed).value for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert (first != other).all() if draws else torch.equal(first, other)


def test_keys_decide_the_samples_whatever_the_row(case):
    _, score, draws = case
    ids, keys = some_ids(1, 9).expand(3, -1), torch.tensor([7, 8, 7])
    value = score(ids, keys=keys).value
    torch.testing.assert_close(value[0], value[2], **NETWORK)
    assert not draws or abs(value[0] - value[1]) > 1e-3


def test_a_further_round_has_other_samples_where_there_are_any(case, request):
    _, score, draws = case
    ids, keys = some_ids(2, 9), torch.arange(2)
    if not draws or request.node.callspec.id.endswith(("by orders", "by sampler")):  # of which it is no mean
        with pytest.raises(ValueError, match="round_number=1 of method="):
            score(ids, round_number=1)
        return
    first, second = (score(ids, keys=keys, round_number=each, return_samples=True) for each in (0, 1))
    for samples in (first.samples[0], second.samples[0]):
        assert len(samples) == 4 and samples.dtype == torch.float64
    assert not torch.equal(first.samples[0], second.samples[0])


def test_the_mean_of_the_samples_is_the_value(case):
    _, score, _ = case
    found = score(some_ids(3, 6), num_samples=5, return_samples=True)
    torch.testing.assert_close(torch.stack([each.mean() for each in found.samples]), found.value)


def test_a_method_that_draws_nothing_gives_a_law_on_sequences(case):
    _, score, draws = case
    if not draws:
        total = score(all_sequences(VOCAB_SIZE, 2)).value.exp().sum().item()
        assert total == pytest.approx(1, abs=1e-4)  # 121 float32 products of two softmaxes


def test_a_sum_over_all_that_could_be_drawn_has_no_error(case):
    """Two tokens, and as many samples as there could be states."""
    _, score, draws = case
    found = score(some_ids(2, 2), num_samples=300)
    if draws and not found.stderr.any():
        assert found.degrees.isinf().all()
        drawn = score(some_ids(2, 2), num_samples=300, exhaustive=False)
        assert (drawn.stderr > 0).all() and ((drawn.value - found.value).abs() < 5 * drawn.stderr).all()


def test_the_mode_is_kept_and_dropout_is_off(kind):
    model, ids = fresh_network(kind, attention_dropout=0.5), some_ids()
    target = torch.arange(7).expand(3, -1) >= 4
    expected = model.log_likelihood(ids, num_samples=4).value
    matches = model.greedy_matches(ids, None, target).matches
    model.train()
    assert torch.equal(model.log_likelihood(ids, num_samples=4).value, expected)
    assert torch.equal(model.greedy_matches(ids, None, target).matches, matches)
    assert model.training


def test_the_default_is_the_model_s_own_bound(kind):
    model, ids = network(kind), some_ids()
    assert model.bound_method in model.likelihood_methods
    default, bound = (model.log_likelihood(ids, num_samples=4, method=each) for each in (None, model.bound_method))
    assert default.is_bound and torch.equal(default.value, bound.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_network_that_is_not_finite_gives_an_error_and_no_number(kind, value):
    model, ids = fresh_network(kind), some_ids()
    with torch.no_grad():
        model.model.norm.weight[0] = value
    for method in model.likelihood_methods:
        with pytest.raises(ValueError, match="the network's logits are not finite"):
            model.log_likelihood(ids, method=method, num_samples=4)


IDS = torch.tensor([[1, 2], [3, 4]])
BAD_INPUT = {
    "method": ({"method": "nelbo"}, "method='nelbo' is not "),
    "samples": ({"num_samples": 0}, "num_samples=0 must be an integer of at least 1; use 1"),
    "large id": ({"input_ids": torch.tensor([[1, VOCAB_SIZE]])}, r"token ids span \[1, 11\], .* in \[0, 10\]"),
    "negative id": ({"input_ids": torch.tensor([[-1, 2]])}, r"token ids span \[-1, 2\]"),
    "one axis": ({"input_ids": torch.tensor([1, 2])}, r"input_ids has shape \(2,\); give \(B, L\)"),
    "no row": ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"input_ids has shape \(0, 4\); give \(B, L\)"),
    "no token": ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"input_ids has shape \(2, 0\); give \(B, L\)"),
    "too long": ({"input_ids": some_ids(1, LIMIT + 1)}, "13 tokens, but max_position_embeddings=12; cut it to 12"),
    "floats": ({"input_ids": torch.tensor([[0.5, 1.0]])}, "token ids must be integers, not torch.float32"),
    "mask": ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\), but input_ids \(2, 2\)"),
    "prompt": ({"prompt_mask": torch.ones(2, 1)}, r"prompt_mask has shape \(2, 1\), but input_ids \(2, 2\)"),
    "padding": ({"attention_mask": torch.tensor([[1, 1], [0, 0]])}, "row 1 has no token to score .* drop that row"),
    "all given": ({"prompt_mask": torch.tensor([[1, 1], [0, 0]])}, "row 0 has no token to score .* drop that row"),
    "round": ({"num_samples": 3, "round_number": 2}, "round_number=2 "),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused(kind, case):
    arguments, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        network(kind).log_likelihood(**{"input_ids": IDS, **arguments})
