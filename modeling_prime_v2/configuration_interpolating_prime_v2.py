"""Configuration of an interpolating diffusion network."""

from huggingface_hub.dataclasses import strict

from .configuration_backbone_prime_v2 import PrimeV2CodedConfig

MODEL_CLASS = "modeling_interpolating_prime_v2.PrimeV2ForInterpolatingDiffusion"
LOSS_WEIGHTS = ("elbo", "low_variance")


@strict
class PrimeV2InterpolatingConfig(PrimeV2CodedConfig):
    """Shape and objective of a network between autoregression and masked diffusion (Eso-LM, arXiv:2506.01928).

    Args:
        vocab_size: V, the number of tokens that can be predicted. The mask token has the id V.
        num_subtokens: S, the digits whose vectors make up the embedding of a token, and by which a head in stages
            predicts it; tokens are hidden and revealed whole for every S. With 1, the default, `base`, the shuffle and
            `subtoken_embedding` change nothing. None means ceil(log_base V).
        alpha_0: the chance that a token is revealed by the diffusion, in random order; what is left follows from left
            to right. 1 is masked diffusion (MDM), 0 is left-to-right autoregression.
        ar_share: the share of a training batch that is spent on the left-to-right term; None means 1 - alpha_0, kept
            in [0.05, 0.95] unless alpha_0 is 0 or 1, where the share is 1 or 0.
        loss_weight: "elbo" or "low_variance" (weight 1 instead of n/k in the diffusion term, no bound).
        mask_token_id: always `vocab_size`.
        The other fields are those of `PrimeV2CodedConfig` and `PrimeV2BackboneConfig`.

    Raises `StrictDataclassClassValidationError` (a ValueError's text inside) for impossible combinations.
    """

    model_type = "prime_v2_interpolating"

    num_subtokens: int | None = 1
    alpha_0: int | float = 0.5
    ar_share: int | float | None = None
    loss_weight: str = "elbo"
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.auto_map is None:
            self.auto_map = {
                "AutoConfig": "configuration_interpolating_prime_v2.PrimeV2InterpolatingConfig",
                "AutoModel": MODEL_CLASS,
                "AutoModelForMaskedLM": MODEL_CLASS,
            }
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation: refuse every impossible combination by name, value and a value that works."""
        super().validate_architecture()
        self.check_tree()
        if self.loss_weight not in LOSS_WEIGHTS:
            raise ValueError(f"loss_weight={self.loss_weight!r} is not one of {', '.join(LOSS_WEIGHTS)}")
        if not 0 <= self.alpha_0 <= 1:
            raise ValueError(f"alpha_0={self.alpha_0} is outside [0, 1]; use 0.5")
        self._check_share()

    def _check_share(self):
        """A term with weight needs a share of the batch, one without takes none."""
        if self.ar_share is None:
            return
        if self.alpha_0 in (0, 1) and self.ar_share != 1 - self.alpha_0:
            raise ValueError(
                f"ar_share={self.ar_share} must be {1 - self.alpha_0} for alpha_0={self.alpha_0}, which has only "
                f"one term; leave it out"
            )
        if 0 < self.alpha_0 < 1 and not 0 < self.ar_share < 1:
            raise ValueError(
                f"ar_share={self.ar_share} is outside (0, 1), but alpha_0={self.alpha_0} has two terms to train; "
                f"use {1 - self.alpha_0:g}, or leave it out"
            )


# So that save_pretrained copies this file and those it imports into the folder.
PrimeV2InterpolatingConfig.register_for_auto_class()
