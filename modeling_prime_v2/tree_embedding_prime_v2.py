"""Vectors of the nodes of the code tree, for input and head.

A sum of S digit vectors (`backbone_prime_v2.PrimeV2SubtokenEmbedding`) gives V tokens no more than S (b - 1) + 1
dimensions. Here each string of leading digits, down to whole tokens, has a vector of its own.
"""

import torch
from torch import Tensor, nn

from .backbone_prime_v2 import PrimeV2SubtokenEmbedding
from .code_table_prime_v2 import num_nodes


class PrimeV2TreeEmbedding(nn.Module):
    """States of the nested order (B, L, S) to (B, L, D): the sum of the vectors from the root to the state's node.

    Nodes are those of the code tree at `config.levels`. A level of d digits has base**d, d = 0 being the masked token;
    rows are ordered by level, then by the digits' value.
    """

    def __init__(self, config):
        super().__init__()
        self.base, self.ends = config.base, (0, *config.levels)
        self.table = nn.EmbeddingBag(num_nodes(self.base, self.ends), config.hidden_size, mode="sum")

    @property
    def weight(self) -> Tensor:
        """The table's rows, of nodes and not of tokens."""
        return self.table.weight

    def forward(self, subtoken_ids: Tensor) -> Tensor:
        rows, level = node_rows(subtoken_ids, self.base, self.ends)  # (B, L, levels + 1), (B, L)
        known = torch.arange(len(self.ends), device=rows.device) <= level.unsqueeze(-1)
        weights = known.to(self.table.weight.dtype).flatten(0, -2)  # 0 for levels that are not reached
        vectors = self.table(rows.flatten(0, -2), per_sample_weights=weights)
        return vectors.unflatten(0, rows.shape[:-1])


class PrimeV2HeadNodes(nn.Module):
    """What a token's row of the head shares with others: a vector for each node above it at `config.levels`."""

    def __init__(self, config):
        super().__init__()
        self.base, self.ends = config.base, config.levels[:-1]
        self.table = nn.EmbeddingBag(num_nodes(self.base, self.ends), config.hidden_size, mode="sum")

    def forward(self, codes: Tensor) -> Tensor:
        """The table C (V, S) to (V, D)."""
        rows, _ = node_rows(codes, self.base, self.ends)
        return self.table(rows)


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


def make_embedding(config) -> nn.Module:
    """The input embedding that `config.subtoken_embedding` names; its rows are in `.table`."""
    if config.subtoken_embedding == "ancestors":
        return PrimeV2TreeEmbedding(config)
    return PrimeV2SubtokenEmbedding(config, config.base + 1)
