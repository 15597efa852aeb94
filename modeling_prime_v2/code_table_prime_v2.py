"""The code table C (V, S): token ids to digits and back (MDM-Prime-v2, arXiv:2603.16077, Techniques 1 and 2).

`f(x) = digits_b(sigma(x))`, most significant digit first, where `sigma` is the index shuffle. The whole of `f` is one
integer table, so encoding is a gather and decoding its inverse look-up. The table is stored as data in the model (a
buffer) and in the tokenizer (code_table.json); this file is the only place that computes it.
"""

import torch
from torch import Tensor, nn

from .random_prime_v2 import permutation

MAX_SHUFFLED_CODES = 2**24  # a permutation of more codes than this takes gigabytes
MAX_DIGITS = 62  # bits that a code may take, hence the most digits of the smallest base


def digits_needed(vocab_size: int, base: int) -> int:
    """Smallest S with base**S >= vocab_size, in integers (no logarithm, so no rounding)."""
    num_subtokens, capacity = 1, base
    while capacity < vocab_size:
        num_subtokens, capacity = num_subtokens + 1, capacity * base
    return num_subtokens


def base_needed(vocab_size: int, num_subtokens: int) -> int:
    """Smallest base >= 2 with base**num_subtokens >= vocab_size; `num_subtokens=1` gives plain MDM, base V."""
    base = max(2, round(vocab_size ** (1 / num_subtokens)) - 1)
    while base**num_subtokens < vocab_size:
        base += 1
    return base


def num_nodes(base: int, ends: tuple[int, ...]) -> int:
    """Nodes of the code tree at the digit counts `ends`."""
    return sum(base**end for end in ends)


