"""MDM-Prime-v2 for Transformers: masked diffusion language models over binary sub-tokens."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "AncestralSamplerConfig": "samplers_prime_v2",
    "ConfidenceSamplerConfig": "samplers_prime_v2",
    "EntropyBoundSamplerConfig": "samplers_prime_v2",
    "PredictorCorrectorSamplerConfig": "samplers_prime_v2",
    "PrimeV2ArmConfig": "configuration_arm_prime_v2",
    "PrimeV2Config": "configuration_prime_v2",
    "PrimeV2ForCausalLM": "modeling_arm_prime_v2",
    "PrimeV2ForInterpolatingDiffusion": "modeling_interpolating_prime_v2",
    "PrimeV2ForMaskedDiffusion": "modeling_prime_v2",
    "PrimeV2ForUniformDiffusion": "modeling_uniform_prime_v2",
    "PrimeV2GenerationConfig": "generation_config_prime_v2",
    "PrimeV2GenerationOutput": "generation_process_prime_v2",
    "PrimeV2InterpolatingConfig": "configuration_interpolating_prime_v2",
    "PrimeV2LogLikelihood": "likelihood_output_prime_v2",
    "PrimeV2Model": "modeling_prime_v2",
    "PrimeV2Output": "loss_prime_v2",
    "PrimeV2Tokenizer": "tokenization",
    "PrimeV2UniformConfig": "configuration_uniform_prime_v2",
    "RemaskingSamplerConfig": "samplers_prime_v2",
    "ThresholdSamplerConfig": "samplers_prime_v2",
    "build_tokenizer": "tokenization",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from prime_v2.configuration_arm_prime_v2 import PrimeV2ArmConfig as PrimeV2ArmConfig
    from prime_v2.configuration_interpolating_prime_v2 import PrimeV2InterpolatingConfig as PrimeV2InterpolatingConfig
    from prime_v2.configuration_prime_v2 import PrimeV2Config as PrimeV2Config
    from prime_v2.configuration_uniform_prime_v2 import PrimeV2UniformConfig as PrimeV2UniformConfig
    from prime_v2.generation_config_prime_v2 import PrimeV2GenerationConfig as PrimeV2GenerationConfig
    from prime_v2.generation_process_prime_v2 import PrimeV2GenerationOutput as PrimeV2GenerationOutput
    from prime_v2.likelihood_output_prime_v2 import PrimeV2LogLikelihood as PrimeV2LogLikelihood
    from prime_v2.loss_prime_v2 import PrimeV2Output as PrimeV2Output
    from prime_v2.modeling_arm_prime_v2 import PrimeV2ForCausalLM as PrimeV2ForCausalLM
    from prime_v2.modeling_interpolating_prime_v2 import (
        PrimeV2ForInterpolatingDiffusion as PrimeV2ForInterpolatingDiffusion,
    )
    from prime_v2.modeling_prime_v2 import PrimeV2ForMaskedDiffusion as PrimeV2ForMaskedDiffusion
    from prime_v2.modeling_prime_v2 import PrimeV2Model as PrimeV2Model
    from prime_v2.modeling_uniform_prime_v2 import PrimeV2ForUniformDiffusion as PrimeV2ForUniformDiffusion
    from prime_v2.samplers_prime_v2 import AncestralSamplerConfig as AncestralSamplerConfig
    from prime_v2.samplers_prime_v2 import ConfidenceSamplerConfig as ConfidenceSamplerConfig
    from prime_v2.samplers_prime_v2 import EntropyBoundSamplerConfig as EntropyBoundSamplerConfig
    from prime_v2.samplers_prime_v2 import PredictorCorrectorSamplerConfig as PredictorCorrectorSamplerConfig
    from prime_v2.samplers_prime_v2 import RemaskingSamplerConfig as RemaskingSamplerConfig
    from prime_v2.samplers_prime_v2 import ThresholdSamplerConfig as ThresholdSamplerConfig
    from prime_v2.tokenization import PrimeV2Tokenizer as PrimeV2Tokenizer
    from prime_v2.tokenization import build_tokenizer as build_tokenizer


def __getattr__(name: str) -> Any:
    """Import on first use: `import prime_v2` itself loads neither torch nor Transformers."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'prime_v2' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"prime_v2.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
