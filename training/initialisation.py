"""Weights to begin with that know which tokens are used alike (`--embedding_init distributional`).

Vectors of the tokens from their neighbours in the training text (`tokenization.codes.neighbour_vectors`) become the
input embedding and the head, in whatever parts a model has them: so that each token's vector, and its row of the head,
is its vector from the text, and a masked or partly known token is the mean of the tokens that it may be.
"""

from typing import Any

import torch
from torch import Tensor

from prime_v2.tokenization.codes import SOURCES
from prime_v2.tree_embedding_prime_v2 import node_rows

INITS = ("random", "distributional")
RMS = 0.1  # of the entries that are set


def check_initialisation(run: Any, model_options: dict[str, Any]) -> list[str]:
    """What is wrong with the options of a run that makes codes or vectors from its text."""
    problems = []
    if run.embedding_init not in INITS:
        problems.append(f"--embedding_init {run.embedding_init} is not one of {', '.join(INITS)}")
    if run.streaming and run.codes in SOURCES:
        problems.append(
            f"--codes {run.codes} reads the training text before training, which --streaming does not keep; leave one "
            f"of them out, or give --codes an .npy of vectors"
        )
    if run.embedding_init != "distributional":
        return problems
    if run.streaming:
        problems.append(
            "--embedding_init distributional reads the training text before training, which --streaming does not "
            "keep; leave one of them out"
        )
    if model_options.get("subtoken_embedding") == "concat_shared":
        problems.append(
            "--embedding_init distributional needs a vector for a digit at each position, but "
            "subtoken_embedding=concat_shared has one for all; use sum or concat"
        )
    return problems


@torch.no_grad()
def set_vectors(model: Any, vectors: Tensor) -> None:
    """Set input embedding and head of a model of any family from vectors (V, K) of the tokens, K <= D.

    The vectors are scaled to `RMS`; those of tokens that do not occur are 0. Dimensions from K on stay as drawn. A
    head that is tied to the embedding has no weights to set.
    """
    occurring = vectors.abs().sum(1) > 0
    vectors = (vectors * RMS / vectors[occurring].square().mean().sqrt()).float()
    config, network = model.config, model.model
    table, form = model.get_input_embeddings(), getattr(config, "subtoken_embedding", None)
    codes = None if getattr(network, "code_table", None) is None else network.code_table.codes[:-1]
    if form == "ancestors":
        weight, ends = network.embed_subtokens.table.weight, (0, *config.levels)
        _fill(weight, node_vectors(vectors, codes, config.base, ends))
    elif codes is None or config.num_subtokens == 1:
        _fill_tokens(table.weight, vectors, codes)
    else:
        _fill_digits(network.embed_subtokens, vectors, codes, config.base)
    if config.tie_word_embeddings:
        return
    if model.is_staged:
        tree, above = model.head().tree, torch.zeros_like(vectors)
        ends = config.head_ends[:-1]
        parts = [node_vectors(vectors, codes, config.base, ends)] if ends else []
        for rows in node_rows(codes, config.base, ends)[0].unbind(-1) if ends else ():
            above = above + parts[0][rows]
        vectors = torch.cat([*parts, (vectors - above)[tree.order]])
    nodes = getattr(model, "head_nodes", None)
    if nodes is not None:
        above = node_vectors(vectors, codes, config.base, nodes.ends)
        _fill(nodes.table.weight, above)
        rows, _ = node_rows(codes, config.base, nodes.ends)
        vectors = vectors - above[rows].sum(1)
    _fill(model.lm_head.weight, vectors)


def node_vectors(vectors: Tensor, codes: Tensor, base: int, ends: tuple[int, ...]) -> Tensor:
    """Vectors of the nodes of the code tree at digit counts `ends`, (nodes, K), in the order of `node_rows`.

    A node's is the mean of its tokens' (V, K) minus its parent's mean, if that is among the nodes; a node without
    tokens has 0. So the sum over a token's ancestors is the mean of the last of them: its own at the last level.
    """
    rows, _ = node_rows(codes, base, ends)  # (V, len(ends))
    first, parts, parent = 0, [], torch.zeros(len(codes), 1)
    for level, end in enumerate(ends):
        node = rows[:, level] - first
        mean = _means(vectors, node, base**end)
        parts.append(_means(mean[node] - parent, node, base**end))
        first, parent = first + base**end, mean[node]
    return torch.cat(parts)


def _means(vectors: Tensor, groups: Tensor, number: int) -> Tensor:
    """Mean of the vectors (V, K) of each of `number` groups, (number, K), in float64; 0 for an empty one."""
    total = torch.zeros(number, vectors.shape[1], dtype=torch.double).index_add_(0, groups, vectors.double())
    return (total / groups.bincount(minlength=number).clamp(min=1).unsqueeze(1)).to(vectors.dtype)


def _fill(weight: Tensor, vectors: Tensor) -> None:
    weight[: len(vectors), : vectors.shape[1]] = vectors


def _fill_tokens(weight: Tensor, vectors: Tensor, codes: Tensor | None) -> None:
    """Whole tokens, in rows by id or by their one digit; a last row is the mask's, the mean of all."""
    weight[:, : vectors.shape[1]] = vectors.mean(0)
    rows = torch.arange(len(vectors)) if codes is None else codes[:, 0]
    weight[rows, : vectors.shape[1]] = vectors


def _fill_digits(embedding: Any, vectors: Tensor, codes: Tensor, base: int) -> None:
    """A digit's vector from the mean of the tokens that have it; a masked one's from the mean of all.

    "sum": with the mean of all tokens divided among the positions, so that masked digits add to it. "concat": each
    position has a part of the dimensions.
    """
    weight, mean = embedding.table.weight, vectors.mean(0)
    positions, width = codes.shape[1], weight.shape[1]
    for position in range(positions):
        of_digits = _means(vectors, codes[:, position], base)
        of_digits[codes[:, position].bincount(minlength=base) == 0] = mean
        of_values = torch.cat([of_digits, mean.unsqueeze(0)])[: embedding.num_values]
        if embedding.form == "sum":
            of_values = of_values - mean + mean / positions
        else:
            of_values = of_values[:, position * width : (position + 1) * width]
        start = position * embedding.num_values
        _fill(weight[start : start + embedding.num_values], of_values)
