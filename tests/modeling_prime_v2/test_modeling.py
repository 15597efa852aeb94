"""The masked-diffusion network against a plain reference; attention forms; what is saved; states that are none."""

import math
import weakref

import pytest
import torch
from networks import small_config, small_model
from torch import nn

from prime_v2.kept_prime_v2 import SwiGLU
from prime_v2.modeling_prime_v2 import PrimeV2ForMaskedDiffusion

# float32 networks of two layers whose logits are of order 1: other orders of summation differ by some 1e-7 a step.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def some_ids(batch: int = 3, length: int = 7, vocab_size: int = 11, seed: int = 0) -> torch.Tensor:
    """Ids with some masks among them (the id `vocab_size`)."""
    return torch.randint(vocab_size + 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def some_states(model, batch: int = 3, length: int = 7) -> torch.Tensor:
    """States with some digits masked, of tokens that exist."""
    generator = torch.Generator().manual_seed(1)
    digits = model.encode(torch.randint(model.config.vocab_size, (batch, length), generator=generator))
    return torch.where(torch.rand(digits.shape, generator=generator) < 0.5, model.config.base, digits)


# The network


def naive_hidden_states(model, states: torch.Tensor) -> torch.Tensor:
    """The network's output for states (B, L, S) from its weights and formulas, one token and one head at a time."""
    config, weights = model.config, dict(model.model.named_parameters())
    base, digits = config.base, config.num_subtokens
    table = weights["embed_subtokens.table.weight"]

    def embed(state):
        if config.subtoken_embedding == "sum":
            return sum(table[j * (base + 1) + state[j]] for j in range(digits))
        rows = [state[j] + (j * (base + 1) if config.subtoken_embedding == "concat" else 0) for j in range(digits)]
        return torch.cat([table[row] for row in rows])

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def linear(x, name):
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def rotate(x, position):
        """Pairs (i, i + half) turn by position * theta**(-2 i / head_dim)."""
        half = config.head_dim // 2
        angle = position * 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
        first, second = x[:half], x[half:]
        turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
        return torch.cat(turned)

    def attention(x, name):
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        query, key = linear(x, f"{name}.q_proj").unflatten(-1, (heads, -1)), linear(x, f"{name}.k_proj")
        key, value = key.unflatten(-1, (kv_heads, -1)), linear(x, f"{name}.v_proj").unflatten(-1, (kv_heads, -1))
        if config.qk_norm:
            query, key = norm(query, f"{name}.q_norm"), norm(key, f"{name}.k_norm")
        outputs = []
        for head in range(heads):
            kv = head * kv_heads // heads
            queries = torch.stack([rotate(query[i, head], i) for i in range(len(x))])
            keys = torch.stack([rotate(key[i, kv], i) for i in range(len(x))])
            chances = (queries @ keys.T / math.sqrt(config.head_dim)).softmax(-1)
            outputs.append(chances @ value[:, kv])
        return linear(torch.cat(outputs, dim=-1), f"{name}.o_proj")

    sequences = []
    for sequence in states:
        x = torch.stack([embed(state) for state in sequence])
        for i in range(config.num_hidden_layers):
            x = x + attention(norm(x, f"layers.{i}.input_layernorm"), f"layers.{i}.self_attn")
            y = norm(x, f"layers.{i}.post_attention_layernorm")
            gate, up = linear(y, f"layers.{i}.mlp.gate_proj"), linear(y, f"layers.{i}.mlp.up_proj")
            x = x + linear(gate * gate.sigmoid() * up, f"layers.{i}.mlp.down_proj")
        sequences.append(norm(x, "norm"))
    return torch.stack(sequences)


FORMS = [
    {},
    {"subtoken_embedding": "concat"},
    {"subtoken_embedding": "concat_shared"},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "qk_norm": True},
    {"num_key_value_heads": 1, "head_dim": 6, "attention_bias": True, "mlp_bias": True},
    {"base": 11, "num_subtokens": 1},
    {"base": 3, "rms_norm_eps": 0.1},
]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_hidden_states_and_gradients_equal_those_of_a_plain_reference(fields, implementation):
    model = small_model(**fields).double()
    with torch.no_grad():  # weights of 1 and biases of 0 would hide an error
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.set_attn_implementation(implementation)
    states = some_states(model)
    ours, naive = model.model(states).last_hidden_state, naive_hidden_states(model, states)
    close = {"rtol": 1e-5, "atol": 1e-5}  # the rotary angles are float32
    torch.testing.assert_close(ours, naive, **close)
    direction = torch.randn_like(naive)
    gradients = [torch.autograd.grad((each * direction).sum(), model.model.parameters()) for each in (ours, naive)]
    for (name, _), gradient, reference in zip(model.model.named_parameters(), *gradients, strict=True):
        assert (gradient - reference).norm() <= 1e-5 * reference.norm(), name


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"carry_over": False}], ids=str)
def test_logits_are_the_products_with_the_head_filtered_by_the_visible_digits(fields):
    model = small_model(**fields)
    states = some_states(model)
    logits = model(subtoken_ids=states).logits
    hidden_states, codes = model.model(states).last_hidden_state, model.code_table.codes
    for (row, column), state in zip(
        torch.cartesian_prod(torch.arange(3), torch.arange(7)), states.flatten(0, 1), strict=True
    ):
        for token in range(11):
            agrees = all(
                d in (model.config.base, c) for d, c in zip(state.tolist(), codes[token].tolist(), strict=True)
            )
            if model.config.tie_word_embeddings:
                head = model.model.embed_subtokens(codes[token][None, None])[0, 0]
            else:
                head = model.lm_head.weight[token]
            expected = hidden_states[row, column] @ head
            if not agrees and model.config.carry_over:
                expected = torch.tensor(-torch.inf)
            torch.testing.assert_close(logits[row, column, token], expected, **CLOSE)


