"""The uniform-state network against plain references; its training loss; saving and loading; bad input."""

import math

import pytest
import torch
from enumeration import exact_bound, naive_integrand, naive_posterior
from networks import small_config, small_uniform, some_ids, some_noise
from torch import nn

from prime_v2 import chunked_loss_prime_v2 as chunked_loss_prime_v2
from prime_v2.configuration_prime_v2 import PrimeV2Config
from prime_v2.diffusion_uniform_prime_v2 import draw_noise
from prime_v2.modeling_prime_v2 import PrimeV2Model
from prime_v2.modeling_uniform_prime_v2 import PrimeV2ForUniformDiffusion

# float32 networks of two layers whose logits are of order 1: other orders of summation differ by some 1e-7 a step.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TIMES = torch.tensor([0.05, 0.5, 1.0], dtype=torch.double)


# The network


def test_without_time_it_is_the_network_of_whole_masked_tokens():
    """With the same weights; test_modeling.py holds that one against plain formulas."""
    model = small_uniform(time_conditioning=False).model
    fields = small_config("uniform").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    other = PrimeV2Model(PrimeV2Config(num_subtokens=1, shuffle_ratio=0, **{name: fields[name] for name in names}))
    weights = model.state_dict()
    embedding = weights.pop("embed_tokens.weight")
    missing, unexpected = other.eval().load_state_dict(weights, strict=False)
    assert set(missing) == {"embed_subtokens.table.weight", "code_table.codes"} and not unexpected
    other.embed_subtokens.table.weight.data[:-1] = embedding
    ids = some_ids()
    expected = other(ids.unsqueeze(-1)).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, expected, **CLOSE)
    torch.testing.assert_close(model(ids, TIMES).last_hidden_state, expected, **CLOSE)


def test_times_scale_the_output_of_every_norm():
    """Against sinusoids, layers and norms written out, one row at a time."""
    model, ids = small_uniform().model, some_ids()
    embedding = model.time_embedding
    for row, time in enumerate(TIMES.tolist()):
        angles = [1000.0 * time * 10_000.0 ** (-k / 4) for k in range(4)]
        features = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
        silu = nn.functional.silu
        embedded = silu(embedding.second(silu(embedding.first(features))))
        x = model.embed_tokens(ids[row])[None]
        rotary = model.rotary_emb(x, position_ids=torch.arange(7)[None])
        for layer in model.layers:
            scale = 1 + layer.time_scale.weight @ embedded + layer.time_scale.bias
            first, second = scale[:16], scale[16:]
            attended, _ = layer.self_attn(first * layer.input_layernorm(x), rotary)
            x = x + attended
            x = x + layer.mlp(second * layer.post_attention_layernorm(x))
        expected = model.norm(x) * (1 + model.time_scale.weight @ embedded + model.time_scale.bias)
        torch.testing.assert_close(model(ids, TIMES).last_hidden_state[row], expected[0], **CLOSE)


def test_at_first_the_time_changes_nothing_and_later_it_does():
    ids = some_ids()
    fresh = PrimeV2ForUniformDiffusion(small_config("uniform")).eval()
    for name, parameter in fresh.named_parameters():
        if "time_scale" in name:
            assert (parameter == 0).all(), name
    assert torch.equal(fresh(ids, times=TIMES).logits, fresh(ids, times=1 - TIMES).logits)
    model = small_uniform()
    difference = model(ids, times=TIMES).logits - model(ids, times=TIMES.flip(0)).logits
    assert difference[[0, 2]].abs().amax((1, 2)).min() > 1e-2
    assert (difference[1] == 0).all()


def test_attention_is_bidirectional():
    """The first token's output depends on the last token."""
    model, ids = small_uniform(), some_ids(1)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 11
    difference = model(ids, times=TIMES[:1]).logits - model(changed, times=TIMES[:1]).logits
    assert difference[0, 0].abs().max() > 1e-3


# The loss


