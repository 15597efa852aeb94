"""`--stage_passes`: how a coarse-first model shares the passes of `generate` among its stages, kept with the model."""

from typing import Any

from prime_v2.generation_config_prime_v2 import GenerationOptions, check_sampler
from prime_v2.samplers_prime_v2 import AncestralSamplerConfig, checked_shares


def check_stage_passes(run: Any, model_options: dict[str, Any]) -> list[str]:
    """What is wrong with the shares of a run, as far as can be seen before there is a model."""
    if not run.stage_passes:
        return []
    given = " ".join(map(str, run.stage_passes))
    try:
        checked_shares("", run.stage_passes)
    except ValueError:
        return [f"--stage_passes {given} must be shares above 0 that add up to 1; use 0.75 0.25"]
    order, stages = model_options.get("reveal_order", "subtoken"), model_options.get("stage_digits") or ()
    if run.init_from is None and (run.family != "prime" or order != "coarse_first"):
        return [f"--stage_passes {given} is for models with reveal_order=coarse_first; leave it out"]
    if run.init_from is None and len(stages) != len(run.stage_passes):
        return [
            f"--stage_passes {given} has {len(run.stage_passes)} shares for {len(stages)} stages; give one for each"
        ]
    return []


def set_stage_passes(model: Any, shares: list[float]) -> None:
    """Make ancestral sampling with the shares the model's own sampler; ValueError for a model that has no such stages.

    Saved in generation_config.json, so that `generate` and the likelihood of samplers take them by default.
    """
    sampler = AncestralSamplerConfig(stage_passes=tuple(shares))
    check_sampler(model, GenerationOptions(sampler_config=sampler))
    model.generation_config.update(sampler_config=sampler)


def drop_stage_passes(model: Any) -> None:
    """Make the default sampler a model's own again where it had shares, which are of another reveal order."""
    sampler = model.generation_config.sampler_config
    if getattr(sampler, "stage_passes", None) is not None:
        model.generation_config.sampler_config = None