def test_token_ids_and_their_states_give_the_same_logits_and_the_mask_id_hides_all_digits():
    model, ids = small_model(), some_ids()
    states = model.encode(ids)
    assert (states[ids == 11] == 2).all()
    assert (states[ids < 11] < 2).all()
    torch.testing.assert_close(model(ids).logits, model(subtoken_ids=states).logits, rtol=0, atol=0)
    assert torch.equal(model.decode(states), ids)


def test_attention_is_bidirectional():
    """The first token's output depends on the last token."""
    model, ids = small_model(), some_ids(1)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 11
    difference = (
        model.model(model.encode(ids)).last_hidden_state - model.model(model.encode(changed)).last_hidden_state
    )
    assert difference[0, 0].abs().max() > 1e-3


# Padding and batches


@pytest.mark.parametrize("layers", [1, 3])
def test_hidden_states_of_the_needed_tokens_alone(layers):
    model = small_model(num_hidden_layers=layers).double()
    states = model.encode(torch.randint(12, (3, 7), generator=torch.Generator().manual_seed(0)))
    mask = torch.ones(3, 7).long()
    mask[1, 5:] = 0
    needed = (torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.4) & mask.bool()
    assert 0 < needed.sum() < mask.sum()
    every = model.model(states, mask).last_hidden_state
    found = model.model(states, mask, target_mask=needed).last_hidden_state
    torch.testing.assert_close(found, every[needed], rtol=1e-12, atol=1e-12)
    assert model.model(states, mask, target_mask=torch.zeros_like(needed)).last_hidden_state.shape == (
        0,
        every.shape[-1],
    )


@pytest.mark.parametrize("ones", [torch.ones(3, 7, dtype=torch.long), torch.ones(3, 7, dtype=torch.bool)])
def test_a_mask_of_ones_is_no_mask(ones):
    model, ids = small_model(), some_ids()
    torch.testing.assert_close(model(ids, ones).logits, model(ids).logits, **CLOSE)


def test_positions_can_be_given():
    """Rotary attention sees only differences of positions."""
    model, ids = small_model(), some_ids()
    moved = model(ids, position_ids=torch.arange(7)[None] + 9).logits
    torch.testing.assert_close(moved, model(ids).logits, rtol=1e-4, atol=1e-4)  # float32 angles of up to 16 radians
    spread = model(ids, position_ids=2 * torch.arange(7)[None]).logits
    assert (spread - model(ids).logits).nan_to_num().abs().max() > 1e-2


# Transformers' options