def naive_loss(model, ids, noise_keys, noise_levels, scored=None):
    """The model's own definition of its loss from full logits and plain sums, differentiable."""
    scored = torch.ones_like(ids, dtype=torch.bool) if scored is None else scored
    noise = draw_noise(ids, scored, noise_keys, noise_levels, model.config.vocab_size)
    p = model(noise.ids, times=noise.times).logits.double().softmax(-1)
    times = noise.times.unsqueeze(1).expand_as(ids)
    if model.config.loss_weight == "elbo":
        nats = noise.weight.unsqueeze(1) * naive_integrand(p, ids, noise.ids, times)
    else:
        nats = -naive_posterior(p, noise.ids, times).gather(-1, ids.unsqueeze(-1)).squeeze(-1).log()
    return (nats * scored).sum() / scored.sum()


@pytest.mark.parametrize(
    "fields",
    [{}, {"loss_weight": "low_variance"}, {"tie_word_embeddings": True}, {"time_conditioning": False}],
    ids=str,
)
def test_loss_and_gradient_of_every_parameter_equal_those_of_full_logits(fields):
    model, ids, noise = small_uniform(**fields).double(), some_ids(), some_noise()
    loss, expected = model(ids, labels=ids, **noise).loss, naive_loss(model, ids, **noise)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients, references = (torch.autograd.grad(each, parameters) for each in (loss, expected))
    for name, gradient, reference in zip(names, gradients, references, strict=True):
        assert (gradient - reference).norm() <= 1e-9 * reference.norm().clamp(min=1e-3), name


@pytest.mark.parametrize(("fields", "expected"), [({}, True), ({"loss_weight": "low_variance"}, False)], ids=str)
def test_every_loss_says_whether_it_is_a_bound(fields, expected):
    model, ids = small_uniform(**fields), some_ids()
    output = model(ids, labels=ids)
    assert output.is_bound is model.loss_is_bound is expected
    assert output.loss.dtype == torch.float32 and output.logits is None
    assert model(ids, times=TIMES).is_bound is None


def test_the_mean_loss_over_noise_is_the_enumerated_bound():
    """4 standard errors: a false alarm for one seed in 16,000; the seed is fixed."""
    model, ids = small_uniform(vocab_size=4, seed=2), torch.tensor([[1, 3]])
    bound = float(exact_bound(small_uniform(vocab_size=4, seed=2).double(), ids)) / 2
    torch.manual_seed(5)
    with torch.no_grad():
        losses = torch.tensor([model(ids.expand(60, -1), labels=ids.expand(60, -1)).loss.item() for _ in range(50)])
    # Stratified over 60 rows, so the 50 batches are the independent draws.
    assert abs(losses.mean() - bound) < 4 * losses.std() / 50**0.5
    assert losses.std() / 50**0.5 < 0.05


@pytest.fixture
def seen(monkeypatch):
    """(a model, what its network was given: noised ids and times, call by call)."""
    model, given = small_uniform(), []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *args, **kwargs: given.append(args[:2]) or forward(*args, **kwargs)
    )
    return model, given


def test_tokens_with_label_minus_100_and_padding_are_shown_and_not_scored(seen):
    model, given = seen
    ids, mask = some_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    labels = ids.clone()
    labels[:, :2] = -100
    mask[1, 5] = 0
    noise = some_noise(2) | {"noise_levels": torch.full((2,), 0.99, dtype=torch.double)}
    loss = model(ids, mask, labels=labels, **noise).loss
    scored = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    noised, times = given[0]
    assert torch.equal(noised[~scored], ids[~scored])
    assert (noised != ids)[scored].double().mean() > 0.5
    p = model(noised, mask, times=times).logits.double().softmax(-1)
    nats = naive_integrand(p, ids, noised, times.unsqueeze(1).expand_as(ids))
    # All n tokens are replaced: the weight is (n + 1)/n t; 7 tokens are scored.
    weight = torch.tensor([5 / 4, 4 / 3], dtype=torch.double) * times
    expected = (nats * scored * weight.unsqueeze(1)).sum() / 7
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_inputs_that_are_masked_where_labels_are_scored_are_noised_from_the_labels(seen):
    """As other masked language models are called; the network has no embedding for the mask and never sees it."""
    model, given = seen
    ids = some_ids(2, 5)
    masked = torch.where(torch.arange(5) % 2 == 0, 11, ids)
    expected = model(ids, labels=ids, **some_noise(2)).loss
    assert torch.equal(model(masked, labels=ids, **some_noise(2)).loss, expected)
    assert max(int(noised.max()) for noised, _ in given) < 11


