"""What others attach to a model acts on every family as it does on a Llama of the same shape, or is refused.

Offloading, adapters, hooks, quantised and pruned layers reach a model through the calls of its modules; a weight that
is read past its module's call would leave them without effect, or be memory that nobody has filled.
"""

import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from outside import FIELDS, SHAPE, UNTIED, loss_of, network, some_ids, train, value_of
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import (
    AutoModel,
)

from prime_v2.families import FAMILIES
from prime_v2.linear_prime_v2 import all_vectors, head_of

# Of Llama, peft 0.21 reads a property that Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EIGHT_BIT = 0.02  # the largest error of an 8-bit weight relative to the largest of its layer, with two layers in a row


def leaves(model) -> list[str]:
    """Names for a device map: the parts of the network, and those beside it."""
    inside = [f"model.{name}" for name, each in model.model.named_children() if each.state_dict()]
    return [*inside, *(name for name, each in model.named_children() if name != "model")]


def assert_same(model, untouched) -> None:
    """Values, loss and samples, twice: memory that is not filled differs from one call to the next."""
    for _ in range(2):
        torch.testing.assert_close(value_of(model), value_of(untouched), rtol=0, atol=1e-5)
        torch.testing.assert_close(loss_of(model), loss_of(untouched), rtol=0, atol=1e-5)
    for given in ({"input_ids": some_ids()}, {}):
        options = {**given, "max_new_tokens": 3, "seed": 0}
        assert torch.equal(model.generate(**options), untouched.generate(**options))


# Offloading


@pytest.mark.parametrize("part", ["head", "embed", "layers", "code_table", "all"])
@pytest.mark.parametrize("case", FIELDS)
def test_a_model_with_a_part_on_the_disk_gives_the_same_values(case, part, tmp_path):
    model = network(case)
    places = {name: "disk" if part == "all" or part in name else "cpu" for name in leaves(model)}
    if set(places.values()) == {"cpu"}:
        return  # tied weights have no head of their own
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    assert any(each.is_meta for each in loaded.parameters()) or part == "code_table"
    assert loaded.device.type == "cpu"
    assert_same(loaded, model)


@pytest.mark.parametrize("case", FIELDS)
def test_offloading_by_accelerate_changes_no_value(case, tmp_path):
    model = network(case)
    to_cpu = cpu_offload(network(case), execution_device=torch.device("cpu"))
    assert next(to_cpu.parameters()).is_meta and to_cpu.device.type == "cpu"
    assert_same(to_cpu, model)
    to_disk = network(case)
    disk_offload(to_disk, tmp_path, execution_device=torch.device("cpu"))
    assert_same(to_disk, model)


