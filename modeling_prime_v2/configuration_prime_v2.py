"""Configuration of an MDM-Prime-v2 network."""

from huggingface_hub.dataclasses import strict

from .configuration_backbone_prime_v2 import PrimeV2CodedConfig

MODEL_CLASS = "modeling_prime_v2.PrimeV2ForMaskedDiffusion"
CHOICES = {
    "objective": ("token", "subtoken"),
    "loss_weight": ("elbo", "low_variance"),
    "noise_form": ("count", "time"),
    "reveal_order": ("digit", "token", "nested"),
}


@strict
class PrimeV2Config(PrimeV2CodedConfig):
    """Shape, code table and objective of an MDM-Prime-v2 network (arXiv:2603.16077).

    Args:
        vocab_size: V, the number of tokens that can be predicted. The mask token has the id V.
        num_subtokens: S, the digits of a token (the paper's l); None means ceil(log_base V). 1 is plain MDM.
        carry_over: filter the tokens that contradict a visible digit out of the softmax.
        objective: "token", the paper's loss -log q(x_i) (no bound on the likelihood for S > 1), or "subtoken", the
            negative evidence lower bound of `reveal_order` from the marginals of the digits.
        loss_weight: "elbo" or "low_variance" (weight 1, no bound).
        noise_form: "count" (hide k of n units, k uniform) or "time" (hide each unit with probability t, t uniform).
        reveal_order: the unit that is hidden and revealed: each "digit" (published), the whole "token", or "nested",
            stages of leading digits that end at the counts in `stage_digits`, e.g. [6, 11].
        whole_token_above: hide whole tokens when the masked share exceeds this (the published 1.1B recipe uses 0.5).
        mask_token_id: always `vocab_size`.
        The other fields are those of `PrimeV2CodedConfig` and `PrimeV2BackboneConfig`.

    Raises `StrictDataclassClassValidationError` (a ValueError's text inside) for impossible combinations.
    """

    model_type = "prime_v2"

    carry_over: bool = True
    objective: str = "token"
    loss_weight: str = "elbo"
    noise_form: str = "count"
    reveal_order: str = "digit"
    stage_digits: list[int] | None = None
    whole_token_above: int | float | None = None
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size
        if self.auto_map is None:
            self.auto_map = {
                "AutoConfig": "configuration_prime_v2.PrimeV2Config",
                "AutoModel": MODEL_CLASS,
                "AutoModelForMaskedLM": MODEL_CLASS,
            }
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation: refuse every impossible combination by name, value and a value that works."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        super().validate_architecture()
        self._validate_objective()

    def _validate_objective(self):
        if self.mask_token_id != self.vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_token_id} must be vocab_size={self.vocab_size}, the first id outside the "
                f"vocabulary; leave it out"
            )
        if (self.reveal_order == "nested") != (self.stage_digits is not None):
            raise ValueError(
                f"reveal_order={self.reveal_order!r} with stage_digits={self.stage_digits}: 'nested' needs the digit "
                f"counts at which its stages end, the others take none; use e.g. reveal_order='nested' and "
                f"stage_digits=[{(self.num_subtokens + 1) // 2}, {self.num_subtokens}]"
            )
        if self.stage_digits is not None:
            stages = [0, *self.stage_digits]
            rising = all(a < b for a, b in zip(stages, stages[1:], strict=False))
            if not rising or stages[-1] != self.num_subtokens:
                raise ValueError(
                    f"stage_digits={self.stage_digits} must rise from at least 1 to num_subtokens="
                    f"{self.num_subtokens}; use e.g. [{self.num_subtokens}]"
                )
        if self.whole_token_above is not None:
            if not 0 <= self.whole_token_above <= 1:
                raise ValueError(f"whole_token_above={self.whole_token_above} is outside [0, 1]; use 0.5 or None")
            if self.reveal_order != "digit":
                raise ValueError(
                    f"whole_token_above={self.whole_token_above} needs reveal_order='digit', "
                    f"not {self.reveal_order!r}; leave it out"
                )

    def validate_token_ids(self):
        """Warn as Transformers does, except for the mask id, which is V here by design."""
        mask_token_id = self.__dict__.pop("mask_token_id", None)
        try:
            super().validate_token_ids()
        finally:
            self.__dict__["mask_token_id"] = mask_token_id


# So that save_pretrained copies this file and those it imports into the folder.
PrimeV2Config.register_for_auto_class()

__all__ = ["PrimeV2Config"]