def test_noise_comes_from_torchs_generator_and_is_stratified(seen):
    """Of 7 tokens, 4 rows replace k in 0..1, 2..3, 4..5 and 6..7; k is at most the tokens that differ."""
    model, given = seen
    ids, losses = some_ids(4, 7), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(ids, labels=ids).loss.item())
    assert losses[0] == losses[1] != losses[2]
    for seed in range(30):
        torch.manual_seed(seed)
        model(ids, labels=ids)
        changed = (given[-1][0] != ids).sum(1).sort().values
        assert (changed <= torch.tensor([1, 3, 5, 7])).all()


# Transformers' options


@pytest.mark.parametrize("loss_weight", ["elbo", "low_variance"])
def test_bfloat16_autocast_is_close_to_float32(loss_weight):
    """A tiny size: bfloat16 products are slow on many processors."""
    model, ids, noise = small_uniform(scale=0.1, loss_weight=loss_weight).train(), some_ids(), some_noise()
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
    whole = [torch.cat([each.flatten() for each in every]) for every in (reference.values(), grads_of(model))]
    assert (whole[0] - whole[1]).norm() < 0.1 * whole[0].norm()


def grads_of(model) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("level", [1e-12, 1 - 1e-12])
def test_a_bfloat16_network_has_a_finite_loss_at_both_ends_of_time(level):
    model, ids = small_uniform().bfloat16(), some_ids()
    noise = some_noise() | {"noise_levels": torch.full((3,), level, dtype=torch.double)}
    loss = model(ids, labels=ids, **noise).loss
    loss.backward()
    assert loss.isfinite()
    assert all(each.isfinite().all() for each in grads_of(model))


@pytest.mark.slow
# PyTorch's compiler uses its own deprecated parts and looks at gradients of its own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model_gives_the_same_loss():
    """Traced, not made into code, which takes minutes."""
    model, ids, noise = small_uniform(), some_ids(), some_noise()
    expected = model(ids, labels=ids, **noise).loss
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, labels=ids, **noise).loss, expected, **CLOSE)


# Saving and loading


def test_a_16_bit_model_has_float32_logits(tmp_path):
    model, ids = small_uniform(scale=0.1), some_ids()
    model.save_pretrained(tmp_path)
    loaded = PrimeV2ForUniformDiffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    logits, expected = loaded(ids, times=TIMES).logits, model(ids, times=TIMES).logits
    assert logits.dtype == torch.float32 and loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    # bfloat16 rounds each of some ten steps to 2**-9.
    assert (logits - expected).norm() < 0.05 * expected.norm()


# Bad input and impossible configurations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([[0, 11]])}, r"token ids span \[0, 11\], .* in \[0, 10\], the mask token is none"),
        ({"times": None}, r"times=None, but what the network says depends on the noise level; give times \(B,\)"),
        ({"times": torch.tensor([0.5, 0.5])}, r"times=\[0.5, 0.5\] must be 1 numbers in \[0, 1\], one a row"),
        ({"times": torch.tensor([1.5])}, r"times=\[1.5\] must be 1 numbers in \[0, 1\]"),
        ({"times": torch.tensor([torch.nan])}, r"times=\[nan\] must be 1 numbers in \[0, 1\]"),
        ({"labels": torch.tensor([[1, 2]])}, "times were given with labels, whose noise is drawn here"),
    ],
    ids=str,
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_uniform()(**{"input_ids": torch.tensor([[1, 2]]), "times": torch.tensor([0.5])} | arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_weight": "count"}, "loss_weight='count' is not one of elbo, low_variance"),
        ({"time_embedding_size": 7}, "time_embedding_size=7 must be even and at least 2, .* use 8"),
        ({"time_embedding_size": 0}, "time_embedding_size=0 must be even and at least 2, .* use 2"),
        ({"mask_token_id": 3}, "mask_token_id=3 must be vocab_size=11, the first id outside"),
        ({"hidden_size": 15}, "hidden_size=15 is not a multiple of num_attention_heads=2; use hidden_size=16"),
        ({"time_conditioning": "yes"}, "time_conditioning"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        small_config("uniform", **fields)
