"""What a batch must be before the network sees it. Values are not looked at while compiling."""

import torch
from torch import Tensor

from .backbone_prime_v2 import NOT_SCORED
from .code_table_prime_v2 import check_ids


def scored_tokens(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, config) -> tuple[Tensor, Tensor]:
    """(which tokens are scored (B, L) bool, clean ids (B, L)) of a training batch; labels -100 and padding are not.

    ValueError for other shapes than (B, L), labels out of range or unlike the input, and nothing to score.
    """
    check_shapes(input_ids, attention_mask, labels)
    scored = labels != NOT_SCORED
    if attention_mask is not None:
        scored = scored & attention_mask.bool()
    ids = torch.where(scored, labels, input_ids)
    check_labels(input_ids, ids, scored, config)
    return scored, ids


def check_length(inputs: Tensor, attention_mask: Tensor | None, config) -> None:
    """ValueError unless inputs (B, L, ...) fit into the network and their mask (B, L) leaves a token in every row."""
    if torch.compiler.is_compiling():
        return
    batch, length = inputs.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"the batch has {batch} rows of {length} tokens; give at least one row of one token")
    if length > config.max_position_embeddings:
        raise ValueError(
            f"the input has {length} tokens, but max_position_embeddings={config.max_position_embeddings}; "
            f"cut it to {config.max_position_embeddings} tokens"
        )
    if attention_mask is not None and attention_mask.dim() == 2:
        if attention_mask.shape != (batch, length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but the input has {(batch, length)}"
            )
        empty = (attention_mask != 0).sum(1) == 0
        if empty.any():
            raise ValueError(f"row {int(empty.nonzero()[0])} of attention_mask is padding alone; drop that row")


def check_shapes(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> None:
    """ValueError unless ids, mask and labels are (B, L) alike, with at least one row of one token."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give (B, L) with at least one token")
    for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but input_ids {tuple(input_ids.shape)}")


def check_labels(input_ids: Tensor, ids: Tensor, scored: Tensor, config) -> None:
    """ValueError unless the batch has a scored token, with labels equal to the input where that is not the mask."""
    if torch.compiler.is_compiling():
        return
    if not scored.any():
        raise ValueError("no label to score: every one is -100 or padding; give clean token ids where to score")
    check_ids(ids[scored], config.vocab_size, "labels are predictable tokens")
    changed = scored & (ids != input_ids) & (input_ids != getattr(config, "mask_token_id", None))
    if changed.any():
        row, column = (int(each) for each in changed.nonzero()[0])
        raise ValueError(
            f"labels[{row}, {column}]={int(ids[row, column])} differs from input_ids={int(input_ids[row, column])}; "
            f"labels are the clean input ids, not shifted, with -100 where nothing is scored"
        )


__all__ = ["check_labels", "check_length", "check_shapes", "scored_tokens"]
