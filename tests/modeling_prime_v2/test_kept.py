"""What layers keep for the backward pass: values and gradients are PyTorch's, and what is made again is not kept."""

import gc
import weakref

import pytest
import torch
from networks import small_model
from torch import nn

from prime_v2 import PrimeV2ForMaskedDiffusion
from prime_v2.kept_prime_v2 import PrimeV2RMSNorm, SwiGLU, made_again
from prime_v2.stage_head_prime_v2 import LateGradient

# float64 sums of some ten terms of order 1.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def draw(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.double)


@pytest.mark.parametrize("size", [(5, 8), (2, 3, 8), (2, 3, 4, 8), (8,)], ids=str)
def test_values_and_gradients_of_the_norm_are_those_of_pytorch(size):
    """Gradients of gradients too, by which a penalty on gradients is trained."""
    norm, reference = (each(8, 1e-3).double() for each in (PrimeV2RMSNorm, nn.RMSNorm))
    results = []
    for each in (norm, reference):
        with torch.no_grad():
            each.weight.copy_(draw(8))
        inputs = draw(*size).requires_grad_()
        outputs = each(inputs)
        grads = torch.autograd.grad((outputs * draw(*size)).sum().sin(), (inputs, each.weight), create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), (inputs, each.weight))
        results.append([outputs, *grads, *second])
    assert torch.equal(results[0][0], results[1][0])  # scored and trained networks are the same to the last digit
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_what_is_made_again_is_freed_and_made_once_for_all_that_keep_it():
    inputs, weights = draw(4, 6).requires_grad_(), [draw(3, 6).requires_grad_() for _ in range(3)]
    made: list[int] = []

    def make():
        made.append(1)
        return inputs * 2

    doubled = inputs * 2
    with made_again(doubled, make, checkpointed=False):
        total = sum(nn.functional.linear(doubled, weight).square().sum() for weight in weights)
    alive = weakref.ref(doubled)
    del doubled
    assert alive() is None
    total.backward()
    assert made == [1]
    for weight in weights:
        expected = 2 * (2 * inputs @ weight.T).T @ (2 * inputs)
        torch.testing.assert_close(weight.grad, expected.detach(), **CLOSE)


def test_a_view_in_another_order_is_kept_as_it_is():
    inputs = draw(4, 4).requires_grad_()
    squared = inputs * inputs
    with made_again(squared, lambda: inputs * inputs, checkpointed=False):
        total = (squared.t() * draw(4, 4) @ inputs).sum()
    expected = ((inputs * inputs).t() * draw(4, 4) @ inputs).sum()
    for found, other in zip(*(torch.autograd.grad(each, inputs) for each in (total, expected)), strict=True):
        torch.testing.assert_close(found, other, **CLOSE)


def test_a_step_leaves_nothing_for_the_garbage_collector():
    """A tensor that is kept by what it was computed by would stay until Python looks for cycles, if it ever does."""
    model, seen = small_model().train(), []
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda *_: seen.append(weakref.ref(_[2])))
    gc.collect()
    gc.disable()
    try:
        ids = torch.tensor([[1, 2, 3]])
        model(ids, labels=ids).loss.backward()
        assert [each() for each in seen] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize("writes", [False, True])
def test_gradients_of_swiglu_are_those_of_its_formula(writes):
    gate, up, pull = (draw(5, size)[:, :4].clone().requires_grad_() for size in (4, 5, 6))
    loss = (SwiGLU.apply(gate, up, writes) @ pull.T).sin().sum()
    expected = ((nn.functional.silu(gate) * up) @ pull.T).sin().sum()
    for found, other in zip(*(torch.autograd.grad(each, (gate, up, pull)) for each in (loss, expected)), strict=True):
        torch.testing.assert_close(found, other, **CLOSE)


def staged() -> PrimeV2ForMaskedDiffusion:
    fields = {"num_subtokens": 4, "reveal_order": "nested", "stage_digits": [2, 4], "head": "stages"}
    return small_model(**fields, objective="joint").double().train()


def gradients(model, **noise) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The parameters in the order in which they get their gradients, and these."""
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    ids = torch.arange(10).reshape(2, 5)
    model(ids, labels=ids, **noise).loss.backward()
    return order, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_gradient_of_a_head_in_stages_comes_last_and_is_the_same(monkeypatch):
    """As large as the head, it would otherwise be there while the network's activations still are."""
    noise = {"noise_keys": torch.tensor([1, 2]), "noise_levels": torch.tensor([0.3, 0.8], dtype=torch.double)}
    order, late = gradients(staged(), **noise)
    assert order[-1] == "lm_head.weight"
    monkeypatch.setattr(LateGradient, "of", lambda layer: None)
    order, plain = gradients(staged(), **noise)
    assert order[0] == "lm_head.weight"
    for name, expected in plain.items():
        torch.testing.assert_close(late[name], expected, **CLOSE)
