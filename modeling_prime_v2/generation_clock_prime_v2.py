"""Passes of the network and their time, in a `generate` that is Transformers' own (`PrimeV2ForCausalLM`)."""

import time
from typing import Any

import torch
from torch import Tensor


class NetworkClock:
    """Counts and times the calls of a model within a `with` block; without `wanted` it does neither.

    An accelerator is waited for before and after each call, as times are of work that is done.
    """

    def __init__(self, model: Any, wanted: bool):
        self.model, self.wanted = model, wanted
        self.hooks: list[Any] = []
        self.calls, self.network, self.total = 0, 0.0, 0.0

    def __enter__(self) -> "NetworkClock":
        if self.wanted:
            self.hooks = [
                self.model.register_forward_pre_hook(self._before),
                self.model.register_forward_hook(self._after),
            ]
            self.entered = self._now()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.wanted:
            self.total = self._now() - self.entered
        for hook in self.hooks:
            hook.remove()

    def measured(self, generated: Tensor) -> dict[str, Any]:
        """The fields of `PrimeV2GenerationOutput` beside the sequences, for tokens `generated` (B, N) bool.

        A pass serves all rows; those that fed a row nothing but padding after its EOS do not count as its own.
        """
        tokens = generated.sum(1).cpu()
        num_forward = tokens.clamp(max=self.calls)
        return {
            "num_forward": num_forward,
            "network_seconds": self.network,
            "sampling_seconds": self.total - self.network,
            "tokens_per_forward": tokens.double() / num_forward,
        }

    def _now(self) -> float:
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize(self.model.device)
        return time.perf_counter()

    def _before(self, *_: Any) -> None:
        self.started = self._now()

    def _after(self, *_: Any) -> None:
        self.calls += 1
        self.network += self._now() - self.started
