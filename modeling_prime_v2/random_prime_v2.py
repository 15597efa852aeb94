"""Counter-based random numbers: every draw is a pure function of integer keys, on any device, for ever.

The keys are hashed with the SplitMix64 finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014). A counter-based draw does not depend on library versions, device, batch composition, number
of workers or restarts; tests/modeling_prime_v2/test_random.py pins the stream.
"""

from enum import IntEnum, unique

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers, which torch wraps on overflow
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


@unique
class Stream(IntEnum):
    """Stream numbers: a key of each draw, so that draws for different purposes never share bits.

    All there are, of the package too; tests/modeling_prime_v2/test_random.py refuses a draw whose number is from
    elsewhere. A number never changes: seeds would give other results.
    """

    # Forward process of masked diffusion: level of a training sample, rotation of a step's strata, which units are
    # hidden, and which whole tokens; the segment of time in which a stage is revealed.
    LEVEL = 1
    ROTATION = 2
    UNITS = 3
    WHOLE = 4
    SEGMENT = 5
    # Likelihoods: key of a sequence, levels, random orders, further rounds, paths of a sampler.
    SEQUENCE = 11
    DRAW = 12
    ORDER = 13
    ROUND = 14
    PATH = 15
    # Sampling of masked diffusion: key of a row, reveal steps, tokens, units hidden again.
    ROW = 21
    REVEAL = 22
    TOKEN = 23
    REMASKING = 24
    # Training: keys of the samples' noise.
    TRAINING_NOISE = 31
    # Likelihoods of answers: masks that the choices of a question share.
    QUESTION = 32
    # The paper's protocol: key of a question, its times, which runs of digits are hidden.
    PUBLISHED = 41
    PUBLISHED_TIME = 42
    PUBLISHED_RUN = 43
    # lm-eval: seed of a repeated request.
    REPEAT = 51
    # Analysis: noise of a window.
    ANALYSIS = 61
    # Uniform-state diffusion: when a token is replaced, by what, further rounds; sampling: start, tokens, start of the
    # deterministic decode, tokens of a corrector step.
    REPLACED_AT = 81
    REPLACED_BY = 82
    UNIFORM_ROUND = 83
    UNIFORM_START = 85
    UNIFORM_TOKEN = 86
    GREEDY_START = 87
    CORRECTED = 88
    # Interpolating diffusion: order of the tokens, further rounds; sampling: which tokens come first, their order
    # within a step, tokens.
    INTERPOLATING_ORDER = 91
    INTERPOLATING_ROUND = 92
    PHASE = 93
    WITHIN_STEP = 94
    INTERPOLATING_TOKEN = 95
    # Training data: order of the blocks, length of short batches. They stand where others have the seed, so they are
    # far from any seed.
    BLOCK_ORDER = 0x6F72646572
    SHORT_LENGTH = 0x6C656E677468


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