def build_code_table(
    vocab_size: int,
    base: int,
    num_subtokens: int,
    shuffle_seed: int = 0,
    shuffle_ratio: float = 1.0,
    shuffle_domain: str = "codes",
) -> Tensor:
    """The table C (V, S) int64 with digits in 0..base-1, most significant first; its rows are distinct.

    shuffle_domain "vocab" permutes the V ids (codes >= V stay unused), "codes" permutes all base**S codes. Only the
    first `shuffle_ratio` share of the domain is permuted, among itself; 0 is the identity (MDM-Prime v1).
    Raises ValueError when the codes do not hold the vocabulary or a value is outside its range.
    """
    if vocab_size < 1 or base < 2 or num_subtokens < 1:
        raise ValueError(
            f"vocab_size={vocab_size}, base={base}, num_subtokens={num_subtokens}: these must be at least 1, 2 and 1"
        )
    if num_subtokens * (base + 1).bit_length() > MAX_DIGITS:
        raise ValueError(
            f"num_subtokens={num_subtokens} digits of base {base} do not pack into {MAX_DIGITS} bits; "
            f"use num_subtokens={digits_needed(vocab_size, base)}"
        )
    capacity = base**num_subtokens
    if vocab_size > capacity:
        raise ValueError(
            f"vocab_size={vocab_size} does not fit in num_subtokens={num_subtokens} digits of base {base} "
            f"({capacity} codes); use num_subtokens={digits_needed(vocab_size, base)}"
        )
    if shuffle_domain not in ("codes", "vocab"):
        raise ValueError(f'shuffle_domain={shuffle_domain!r} is not one of "codes", "vocab"')
    if not 0.0 <= shuffle_ratio <= 1.0:
        raise ValueError(f"shuffle_ratio={shuffle_ratio} is outside [0, 1]; use 1.0 to shuffle everything")
    domain = capacity if shuffle_domain == "codes" else vocab_size
    num_shuffled = round(shuffle_ratio * domain)
    if num_shuffled > MAX_SHUFFLED_CODES:
        raise ValueError(
            f"shuffling {num_shuffled} codes is more than {MAX_SHUFFLED_CODES}; "
            f'use shuffle_domain="vocab", which permutes {vocab_size} ids'
        )
    sigma = torch.arange(vocab_size)
    shuffled = permutation(num_shuffled, shuffle_seed)[:vocab_size]
    sigma[: len(shuffled)] = shuffled
    powers = torch.tensor([base**j for j in reversed(range(num_subtokens))])
    return (sigma.unsqueeze(-1) // powers) % base


class PrimeV2CodeTable(nn.Module):
    """The code table as an integer buffer, with encode, decode and the packed form that the carry-over filter uses.

    `codes` (V + 1, S) int64: rows 0..V-1 are C, row V (the mask token) is all `base`, the masked digit.
    Packed form: one integer a token, `bits` bits a digit, first digit highest, so that a token v is consistent with a
    state exactly when `(packed[v] ^ packed_state) & visible_bits == 0`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vocab_size, self.base, self.num_subtokens = config.vocab_size, config.base, config.num_subtokens
        self.bits = max(1, (self.base - 1).bit_length())
        width = self.bits * self.num_subtokens
        self.packed_dtype = torch.int16 if width <= 16 else torch.int32 if width <= 32 else torch.int64
        self.codes = nn.Buffer(torch.empty(self.vocab_size + 1, self.num_subtokens, dtype=torch.long))

    def build(self) -> Tensor:
        """The buffer's contents, computed from the config on the CPU: (V + 1, S) int64."""
        config = self.config
        table = build_code_table(
            config.vocab_size,
            config.base,
            config.num_subtokens,
            config.shuffle_seed,
            0.0 if config.code_source == "data" else config.shuffle_ratio,
            config.shuffle_domain,
        )
        return torch.cat([table, torch.full((1, config.num_subtokens), config.base)])

    def set_codes(self, codes: Tensor) -> None:
        """Take the table C (V, S), digits in 0..base-1 with distinct rows, of a config with code_source="data"."""
        codes = codes.to(self.codes)
        if self.config.code_source != "data":
            raise ValueError(f'code_source={self.config.code_source!r} draws the table; use code_source="data"')
        if codes.shape != self.codes[:-1].shape or codes.min() < 0 or codes.max() >= self.base:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)} spanning [{codes.min()}, {codes.max()}] must be "
                f"{tuple(self.codes[:-1].shape)} in [0, {self.base - 1}]"
            )
        if len(codes.unique(dim=0)) != len(codes):
            raise ValueError("two tokens have the same code; every token needs a code of its own")
        self.codes[:-1] = codes

    def encode(self, ids: Tensor) -> Tensor:
        """Token ids (...) int64 in [0, V], V meaning masked, to digits (..., S) int64 in [0, base], base = masked."""
        check_ids(ids, self.vocab_size + 1, f"the mask token {self.vocab_size} included")
        return self.digits_of(ids)

    def digits_of(self, ids: Tensor) -> Tensor:
        """`encode` for ids that have been checked; ValueError where accelerate keeps the table elsewhere."""
        if self.codes.is_meta and not ids.is_meta:
            raise ValueError(
                "the code table is offloaded, but it is read outside of any module's call; keep buffers where the "
                "model is computed: offload_buffers=False"
            )
        return self.codes[ids]

    def decode(self, subtoken_ids: Tensor) -> Tensor:
        """Digits (..., S) to token ids (...); all digits masked gives the mask id V.

        Raises ValueError for a pattern that is no token: an unused code, a partly masked token, a digit out of range.
        """
        if subtoken_ids.shape[-1] != self.num_subtokens:
            raise ValueError(
                f"subtoken_ids has {subtoken_ids.shape[-1]} digits in its last axis, but a token of this model has "
                f"{self.num_subtokens}"
            )
        if subtoken_ids.numel() and (subtoken_ids.min() < 0 or subtoken_ids.max() > self.base):
            raise ValueError(
                f"subtoken_ids span [{subtoken_ids.min()}, {subtoken_ids.max()}], but a digit of base {self.base} "
                f"is in [0, {self.base - 1}], or {self.base} when masked"
            )
        order, sorted_packed = self._sorted(self.codes)
        wanted = self._pack_with_mask(subtoken_ids)
        slot = torch.searchsorted(sorted_packed, wanted).clamp(max=self.vocab_size)
        unknown = sorted_packed[slot] != wanted
        if unknown.any():
            digits = subtoken_ids[unknown][0].tolist()
            partly = self.base in digits
            raise ValueError(
                f"the digits {digits} are {'partly masked' if partly else 'a code that no token uses'}; "
                f"only the {self.vocab_size} codes of the table and the fully masked token can be decoded"
            )
        return order[slot]

    def _sorted(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        packed = self._pack_with_mask(codes)
        order = torch.argsort(packed)
        return order, packed[order]

    def _pack_with_mask(self, digits: Tensor) -> Tensor:
        """Digits (..., S) in [0, base] to int64 (...), by powers of base + 1 (injective, masks included)."""
        packed = torch.zeros(digits.shape[:-1], dtype=torch.long, device=digits.device)
        for j in range(self.num_subtokens):
            packed = packed * (self.base + 1) + digits[..., j]
        return packed

    def _shifts(self, device: torch.device) -> Tensor:
        return self.bits * torch.arange(self.num_subtokens - 1, -1, -1, device=device)

    def pack(self, digits: Tensor) -> Tensor:
        """Unmasked digits (..., S) to `bits` bits each in one integer (...), int16 to int64 by the table's size."""
        return (digits << self._shifts(digits.device)).sum(-1).to(self.packed_dtype)

    def pack_visible(self, visible: Tensor) -> Tensor:
        """Which digits are visible, bool (..., S), to the bits that the filter compares, (...) as `pack`."""
        field = (1 << self.bits) - 1
        return ((visible.long() * field) << self._shifts(visible.device)).sum(-1).to(self.packed_dtype)

    def packed_codes(self) -> Tensor:
        """The V tokens' packed codes (V,), in id order."""
        return self.pack(self.codes[:-1])

    def consistent(self, subtoken_ids: Tensor) -> Tensor:
        """Which tokens a state allows: states (..., S) to bool (..., V); all True where every digit is masked."""
        visible = subtoken_ids != self.base
        state = self.pack(torch.where(visible, subtoken_ids, 0))
        mismatch = (self.packed_codes() ^ state.unsqueeze(-1)) & self.pack_visible(visible).unsqueeze(-1)
        return mismatch == 0

    def one_hot(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The V codes one-hot, (V, S * base): column `j * base + c` is 1 where digit j equals c."""
        # Not `one_hot`, for whose checks the host would wait for an accelerator.
        hot = self.codes[:-1].unsqueeze(-1) == torch.arange(self.base, device=self.codes.device)
        return hot.flatten(1).to(dtype)

    def digit_marginals(self, probabilities: Tensor) -> Tensor:
        """Marginals of each digit, (..., V) to (..., S, base): m_ij(c) = sum of p(v) over the v with C[v, j] = c.

        A sum of non-negative terms for every c, so nothing cancels.
        """
        flat = probabilities @ self.one_hot(probabilities.dtype)
        return flat.unflatten(-1, (self.num_subtokens, self.base))


def reads_values(tensor: Tensor) -> bool:
    """Whether checks read a tensor's values: on the CPU, and on an accelerator where no gradient is recorded.

    Reading them makes the host wait for an accelerator, which a training step should not do for a check. Nothing is
    read while compiling.
    """
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or not torch.is_grad_enabled())


def check_ids(ids: Tensor, limit: int, note: str) -> None:
    """ValueError unless every id (integer tensor) is in [0, limit), where values are read (`reads_values`)."""
    if torch.compiler.is_compiling() or not ids.numel():
        return
    check_id_type(ids)
    if not reads_values(ids):
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise ValueError(f"token ids span [{low}, {high}], but this model's ids are in [0, {limit - 1}], {note}")


def check_id_type(ids: Tensor) -> None:
    """ValueError unless ids are int64 or int32: tensors of fewer bits are masks, or nothing, where they index."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"token ids must be integers, not {ids.dtype}; use ids.long()")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token ids must be of 64 or 32 bits, not {ids.dtype}; use ids.long()")