# Eagerly, since compiling it takes half a minute; PyTorch's compiler uses its own deprecated parts.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_equals_sdpa():
    model, ids = small_model(), some_ids()
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(ids, mask).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(ids, mask).logits[mask == 1], expected[mask == 1], **CLOSE)


def test_hidden_states_and_attentions_on_request():
    model, ids = small_model(), some_ids()
    model.set_attn_implementation("eager")
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[2, 5:] = 0
    outputs = model(ids, mask, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3
    assert len(outputs.attentions) == 2
    embedded = model.model.embed_subtokens(model.encode(ids))
    torch.testing.assert_close(outputs.hidden_states[0], embedded, rtol=0, atol=0)
    torch.testing.assert_close(model.token_logits(outputs.hidden_states[-1], model.encode(ids)), outputs.logits)
    for attention in outputs.attentions:
        assert attention.shape == (3, 2, 7, 7)
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, 7), **CLOSE)
        assert (attention[2, ..., 5:] == 0).all()
    plain = model(ids, mask)
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert len(model(ids, labels=ids.clamp(max=10), output_hidden_states=True).hidden_states) == 3


def test_the_product_of_gate_and_up_is_not_kept_for_the_backward_pass(monkeypatch):
    """It is a third of what a layer would keep; its gradients are those of the plain reference, see above."""
    model, products, apply = small_model(), [], SwiGLU.apply

    def watched(*inputs):
        product = apply(*inputs)
        products.append(weakref.ref(product))
        return product

    monkeypatch.setattr(SwiGLU, "apply", watched)
    ids = torch.tensor([[1, 2, 3]])
    loss = model(ids, labels=ids).loss
    assert [each() for each in products] == [None, None]  # two layers
    loss.backward()


# Saving and loading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_keeps_its_code_table_and_rotary_frequencies(dtype, tmp_path):
    model, ids = small_model(vocab_size=700, scale=0.1), some_ids(vocab_size=700)
    model.save_pretrained(tmp_path)
    loaded = PrimeV2ForMaskedDiffusion.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.code_table.codes.dtype == torch.int64
    assert torch.equal(loaded.code_table.codes, model.code_table.codes)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert loaded.lm_head.weight.dtype == dtype
    logits = loaded(ids).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits.isfinite(), model(ids).logits.isfinite())
    # bfloat16 rounds each of some ten steps to 2**-9.
    error = (logits - model(ids).logits).nan_to_num()
    assert error.norm() < 0.05 * model(ids).logits.nan_to_num(neginf=0).norm()
    loaded(ids.clamp(max=699), labels=ids.clamp(max=699)).loss.backward()
    assert loaded.lm_head.weight.grad.dtype == dtype


def test_a_folder_without_weights_is_refused(tmp_path):
    small_config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named model.safetensors.* found in directory"):
        PrimeV2ForMaskedDiffusion.from_pretrained(tmp_path)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"input_ids": torch.tensor([[0, 12]])},
            r"token ids span \[0, 12\], .* in \[0, 11\], the mask token 11 included",
        ),
        ({"subtoken_ids": torch.full((1, 2, 4), 3)}, r"ids span \[3, 3\], .* in \[0, 2\], digits, 2 for masked"),
        ({"subtoken_ids": torch.zeros(1, 2, 5, dtype=torch.long)}, r"shape \(1, 2, 5\), but states are \(B, L, 4\)"),
        ({}, "exactly one of input_ids .* and subtoken_ids"),
        (
            {"input_ids": torch.zeros(1, 1, dtype=torch.long), "subtoken_ids": torch.zeros(1, 1, 4, dtype=torch.long)},
            "exactly one of input_ids .* and subtoken_ids",
        ),
    ],
    ids=str,
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_model()(**arguments)


def test_initial_weights_have_the_configured_scale_and_the_table_of_the_config():
    """The code table is filled by `_init_weights`, so that a model made on the meta device gets it too."""
    model = small_model(hidden_size=64, scale=0.02, shuffle_seed=5)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # 4 standard deviations of the sample's own, for the smallest of them, 12 rows of 64.
            assert parameter.std().item() == pytest.approx(0.02, rel=0.12), name
        else:
            assert (parameter == 1).all(), name
    assert torch.equal(model.code_table.codes, model.code_table.build())
    assert isinstance(model.model.embed_subtokens.table, nn.EmbeddingBag)
