"""Interpolating diffusion with codes: embeddings of digits or of a tree, and a head in stages, against plain loops.

The reference runs the network once for each conditional, on a row of the tokens that it may see.
"""

import pytest
import torch
from chi_square import ROWS, assert_follows
from enumeration import all_sequences, decoding_orders
from networks import small_interpolating, some_ids, some_noise

from prime_v2.families import label_of, rows_of_sequence

SUM = {"vocab_size": 5, "num_subtokens": 3, "base": 2}
TREE = {**SUM, "subtoken_embedding": "ancestors", "tree_levels": [1, 3], "head": "stages", "head_digits": [1, 3]}
FORMS = {"sum": SUM, "tree": TREE, "tree, full head": {**TREE, "head": "full", "head_digits": None}}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # norms and rotary angles are float32
ALL = 10_000  # draws that no test case has as many rows as


@pytest.fixture(params=list(FORMS))
def model(request):
    return small_interpolating(seed=3, **FORMS[request.param]).double()


def log_law(model, known: list[tuple[int, int]], place: int) -> torch.Tensor:
    """log p (V,) of the token at `place` given `known` tokens, (place, id) in the order in which they became known."""
    codes = model.code_table.codes
    states = codes[torch.tensor([[*(id for _, id in known), model.config.vocab_size]])]
    embedded = model.model.embed_subtokens(states)
    triangle = torch.full((1, 1, len(known) + 1, len(known) + 1), -torch.inf, dtype=embedded.dtype).triu(1)
    places = torch.tensor([[*(where for where, _ in known), place]])
    return model.token_logits(model.model.run_layers(embedded, places, triangle)[0, -1]).log_softmax(-1)


def nll_of_order(model, ids: list[int], scored: list[bool], order: tuple[int, ...]) -> torch.Tensor:
    """-log p of the scored tokens revealed in `order`, numbers among the scored ones."""
    places = [i for i, each in enumerate(scored) if each]
    known = [(i, id) for i, id in enumerate(ids) if not scored[i]]
    total = torch.zeros((), dtype=torch.double)
    for place in (places[number] for number in order):
        total = total - log_law(model, known, place)[ids[place]]
        known.append((place, ids[place]))
    return total


def test_probabilities_of_all_texts_sum_to_one(model):
    log_p = model.log_likelihood(all_sequences(5, 3), method="chain").value
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_the_bound_is_the_expectation_over_orders_of_a_plain_loop(form, alpha_0):
    """With a given token in the middle, and with padding on the left."""
    model = small_interpolating(seed=3, alpha_0=alpha_0, **FORMS[form]).double()
    ids, prompt = torch.tensor([[0, 3, 1, 4, 2], [2, 0, 4, 4, 1]]), torch.tensor([[0, 0, 1, 0, 0], [0] * 5])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1] * 5])
    found = model.log_likelihood(ids, mask, prompt, num_samples=ALL)
    for row in range(2):
        kept = mask[row].bool()
        scored, text = (prompt[row][kept] == 0).tolist(), ids[row][kept].tolist()
        orders = decoding_orders(sum(scored), alpha_0)
        expected = sum(chance * nll_of_order(model, text, scored, order) for chance, order, _ in orders)
        torch.testing.assert_close(-found.value[row], expected.detach(), **CLOSE)
    assert found.is_bound and found.is_exact == (alpha_0 == 0)


def test_rows_are_counted_before_they_are_run(model):
    ids = torch.tensor([[3, 1, 4, 0, 2]])
    for method, num_samples in (("interpolating", 7), ("chain", 7)):
        found = model.log_likelihood(ids, method=method, num_samples=num_samples)
        assert found.num_forward.tolist() == [rows_of_sequence(model.config, method, 5, num_samples)]


def test_the_gradient_of_the_left_to_right_loss_is_that_of_a_plain_loop():
    """alpha_0 = 0 draws nothing. The terms of the diffusion are the same calls (test_interpolating_training.py)."""
    model = small_interpolating(seed=3, alpha_0=0.0, **TREE).double()
    ids = some_ids(3, 4, 5)
    loss = model(ids, labels=ids, **some_noise(3)).loss
    expected = sum(nll_of_order(model, row, [True] * 4, (0, 1, 2, 3)) for row in ids.tolist()) / ids.numel()
    torch.testing.assert_close(loss, expected, **CLOSE)
    gradients = [torch.autograd.grad(each, model.parameters()) for each in (loss, expected)]
    for (name, _), ours, theirs in zip(model.named_parameters(), *gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9, name


@pytest.mark.parametrize("use_cache", [True, False])
def test_samples_follow_the_enumerated_distribution(use_cache):
    """Two tokens, the first steps of which are so many that no two share one (chance 1 in 8,192)."""
    model = small_interpolating(seed=1, num_hidden_layers=1, alpha_0=0.5, scale=0.6, **TREE)
    texts, exact = all_sequences(5, 2), {}
    with torch.no_grad():
        for text in texts.tolist():
            orders = decoding_orders(2, 0.5)
            chances = (
                chance * float((-nll_of_order(model, text, [True] * 2, order)).exp()) for chance, order, _ in orders
            )
            exact[tuple(text)] = sum(chances)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    exact = {text: chance / sum(exact.values()) for text, chance in exact.items()}
    options = {"max_new_tokens": 2, "max_denoising_steps": 4096, "seed": 1, "use_cache": use_cache}
    assert_follows(model.generate(torch.empty(ROWS, 0, dtype=torch.long), **options), exact)


def test_the_deterministic_decode_is_what_greedy_matches_compares_with(model):
    prompt = torch.tensor([[0, 3, 1], [2, 5, 4]])
    out = model.generate(prompt, max_new_tokens=5, do_sample=False)
    target = torch.tensor([[0, 0, 0, *[1] * 5], [0, 1, 0, *[1] * 5]]).bool()
    found = model.greedy_matches(out, None, target)
    assert found.matches.tolist() == [True, True] and found.num_forward.tolist() == [1, 1]
    out[0, 5] = (out[0, 5] + 1) % 5
    assert model.greedy_matches(out, None, target).matches.tolist() == [False, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "stages", "num_subtokens": 1}, "head='stages' needs codes, but num_subtokens=1"),
        ({"subtoken_embedding": "ancestors", "num_subtokens": 1}, "ancestors' needs codes, but num_subtokens=1"),
        ({"tree_levels": [3]}, r"tree_levels=\[3\] is for subtoken_embedding='ancestors'"),
        ({"subtoken_embedding": "ancestors", "tree_levels": [2]}, r"tree_levels=\[2\] must rise .* use e.g. \[3\]"),
        ({"head": "stages", "head_digits": [3, 2]}, r"head_digits=\[3, 2\] must rise"),
        ({"head": "stages", "tie_word_embeddings": True}, "head='stages' with tie_word_embeddings=True"),
    ],
    ids=str,
)
def test_trees_that_cannot_be_are_refused(fields, message):
    base = None if fields.get("num_subtokens") == 1 else 2
    with pytest.raises(Exception, match=message):
        small_interpolating(**{**SUM, "base": base, **fields})


def test_labels_say_how_tokens_are_embedded():
    assert label_of(small_interpolating(**TREE).config) == (
        "interpolating, alpha_0 = 0.5, tree embedding, head in stages"
    )
    assert label_of(small_interpolating(**SUM).config) == "interpolating, alpha_0 = 0.5, sub-token embedding"
    assert label_of(small_interpolating().config) == "interpolating, alpha_0 = 0.5"
