"""Counter-based random numbers: every draw is a pure function of integer keys, on any device, for ever.

The keys are hashed with the SplitMix64 finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014). A counter-based draw does not depend on library versions, device, batch composition, number
of workers or restarts; tests/test_random.py pins the stream.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers, which torch wraps on overflow
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical right shift of int64 by 0 < count < 64."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = bits + _GOLDEN
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


def hash64(*keys: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Hash of integer keys, int64 over all 64 bits; tensor keys (int64) broadcast. Order of the keys matters.

    `device` is needed only when no key is a tensor. Returns an int64 tensor of the broadcast shape.
    """
    for key in keys:
        if isinstance(key, Tensor):
            device = key.device
    state = torch.zeros((), dtype=torch.long, device=device)
    for key in keys:
        if not isinstance(key, Tensor):
            key = torch.tensor(((int(key) + 2**63) % 2**64) - 2**63, dtype=torch.long, device=device)
        state = _mix(state ^ _mix(key.long()))
    return state


def uniforms(*keys: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Float64 uniforms in the open interval (0, 1), a pure function of the keys (see `hash64`); 52 random bits."""
    return (_shift_right(hash64(*keys, device=device), 12).double() + 0.5) * 2.0**-52


def permutation(num: int, *keys: int) -> Tensor:
    """A permutation of 0..num-1 (int64, on the CPU), a pure function of `num`-independent keys."""
    return torch.argsort(hash64(*keys, torch.arange(num)), stable=True)
