"""A training step on an accelerator makes the host wait for no value of its batch, but for shapes; see `reads_values`.

There is no accelerator here: `reads_values` is made to say what it says there, and the host's reads are counted.
"""

import sys
from collections import Counter

import pytest
import torch
from networks import small_arm, small_interpolating, small_model, small_uniform, some_ids
from torch.utils._python_dispatch import TorchDispatchMode

from prime_v2.code_table_prime_v2 import reads_values

NESTED = {"reveal_order": "nested", "stage_digits": [2, 4]}
# Reads of a value, and `nonzero`, which waits for how many there are. A loss of digits looks once a chunk for rare
# ones; a head in stages asks for those of each; interpolating rows are as wide as the most queries of a row.
STEPS = {
    "joint": (lambda: small_model(), 0, 1),
    "marginal": (lambda: small_model(objective="marginal"), 1, 1),
    "nested": (lambda: small_model(objective="marginal", **NESTED), 1, 1),
    "head in stages": (lambda: small_model(objective="marginal", head="stages", **NESTED), 0, 3),
    "arm": (small_arm, 0, 1),
    "uniform": (small_uniform, 0, 1),
    "interpolating": (small_interpolating, 1, 4),
}


class HostReads(TorchDispatchMode):
    """Counts the operations after which the host knows something of a tensor's values."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def accelerator(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("prime_v2.") and hasattr(module, "reads_values"):
            monkeypatch.setattr(module, "reads_values", lambda tensor: not torch.is_grad_enabled())


def reads_of_a_step(model, ids):
    noise = {"noise_keys": torch.arange(len(ids)), "noise_levels": (torch.arange(len(ids)).double() + 0.5) / len(ids)}
    with HostReads() as reads:
        model.train()(ids, labels=ids, **noise).loss.backward()
    return reads.found


@pytest.mark.parametrize("kind", STEPS)
def test_a_training_step_reads_only_shapes_and_rare_digits(kind, accelerator):
    make, values, shapes = STEPS[kind]
    found = reads_of_a_step(make(), some_ids(4, 6))
    assert (found["_local_scalar_dense"], found["nonzero"], found["equal"]) == (values, shapes, 0)


def test_on_the_cpu_the_same_step_checks_its_batch():
    assert reads_of_a_step(small_model(), some_ids(4, 6))["_local_scalar_dense"] > 3


def test_on_an_accelerator_a_step_s_labels_are_refused_by_a_kernel_and_ids_of_evaluation_by_a_sentence(accelerator):
    model, ids = small_model(), some_ids(2, 4)
    with pytest.raises(RuntimeError, match="labels are the clean input ids"):
        model(ids, labels=ids.roll(1, 1))
    with torch.no_grad(), pytest.raises(ValueError, match=r"token ids span \[99, 99\]"):
        model(torch.full_like(ids, 99))


def test_values_are_read_on_the_cpu_and_elsewhere_without_gradients():
    assert reads_values(torch.zeros(1)) and not reads_values(torch.zeros(1, device="meta"))
    with torch.no_grad():
        assert reads_values(torch.zeros(1, device="meta"))
