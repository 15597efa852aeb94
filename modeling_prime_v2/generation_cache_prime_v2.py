"""Keys and values that are kept while a block is filled: the approximate caches of Fast-dLLM (arXiv:2505.22618).

In a network that attends to both sides every token's keys and values change with every reveal. With cache="prefix"
those before the block that is being filled are kept from its first pass to its last, with cache="dual" those after it
(later blocks and the suffix) as well; the first pass of a block runs the network on everything. So samples are those
of another, cheaper sampler, whose law is exact all the same (`log_likelihood(method="sampler")`).
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

CACHES = ("none", "prefix", "dual")


class KeptKeysAndValues(Cache):
    """What `PrimeV2Attention` takes as a cache: it writes new keys and values (R, heads, n, head_dim) over the old.

    rows (R,) int64 and columns (R, n) int64, or None for all T columns, say where the next pass stands.
    """

    def __init__(self, num_rows: int):
        super().__init__(layer_class_to_replicate=DynamicLayer)  # what Transformers asks of a cache; none is used
        self.num_rows = num_rows
        self.kept: dict[int, list[Tensor]] = {}
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns (R, heads, T, head_dim), the new ones among them."""
        if layer_idx not in self.kept:
            shape = (self.num_rows, *key_states.shape[1:])
            self.kept[layer_idx] = [key_states.new_zeros(shape), value_states.new_zeros(shape)]
        for kept, new in zip(self.kept[layer_idx], (key_states, value_states), strict=True):
            if self.columns is None:
                kept[self.rows] = new
            else:
                kept[self.rows.unsqueeze(1), :, self.columns] = new.transpose(1, 2)
        keys, values = self.kept[layer_idx]
        return keys[self.rows], values[self.rows]


class CachedPasses:
    """Runs the network over rows of a process, each on what its block needs; `kind` is "prefix" or "dual"."""

    def __init__(self, kind: str, process: Any):
        self.kind, self.process, self.model, self.canvas = kind, process, process.model, process.canvas
        self.block_of, canvas = process.blocks.of, process.canvas
        self.cache = KeptKeysAndValues(len(canvas.ids))
        self.filled = torch.full((len(canvas.ids),), -1, device=canvas.ids.device)  # the block of the kept keys

    def hidden_states(self, picked: Tensor, target_mask: Tensor) -> Tensor:
        """Hidden states (M, D) of the tokens of `target_mask` (R, T) bool, all in the block their row is filling."""
        unknown = self.canvas.ids[picked] == self.model.config.mask_token_id
        beyond = int(self.block_of.max()) + 1
        present = self.block_of[picked].masked_fill(~unknown, beyond).amin(1)
        outside = target_mask & (self.block_of[picked] != present.unsqueeze(1))  # of a row that is finished at once
        fresh = (present != self.filled[picked]) | outside.any(1)
        at, columns = target_mask.nonzero(as_tuple=True)
        found = None
        for group in (fresh, ~fresh):
            if not group.any():
                continue
            rows, wanted, targets = picked[group], group[at], target_mask[group]
            run = None if group is fresh else self._columns(rows, present[group])
            if run is not None:
                number = targets.nonzero(as_tuple=True)[0]
                place = torch.searchsorted(run[number], columns[wanted].unsqueeze(1)).squeeze(1)
                targets = torch.zeros_like(run, dtype=torch.bool)
                targets[number, place] = True
            output = self._run(rows, run, targets)  # in the order of rows and columns, as `found` is
            if found is None:
                found = output.new_empty(len(at), output.shape[-1])
            found[wanted] = output
        self.filled[picked] = present
        return found

    def _columns(self, rows: Tensor, present: Tensor) -> Tensor:
        """The columns that a pass runs, (r, n) rising; short rows repeat their last one."""
        inside = self.canvas.fillable[rows] & (self.block_of[rows] == present.unsqueeze(1))
        if self.kind == "prefix":
            first = inside.int().argmax(1, keepdim=True)
            numbers = torch.arange(inside.shape[1], device=rows.device)
            inside = self.canvas.real[rows] & (numbers >= first)
        count = inside.sum(1)
        order = inside.int().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
        last = order.gather(1, (count - 1).unsqueeze(1))
        return torch.where(torch.arange(order.shape[1], device=rows.device) < count.unsqueeze(1), order, last)

    def _run(self, rows: Tensor, columns: Tensor | None, targets: Tensor) -> Tensor:
        """Hidden states (m, D) of `targets`, bool in the shape of the columns that run."""
        canvas, network = self.canvas, self.model.model
        self.cache.rows, self.cache.columns = rows, columns
        states, positions, real = self.process.states[rows], canvas.position_ids[rows], canvas.real[rows]
        if columns is not None:
            states = states.gather(1, columns.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
            positions = positions.gather(1, columns)
        embedded = network.embed_subtokens(states)
        mask = None
        if not bool(real.all()):
            lowest = torch.finfo(embedded.dtype).min
            mask = torch.zeros_like(real, dtype=embedded.dtype).masked_fill(~real, lowest)[:, None, None]
            mask = mask.expand(-1, 1, positions.shape[1], -1)
        return network.run_layers(embedded, positions, mask, target_mask=targets, cache=self.cache)
