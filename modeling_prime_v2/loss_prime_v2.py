"""What the losses of all families share: the output, which tokens are scored, the noise of a batch, the divisor.

Values are checked where that makes no accelerator wait (`reads_values`): a training step on an accelerator reads none
of its batch on the host for a check. The collator has checked them on the CPU (`check_batch`, which
`prime_v2.data.packing.collate` calls), and a kernel refuses labels unlike the input. The host reads that remain are of
shapes, such as how many tokens are hidden (`nonzero`) or have the same visible node (stage_head_prime_v2.py), and
whether a chunk of the loss has a rare digit (chunked_loss_prime_v2.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .backbone_prime_v2 import NOT_SCORED
from .code_table_prime_v2 import check_ids, reads_values
from .diffusion_prime_v2 import stratified_levels
from .validation_inputs_prime_v2 import check_length, check_mask
from .validation_keywords_prime_v2 import shown


@dataclass
class PrimeV2Output(ModelOutput):
    """Output of the diffusion models.

    loss: scalar, nats per scored token over the noise drawn; None without labels.
    is_bound: whether the loss is an upper bound on -log p(x) per token in expectation over the noise.
    logits: (B, L, V) float, at least float32; None when labels are given. Masked and interpolating diffusion: tokens
        that contradict what is visible are excluded; uniform-state diffusion: log p up to a constant, p as of
        diffusion_uniform_prime_v2.py.
    hidden_states, attentions: as in Transformers, on request (interpolating diffusion: not with labels).
    loss_per_sequence: (B,) float64, detached, each row's share of the loss: nats whose sum is the loss times its
        divisor. What Transformers' Trainer gives as predictions where there are labels. None without labels.
    """

    loss: Tensor | None = None
    is_bound: bool | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    loss_per_sequence: Tensor | None = None


@dataclass
class TrainingBatch:
    """A batch with labels: clean ids (B, L) int64; scored (B, L) bool; the noise's keys and levels (B,)."""

    ids: Tensor
    scored: Tensor
    noise_keys: Tensor
    noise_levels: Tensor


def sum_by_row(nats: Tensor, rows: Tensor, count: int) -> Tensor:
    """nats (N,) of the rows (N,) to the sums of `count` rows, float64."""
    return torch.zeros(count, dtype=torch.double, device=nats.device).index_add_(0, rows, nats.double())


def training_batch(
    config: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    noise_keys: Tensor | None,
    noise_levels: Tensor | None,
) -> TrainingBatch:
    """The batch of a diffusion model's loss, checked; noise that is not given is drawn from torch's generator.

    The drawn levels are stratified over the batch. ValueError as of `scored_tokens` and `check_length`.
    """
    scored, ids = scored_tokens(input_ids, attention_mask, labels, config, noise_keys, noise_levels)
    check_length(ids, attention_mask, config)
    if noise_keys is None:
        noise_keys = torch.randint(2**62, (len(ids),)).to(ids.device)
    if noise_levels is None:
        seed = int(torch.randint(2**62, ()))
        noise_levels = stratified_levels(torch.arange(len(ids), device=ids.device), len(ids), seed)
    return TrainingBatch(ids, scored, noise_keys, noise_levels)


