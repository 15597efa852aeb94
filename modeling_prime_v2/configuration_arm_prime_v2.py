"""Configuration of the autoregressive model (ARM)."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_backbone_prime_v2 import PrimeV2CodedConfig

MODEL_CLASS = "modeling_arm_prime_v2.PrimeV2ForCausalLM"


@strict
class PrimeV2ArmConfig(PrimeV2CodedConfig):
    """Shape of an autoregressive model on the Transformer of the other families, which are compared with it.

    Args:
        num_subtokens: S, the digits whose vectors make up the embedding of an input token; the head predicts whole
            tokens for every S. 1, the default, leaves tokens whole: the network is Llama's, and `base`, the shuffle
            and `subtoken_embedding` change nothing. None means ceil(log_base V). With
            subtoken_embedding "ancestors" at its default levels tokens are whole too, and codes are for the head.
        use_cache: whether `forward` without labels returns keys and values by default, as in Transformers.
        bos_token_id, eos_token_id: the first of them that is there starts every text (`start_token_id`).
        The other fields are those of `PrimeV2CodedConfig` and `PrimeV2BackboneConfig`.

    Raises `StrictDataclassClassValidationError` (a ValueError's text inside) for impossible combinations.
    """

    model_type = "prime_v2_arm"
    causal: ClassVar[bool] = True
    keys_to_ignore_at_inference = ["is_bound", "cache", "past_key_values"]

    num_subtokens: int | None = 1
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        if self.auto_map is None:
            self.auto_map = {
                "AutoConfig": "configuration_arm_prime_v2.PrimeV2ArmConfig",
                "AutoModel": MODEL_CLASS,
                "AutoModelForCausalLM": MODEL_CLASS,
            }
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation, see `PrimeV2CodedConfig`; also what needs codes."""
        super().validate_architecture()
        self.check_tree()


# So that save_pretrained copies this file and those it imports into the folder.
PrimeV2ArmConfig.register_for_auto_class()
