"""Products in oneDNN against PyTorch's own and float64: values, gradients, strides, FLOPs; when they are not used."""

import pytest
import torch
from networks import small_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prime_v2 import PrimeV2ForMaskedDiffusion, linear_prime_v2
from prime_v2.linear_prime_v2 import linear, product

pytestmark = pytest.mark.skipif(
    linear_prime_v2._ONEDNN is None or not torch.backends.mkl.is_available() or not torch.backends.mkldnn.enabled,
    reason="this PyTorch has no oneDNN beside MKL",
)


class Calls:
    def __init__(self, function):
        self.function, self.count = function, 0

    def __call__(self, *args):
        self.count += 1
        return self.function(*args)


@pytest.fixture
def calls(monkeypatch):
    """Products of any size go to oneDNN, and are counted."""
    counted = Calls(linear_prime_v2._ONEDNN)
    monkeypatch.setattr(linear_prime_v2, "_ONEDNN", counted)
    monkeypatch.setattr(linear_prime_v2, "FEWEST_MULTIPLICATIONS", 1)
    return counted


def draw(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


INPUTS = {
    "matrix": draw(7, 20),
    "vector": draw(20),
    "batch": draw(2, 3, 20),
    "transposed": draw(20, 7).t(),
    "axes exchanged": draw(7, 3, 20).transpose(0, 1),
    "columns of a wider one": draw(7, 50)[:, 11:31],
    "every other column": draw(7, 40)[:, ::2],
    "one row for all": draw(1, 20).expand(7, 20),
    "no row": draw(0, 20),
}
WEIGHTS = {"matrix": draw(9, 20), "transposed": draw(20, 9).t(), "rows of a taller one": draw(30, 20)[5:14]}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_values_and_gradients_are_those_of_float64(inputs, weight, calls):
    results = []
    for dtype in (torch.float32, torch.double):
        leaves = [each.to(dtype).detach().requires_grad_() for each in (INPUTS[inputs], WEIGHTS[weight])]
        result = product(*leaves)
        grad = draw(*result.shape).to(dtype)
        results.append([result.detach(), *torch.autograd.grad((result * grad).sum(), leaves)])
    assert calls.count == (3 if inputs != "no row" else 0)  # forward and both gradients
    for found, exact in zip(*results, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_sum_which_has_no_memory_of_its_own(calls):
    inputs, weight = (each.clone().requires_grad_() for each in (INPUTS["batch"], WEIGHTS["matrix"]))
    by_product = torch.autograd.grad(product(inputs, weight).sum(), (inputs, weight))
    plain = torch.autograd.grad(nn.functional.linear(inputs, weight).sum(), (inputs, weight))
    for found, expected in zip(by_product, plain, strict=True):
        torch.testing.assert_close(found, expected)
    assert calls.count == 3


def test_only_the_gradients_that_are_asked_for_are_computed(calls):
    weight = WEIGHTS["matrix"].clone().requires_grad_()
    product(INPUTS["matrix"], weight).sum().backward()
    assert calls.count == 2 and weight.grad is not None


def test_gradients_of_gradients(calls):
    inputs, weight = (each.clone().requires_grad_() for each in (INPUTS["matrix"], WEIGHTS["matrix"]))

    def penalty(function):
        (grad,) = torch.autograd.grad(function(inputs, weight).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (inputs, weight))

    for found, expected in zip(penalty(product), penalty(nn.functional.linear), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_that_of_pytorch(bias, calls):
    layer = nn.Linear(20, 9, bias=bias)
    for inputs in (INPUTS["batch"], INPUTS["vector"]):
        torch.testing.assert_close(linear(layer, inputs), layer(inputs))
    assert calls.count == 2


def test_a_layer_that_something_acts_on_is_called(calls):
    """Hooks, a forward of its own (as accelerate's offloading sets it) and other classes act on the call."""
    inputs, layer = INPUTS["batch"], nn.Linear(20, 9)
    handle = layer.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(linear(layer, inputs), layer(inputs))
    handle.remove()
    layer.forward = lambda each: each + 2
    assert torch.equal(linear(layer, inputs), inputs + 2)
    assert torch.equal(linear(nn.Identity(), inputs), inputs)
    assert calls.count == 0


def test_flops_are_counted_as_those_of_pytorch(calls):
    def count(function) -> int:
        inputs, weight = (each.clone().requires_grad_() for each in (INPUTS["batch"], WEIGHTS["matrix"]))
        with FlopCounterMode(display=False) as counter:
            function(inputs, weight).sum().backward()
        return counter.get_total_flops()

    assert torch.ops.mkldnn._linear_pointwise in linear_prime_v2.flop_registry
    assert count(product) == count(nn.functional.linear) == 3 * 2 * 6 * 20 * 9
    assert calls.count == 3


class Subclass(torch.Tensor):
    """As sharded and quantized weights are."""


@pytest.mark.parametrize(
    "inputs, weight",
    [
        (INPUTS["matrix"].double(), WEIGHTS["matrix"].double()),
        (INPUTS["matrix"].bfloat16(), WEIGHTS["matrix"].bfloat16()),
        (INPUTS["matrix"].to("meta"), WEIGHTS["matrix"].to("meta")),
        (INPUTS["matrix"], WEIGHTS["matrix"].as_subclass(Subclass)),
        (INPUTS["matrix"].as_subclass(Subclass), WEIGHTS["matrix"]),
    ],
    ids=["float64", "bfloat16", "meta", "weight of another class", "inputs of another class"],
)
def test_what_is_no_plain_float32_is_left_to_pytorch(inputs, weight, calls):
    expected = nn.functional.linear(inputs, weight)
    result = product(inputs, weight)
    assert calls.count == 0
    assert result.dtype == expected.dtype and type(result) is type(expected)


def test_autocast_and_the_switch_of_pytorch_are_followed(calls):
    inputs, weight = INPUTS["matrix"], WEIGHTS["matrix"]
    with torch.autocast("cpu", torch.bfloat16):
        assert product(inputs, weight).dtype == torch.bfloat16
    before = torch.backends.mkldnn.set_flags(False)
    try:
        assert torch.equal(product(inputs, weight), nn.functional.linear(inputs, weight))
    finally:
        torch.backends.mkldnn.set_flags(*before)
    assert calls.count == 0
    product(inputs, weight)
    assert calls.count == 1


def test_small_products_are_left_to_pytorch(calls, monkeypatch):
    monkeypatch.setattr(linear_prime_v2, "FEWEST_MULTIPLICATIONS", 7 * 20 * 9 + 1)
    product(INPUTS["matrix"], WEIGHTS["matrix"])
    assert calls.count == 0
    product(draw(8, 20), WEIGHTS["matrix"])
    assert calls.count == 1


def test_sides_that_do_not_fit_are_refused(calls):
    with pytest.raises(RuntimeError):
        product(INPUTS["matrix"], draw(9, 21))


def test_a_model_of_real_width_uses_it(monkeypatch):
    """The networks of other tests are below the threshold; one of width 256 is not."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "num_subtokens": 11, "hidden_size": 256, "intermediate_size": 256}
    model = PrimeV2ForMaskedDiffusion(small_config(**sizes, max_position_embeddings=256)).eval()
    ids, counted = torch.arange(256).unsqueeze(0), Calls(linear_prime_v2._ONEDNN)
    monkeypatch.setattr(linear_prime_v2, "_ONEDNN", counted)
    with torch.no_grad():
        fast = model(ids).logits
        assert counted.count == 7 * len(model.model.layers) + 1  # its projections and its head
        monkeypatch.setattr(linear_prime_v2, "FEWEST_MULTIPLICATIONS", 2**40)
        torch.testing.assert_close(fast, model(ids).logits, rtol=1e-4, atol=1e-4)