def scored_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    config: Any,
    noise_keys: Tensor | None = None,
    noise_levels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(which tokens are scored (B, L) bool, clean ids (B, L)) of a training batch; labels -100 and padding are not.

    ValueError for other shapes than (B, L), labels out of range or unlike the input, nothing to score, masks of other
    values than 0 and 1, and for noise that is not (B,) integer keys and levels in (0, 1).
    """
    check_shapes(input_ids, attention_mask, labels)
    check_noise(len(input_ids), noise_keys, noise_levels)
    scored = labels != NOT_SCORED
    if attention_mask is not None:
        scored = scored & attention_mask.bool()
    ids = torch.where(scored, labels, input_ids)
    check_labels(input_ids, ids, scored, config, attention_mask, noise_levels)
    return scored, ids


def check_batch(config: Any, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> None:
    """ValueError for a batch of training that the model with this config would refuse; for collators, on the CPU."""
    scored_tokens(input_ids, attention_mask, labels, config)
    check_length(input_ids, attention_mask, config)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    highest = getattr(config, "mask_token_id", None) or config.vocab_size - 1
    check_ids(input_ids.masked_fill(real == 0, 0), highest + 1, "the mask token, if there is one, included")


def divisor(num_items_in_batch: Tensor | int | None, scored: Tensor) -> Tensor | int:
    """What a loss is divided by: the scored tokens of the optimiser's step, by default those of this batch (B, L).

    ValueError for a number that is not positive and finite; the value of an accelerator's tensor is not read.
    """
    if num_items_in_batch is None:
        return scored.sum()
    seen = not isinstance(num_items_in_batch, Tensor) or num_items_in_batch.device.type == "cpu"
    if seen and not torch.compiler.is_compiling() and not 0 < float(num_items_in_batch) < float("inf"):
        raise ValueError(
            f"num_items_in_batch={shown(num_items_in_batch)} must be a positive number, the scored tokens of the "
            f"optimiser's step; leave it out to count this batch"
        )
    return num_items_in_batch


def refuse_lost_labels(num_items_in_batch: Tensor | int | None) -> None:
    """ValueError for a divisor of a loss that came without labels, which Trainer's own losses take away."""
    if num_items_in_batch is not None:
        raise ValueError(
            "num_items_in_batch was given without labels, as by Trainer with label_smoothing_factor or "
            "compute_loss_func, which take the labels for a loss of their own from logits of known tokens; leave both "
            "out: the model computes its loss from labels"
        )


def check_shapes(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> None:
    """ValueError unless ids, mask and labels are (B, L) alike, with at least one row of one token."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give (B, L) with at least one token")
    for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but input_ids {tuple(input_ids.shape)}")


def check_labels(
    input_ids: Tensor,
    ids: Tensor,
    scored: Tensor,
    config: Any,
    attention_mask: Tensor | None = None,
    noise_levels: Tensor | None = None,
) -> None:
    """ValueError unless the batch has a scored token, with labels equal to the input where that is not the mask.

    Also for an attention_mask of other values than 0 and 1, and noise levels outside (0, 1). In a training step on an
    accelerator the labels are checked by a kernel, without a sentence.
    """
    if torch.compiler.is_compiling():
        return
    check_mask("attention_mask", attention_mask)
    if noise_levels is not None and reads_values(noise_levels):
        outside = ~((noise_levels > 0) & (noise_levels < 1))
        if outside.any():
            raise ValueError(f"noise_levels holds {noise_levels[outside][0].item()}, outside (0, 1); use 0.5")
    changed = scored & (ids != input_ids) & (input_ids != getattr(config, "mask_token_id", None))
    if not reads_values(scored):
        if scored.device.type in ("cpu", "cuda"):  # the kernels that there are
            torch._assert_async(scored.any() & ~changed.any(), "labels are the clean input ids, and some are scored")
        return
    if not scored.any():
        raise ValueError("no label to score: every one is -100 or padding; give clean token ids where to score")
    check_ids(ids[scored], config.vocab_size, "labels are predictable tokens")
    if changed.any():
        row, column = (int(each) for each in changed.nonzero()[0])
        raise ValueError(
            f"labels[{row}, {column}]={int(ids[row, column])} differs from input_ids={int(input_ids[row, column])}; "
            f"labels are the clean input ids, not shifted, with -100 where nothing is scored"
        )


def check_noise(rows: int, noise_keys: Tensor | None, noise_levels: Tensor | None) -> None:
    """ValueError unless noise_keys are (B,) integers and noise_levels (B,) floats; None is neither looked at."""
    for name, tensor, is_right, what in (
        ("noise_keys", noise_keys, lambda each: each.dtype in (torch.int64, torch.int32), "integers"),
        ("noise_levels", noise_levels, torch.is_floating_point, "floating-point numbers in (0, 1)"),
    ):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != (rows,) or not is_right(tensor):
            kind = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else shown(tensor)
            raise ValueError(f"{name} is {kind}; give a tensor of {rows} {what}, one a row")


def refuse_noise(noise_keys: Any, noise_levels: Any) -> None:
    """ValueError for noise that nothing reads, given without labels."""
    for name, value in (("noise_keys", noise_keys), ("noise_levels", noise_levels)):
        if value is not None:
            raise ValueError(f"{name} was given without labels, whose noise it fixes; leave it out")