@pytest.mark.parametrize("case", FIELDS)
def test_a_device_map_that_is_inferred_gives_the_same_values(case, tmp_path):
    model = network(case)
    model.save_pretrained(tmp_path / "model")
    size = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    places = infer_auto_device_map(model, {"cpu": size * 9 // 10}, no_split_module_classes=model._no_split_modules)
    assert "disk" in places.values()
    assert not any(name.startswith("model.layers.") and name.count(".") > 2 for name in places)
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    assert_same(loaded, model)


def test_a_code_table_that_is_offloaded_too_is_refused():
    model = cpu_offload(network("prime, digits"), execution_device=torch.device("cpu"), offload_buffers=True)
    with pytest.raises(ValueError, match="the code table is offloaded.*offload_buffers=False"):
        value_of(model)


# Adapters

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def adapter(request, tmp_path):
    """(a model, the folder of an adapter, the value with it)"""
    model = network(request.param)
    model.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter", value_of(adapted)


@pytest.mark.parametrize("adapter", FIELDS, indirect=True)
def test_an_adapter_is_loaded_into_a_model_and_with_it(adapter):
    model, folder, value = adapter
    assert not torch.allclose(value_of(model), value, atol=1e-3)
    model.load_adapter(str(folder))
    torch.testing.assert_close(value_of(model), value, rtol=0, atol=1e-6)
    torch.testing.assert_close(value_of(type(model).from_pretrained(folder)), value, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        value_of(AutoModel.from_pretrained(folder, trust_remote_code=True)), value, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("adapter", FAMILIES, indirect=True)
def test_an_adapter_without_some_of_its_tensors_is_refused(adapter):
    """Transformers leaves them at their initial values with a warning."""
    model, folder, _ = adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of its 8 tensors, the first being .*lora_B"):
        model.load_adapter(str(folder))


@pytest.mark.parametrize("case", FIELDS)
def test_add_adapter_does_what_it_does_to_llama(case):
    """Transformers asks for a version of peft of its own."""

    def outcome(name: str) -> str:
        model = network(name)
        before = value_of(model)
        try:
            model.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
        except (ImportError, ValueError) as error:
            return str(error)
        return "acts" if not torch.allclose(value_of(model), before, atol=1e-3) else "does not act"

    assert outcome(case) == outcome("llama") != "does not act"


@pytest.mark.parametrize("case", [*FIELDS, "llama"])
def test_an_adapter_for_a_causal_task_is_trained_and_generates(case):
    """task_type="CAUSAL_LM" is what most recipes set."""
    adapted = get_peft_model(network(case), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS))
    loss_of(adapted).backward()
    assert all(each.grad.any() for name, each in adapted.named_parameters() if "lora_B" in name)
    ids = some_ids()
    assert adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2).shape == (3, 10)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_learning_is_refused(name, config):
    for task in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
        with pytest.raises(ValueError, match="puts vectors before a text.*train an adapter, e.g. LoraConfig"):
            get_peft_model(network(name), config(task_type=task, num_virtual_tokens=2))


# Hooks on modules


@pytest.mark.parametrize("case", [*UNTIED, "llama"])
def test_a_hook_on_a_linear_layer_acts(case):
    """Doubled outputs are those of doubled weights, of the head and of every projection."""
    layers = [name for name, each in network(case).named_modules() if type(each) is nn.Linear]
    assert "lm_head" in layers and sum(name.endswith("_proj") for name in layers) == 7 * SHAPE["num_hidden_layers"]
    for layer in layers:
        hooked, doubled = network(case), network(case)
        hooked.get_submodule(layer).register_forward_hook(lambda module, args, output: 2 * output)
        changed = doubled.get_submodule(layer)
        if changed.bias is None:
            changed.weight.data *= 2
        else:
            changed.register_forward_hook(lambda module, args, output: output + output)
        torch.testing.assert_close(value_of(hooked), value_of(doubled), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(loss_of(hooked), loss_of(doubled), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", UNTIED)
def test_a_head_that_is_called_has_the_gradients_of_one_that_is_read(case):
    """In chunks: two rows of logits at a time, so that the last one is shorter."""
    gradients = []
    for hooks in (0, 1):
        model = network(case)
        for _ in range(hooks):
            model.lm_head.register_forward_hook(lambda module, args, output: None)
        loss_of(model).backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("case", [*FIELDS, "llama"])
def test_a_hook_on_the_input_embeddings_gets_embedded_tokens(case):
    """As NEFTune's and enable_input_require_grads' do; a tied head stays as it is."""
    model, seen = network(case), []
    loss = loss_of(model)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: seen.append(output.shape) or output + 1)
    assert not torch.allclose(loss_of(model), loss, atol=1e-4)
    assert all(len(shape) == 3 and shape[-1] == SHAPE["hidden_size"] for shape in seen)
    if case != "llama" and model.config.tie_word_embeddings:
        torch.testing.assert_close(model.head(), network(case).head(), rtol=0, atol=0)


@pytest.mark.parametrize("case", [*FIELDS, "llama"])
def test_neftune_acts_in_a_plain_trainer(case, tmp_path):
    losses = [train(case, tmp_path, neftune_noise_alpha=alpha) for alpha in (None, 5.0)]
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", [*FIELDS, "llama"])
def test_adapters_are_trained_under_activation_checkpointing(case, reentrant):
    model = network(case)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS)).train()
    adapted.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    loss_of(adapted).backward()
    assert all(each.grad.any() for name, each in adapted.named_parameters() if "lora_B" in name)


# Layers that are replaced, and weights that are


