"""Configuration of a uniform-state diffusion network."""

from huggingface_hub.dataclasses import strict

from .configuration_backbone_prime_v2 import SIZES, PrimeV2BackboneConfig

MODEL_CLASS = "modeling_uniform_prime_v2.PrimeV2ForUniformDiffusion"
LOSS_WEIGHTS = ("elbo", "low_variance")


@strict
class PrimeV2UniformConfig(PrimeV2BackboneConfig):
    """Shape and objective of a uniform-state diffusion network (Duo, arXiv:2506.10892; UDLM, arXiv:2412.10193).

    Args:
        vocab_size: V, the number of tokens, all of which the noise is made of. Tokens stay whole.
        loss_weight: "elbo", the negative evidence lower bound, or "low_variance", the cross-entropy of the clean token
            given the noised ones at weight 1 (no bound).
        time_conditioning: tell the network the noise level, by scales of its norms.
        time_embedding_size: width of the embedding of the noise level, even.
        mask_token_id: always `vocab_size`: what stands for "to be generated" in `generate`. The network has no
            embedding for it.
        The other fields are those of `PrimeV2BackboneConfig`.

    Raises `StrictDataclassClassValidationError` (a ValueError's text inside) for impossible combinations.
    """

    model_type = "prime_v2_uniform"

    loss_weight: str = "elbo"
    time_conditioning: bool = True
    time_embedding_size: int = 128
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.auto_map is None:
            self.auto_map = {
                "AutoConfig": "configuration_uniform_prime_v2.PrimeV2UniformConfig",
                "AutoModel": MODEL_CLASS,
                "AutoModelForMaskedLM": MODEL_CLASS,
            }
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation: refuse every impossible combination by name, value and a value that works."""
        super().validate_architecture()
        if self.loss_weight not in LOSS_WEIGHTS:
            raise ValueError(f"loss_weight={self.loss_weight!r} is not one of {', '.join(LOSS_WEIGHTS)}")
        size = self.time_embedding_size
        if not 2 <= size <= SIZES["hidden_size"] or size % 2:
            raise ValueError(
                f"time_embedding_size={size} must be even and at least 2, at most {SIZES['hidden_size']}, a sine and "
                f"a cosine of each frequency; use {min(max(2, size + size % 2), SIZES['hidden_size'])}"
            )


# So that save_pretrained copies this file and those it imports into the folder.
PrimeV2UniformConfig.register_for_auto_class()
