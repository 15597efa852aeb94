"""Input vectors of whole states, beyond the linear forms of `backbone_prime_v2.PrimeV2SubtokenEmbedding`.

A sum of S digit vectors gives V tokens no more than S (b - 1) + 1 dimensions. Here a state has a vector of its own, or
a sum of vectors of parts that are more than a digit.
"""

import torch
from torch import Tensor, nn

from .backbone_prime_v2 import PrimeV2SubtokenEmbedding, plain_weight
from .code_table_prime_v2 import num_nodes


class PrimeV2PrefixEmbedding(nn.Module):
    """States of the nested order (B, L, S) to (B, L, D): a vector for each node of the code tree at `config.levels`.

    "prefix": the vector of the node; "ancestors": the sum of the vectors from the root to the node. A level of d
    digits has base**d nodes, d = 0 being the masked token; rows are ordered by level, then by the digits' value.
    """

    def __init__(self, config):
        super().__init__()
        self.base, self.num_subtokens = config.base, config.num_subtokens
        self.ends = (0, *config.levels)
        self.with_ancestors = config.subtoken_embedding == "ancestors"
        self.table = nn.Embedding(num_nodes(config.base, self.ends), config.hidden_size)

    def forward(self, subtoken_ids: Tensor) -> Tensor:
        rows, stage = node_rows(subtoken_ids, self.base, self.ends)  # (B, L, levels + 1), (B, L)
        if not self.with_ancestors:
            return self.table(rows.gather(-1, stage.unsqueeze(-1)).squeeze(-1))
        known = torch.arange(len(self.ends), device=rows.device) <= stage.unsqueeze(-1)
        weights = known.to(self.table.weight.dtype).flatten(0, -2)
        flat = rows.masked_fill(~known, 0).flatten(0, -2)
        vectors = nn.functional.embedding_bag(flat, plain_weight(self.table), mode="sum", per_sample_weights=weights)
        return vectors.unflatten(0, rows.shape[:-1])


class PrimeV2HeadNodes(nn.Module):
    """What a token's row of the head shares with others: a vector for each node above it at `config.levels`."""

    def __init__(self, config):
        super().__init__()
        self.base, self.ends = config.base, config.levels[:-1]
        self.table = nn.Embedding(num_nodes(self.base, self.ends), config.hidden_size)

    def forward(self, codes: Tensor) -> Tensor:
        """The table C (V, S) to (V, D)."""
        rows, _ = node_rows(codes, self.base, self.ends)
        return nn.functional.embedding_bag(rows, plain_weight(self.table), mode="sum")


def node_rows(subtoken_ids: Tensor, base: int, ends: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """States (..., S) to the row of each level's node (..., len(ends)), right up to the level (...) that comes second.

    ends: rising digit counts; the level, counted from 0, is the highest whose leading digits are all visible.
    """
    num_subtokens, visible = subtoken_ids.shape[-1], subtoken_ids != base
    powers = base ** torch.arange(num_subtokens - 1, -1, -1, device=subtoken_ids.device)
    value = (subtoken_ids.masked_fill(~visible, 0) * powers).sum(-1)
    rows, first = [], 0
    for end in ends:
        rows.append(first + value // base ** (num_subtokens - end))
        first += base**end
    limits = torch.tensor(ends, device=subtoken_ids.device)
    return torch.stack(rows, -1), torch.searchsorted(limits, visible.sum(-1), right=True) - 1


class PrimeV2GroupEmbedding(nn.Module):
    """States (B, L, S) to (B, L, D): a sum over groups of `group_digits` digits, a vector for each state of a group.

    A group of g digits has (base + 1)**g states, masked digits included, so any order of reveal is served. The last
    group has what is left of S.
    """

    def __init__(self, config):
        super().__init__()
        size, digits, values = config.group_digits, config.num_subtokens, config.base + 1
        sizes = [min(size, digits - start) for start in range(0, digits, size)]
        self.values, self.sizes = values, sizes
        self.table = nn.Embedding(sum(values**each for each in sizes), config.hidden_size)

    def forward(self, subtoken_ids: Tensor) -> Tensor:
        rows, first = [], 0
        for group in subtoken_ids.split(self.sizes, dim=-1):
            size = group.shape[-1]
            powers = self.values ** torch.arange(size - 1, -1, -1, device=group.device)
            rows.append(first + (group * powers).sum(-1))
            first += self.values**size
        flat = torch.stack(rows, -1).flatten(0, -2)
        vectors = nn.functional.embedding_bag(flat, plain_weight(self.table), mode="sum")
        return vectors.unflatten(0, subtoken_ids.shape[:-1])


def make_embedding(config) -> nn.Module:
    """The input embedding that `config.subtoken_embedding` names; its rows are in `.table`."""
    if config.subtoken_embedding in ("prefix", "ancestors"):
        return PrimeV2PrefixEmbedding(config)
    if config.subtoken_embedding == "groups":
        return PrimeV2GroupEmbedding(config)
    return PrimeV2SubtokenEmbedding(config, config.base + 1)


__all__ = ["PrimeV2GroupEmbedding", "PrimeV2HeadNodes", "PrimeV2PrefixEmbedding", "make_embedding", "node_rows"]
