"""Arithmetic counts against those worked out by hand."""

import pytest
import torch

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion
from prime_v2.training.flops import count_parameters, measure_flops, peak_flops, six_n_d


def test_parameters_without_embeddings_and_head():
    config = PrimeV2Config(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    counts = count_parameters(PrimeV2ForMaskedDiffusion(config))
    layer = 4 * 16 * 16 + 3 * 16 * 64 + 2 * 16  # attention, SwiGLU with ffn 4 D, two norms
    assert counts["non_embedding"] == 3 * layer + 16
    assert counts["total"] == counts["non_embedding"] + 6 * 3 * 16 + 64 * 16  # S (b + 1) D and V D


def test_six_n_d():
    assert six_n_d(7, 11) == 462


def test_measured_flops_are_those_of_the_matrix_products():
    """One masked token of two: its head row counts three times (forward, two gradients), a linear layer likewise."""
    torch.manual_seed(0)
    config = PrimeV2Config(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = PrimeV2ForMaskedDiffusion(config)
    model.set_attn_implementation("eager")
    ids, length = torch.randint(64, (1, 2)), 2
    labels = torch.tensor([[ids[0, 0], -100]])
    counted = measure_flops(lambda: model(ids, labels=labels).loss)
    linear = 3 * 2 * length * (4 * 16 * 16 + 3 * 16 * 64)
    head = 3 * 2 * 64 * 16
    attention = 3 * 2 * 2 * length * length * 16  # scores and weighted values
    rotary = 3 * 2 * length * 8  # the angles are a product in some versions, without gradients
    assert linear + head + attention <= counted <= linear + head + attention + rotary


def test_the_peak_of_an_unknown_device_is_unknown():
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),  # slower than the SXM card
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_of_a_device_goes_by_its_name(name, rate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == rate