@pytest.mark.parametrize("case", FIELDS)
def test_dynamic_quantisation_replaces_the_layers_that_it_replaces_in_llama(case):
    model, value = network(case), value_of(network(case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its successor
        found = [torch.ao.quantization.quantize_dynamic(each, {nn.Linear}) for each in (model, network("llama"))]
        quantised, kinds = found[0], [[type(each).__module__ for each in model.modules()] for model in found]
        projections = 7 * SHAPE["num_hidden_layers"]
        for each in kinds:
            assert sum("quantized.dynamic" in module for module in each) >= projections
        left = [name for name, each in quantised.named_modules() if isinstance(each, nn.Linear)]
        assert not any(name == "lm_head" or name.endswith("_proj") for name in left)
        found = value_of(quantised)
        assert not torch.equal(found, value)
        torch.testing.assert_close(found, value, rtol=EIGHT_BIT, atol=0)
        assert quantised.generate(some_ids(), max_new_tokens=2).shape == (3, 10)


class Coarse(torch.Tensor):
    """A weight of another class with products of its own, as torchao's quantised ones."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args = [each.as_subclass(torch.Tensor).mul(8).round().div(8) if type(each) is cls else each for each in args]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [*UNTIED, "llama"])
def test_weights_of_another_class_act_by_their_own_products(case):
    coarse, rounded = network(case), network(case)
    for model in (coarse, rounded):
        for layer in [each for each in model.modules() if type(each) is nn.Linear]:
            weight = layer.weight.detach()
            del layer.weight
            layer.weight = weight.as_subclass(Coarse) if model is coarse else weight.mul(8).round().div(8)
    torch.testing.assert_close(value_of(coarse), value_of(rounded), rtol=0, atol=1e-5)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("case", [*UNTIED, "llama"])
def test_pruned_and_parametrised_layers_act(case):
    for name in ("lm_head", "model.layers.0.self_attn.q_proj"):
        pruned, masked = network(case), network(case)
        prune.l1_unstructured(pruned.get_submodule(name), "weight", amount=0.5)
        layer = masked.get_submodule(name)
        layer.weight.data *= layer.weight.abs() > layer.weight.abs().flatten().median()
        torch.testing.assert_close(value_of(pruned), value_of(masked), rtol=1e-6, atol=1e-6)
        parametrised, doubled = network(case), network(case)
        parametrize.register_parametrization(parametrised.get_submodule(name), "weight", Doubled())
        doubled.get_submodule(name).weight.data *= 2
        torch.testing.assert_close(value_of(parametrised), value_of(doubled), rtol=1e-6, atol=1e-6)


def test_layers_with_nothing_attached_are_read_and_others_called():
    layer, table = nn.Linear(3, 5, bias=False), nn.Embedding(5, 3)
    assert head_of(layer, 5) is layer.weight
    assert all_vectors(table, 4).data_ptr() == table.weight.data_ptr()
    table.forward = lambda ids: ids.unsqueeze(1) * torch.ones(3)
    assert all_vectors(table, 4).tolist() == [[0.0] * 3, [1.0] * 3, [2.0] * 3, [3.0] * 3]


@pytest.mark.parametrize("case", UNTIED)
def test_a_bias_on_the_head_acts_whether_it_is_called_or_not(case):
    """As set_output_embeddings may bring one."""
    model, value = network(case), value_of(network(case))
    model.lm_head.bias = nn.Parameter(torch.linspace(-3, 3, len(model.lm_head.weight)))
    found = value_of(model)
    assert not torch.allclose(found, value, atol=1e-2)
    model.lm_head.register_forward_hook(lambda module, args, output: None)
    torch.testing.assert_close(value_of(model), found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", FIELDS)
def test_what_others_set_on_a_configuration_is_not_saved_with_it(case, tmp_path):
    """Recipes set pretraining_tp on every model, and load with use_cache=False."""
    model = network(case)
    model.config.pretraining_tp = 1
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, use_cache=False)
    torch.testing.assert_close(value_of(loaded), value_of(model), rtol=0, atol=1e-6)
    assert loaded.config.use_cache is False
