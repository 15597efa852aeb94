"""Devices by name."""

import pytest
import torch

from prime_v2.eval import loading
from prime_v2.eval.loading import choose_device, devices


def test_the_devices_of_this_machine_can_be_used():
    assert devices()[0] == "cpu"
    for name in devices():
        assert choose_device(name) == torch.device(name)


@pytest.mark.parametrize(
    ("name", "here", "use"),
    [
        ("gpu", ["cpu"], "cpu"),
        ("gpu", ["cpu", "cuda"], "cuda"),
        ("cdua", ["cpu", "cuda"], "cuda"),
        ("cuda:9", ["cpu", "cuda:0", "cuda:1"], "cuda:0"),
        ("nowhere", ["cpu", "cuda"], "cpu"),
    ],
)
def test_a_device_that_is_not_here_is_answered_with_those_that_are(monkeypatch, name, here, use):
    monkeypatch.setattr(loading, "devices", lambda: here)
    with pytest.raises(ValueError) as found:
        choose_device(name)
    assert str(found.value) == f"device={name!r} cannot be used; here are {', '.join(here)}: use {use}"
