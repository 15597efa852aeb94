"""What tests attach to a network or to `generate` to see what passes through it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            # An expanded view has more elements than its memory.
            if isinstance(each, torch.Tensor) and 0 not in each.stride():
                self.numel = max(self.numel, each.numel())
        return result


class Favour:
    """A logits processor that makes some tokens likelier, and keeps what it was given."""

    def __init__(self, tokens, by):
        self.tokens, self.by, self.seen = tokens, by, []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.clone(), scores.shape))
        scores[:, self.tokens] += self.by
        return scores


class Recorder:
    """A streamer that keeps its calls, (kind, value)."""

    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(("put", value))

    def put_draft(self, value):
        self.calls.append(("draft", value))

    def end(self):
        self.calls.append(("end", None))
