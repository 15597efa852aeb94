"""The families of models behind one trainer and one way of measuring: their classes, names and reported methods."""

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

from prime_v2.likelihood_prime_v2 import BOUND_OF_ORDER, METHODS


@dataclass(frozen=True)
class Family:
    """`name` is the value of `--family`; config and model are classes of `module_prime_v2`s, imported when asked for.

    bound: the method of `log_likelihood` that is reported, None where it depends on the configuration; methods: all
    that a configuration may have (`methods_of`). digits: whether a token can be split (`num_subtokens` above 1).
    """

    name: str
    model_type: str
    config: tuple[str, str]
    model: tuple[str, str]
    methods: tuple[str, ...]
    bound: str | None
    digits: bool

    @property
    def config_class(self) -> Any:
        return getattr(importlib.import_module(f"prime_v2.{self.config[0]}"), self.config[1])

    @property
    def model_class(self) -> Any:
        return getattr(importlib.import_module(f"prime_v2.{self.model[0]}"), self.model[1])

    def fields(self) -> set[str]:
        """Fields of the configuration that a run may set."""
        names = {each.name for each in dataclasses.fields(self.config_class)}
        return names - {"vocab_size", "mask_token_id"}


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "prime",
            "prime_v2",
            ("configuration_prime_v2", "PrimeV2Config"),
            ("modeling_prime_v2", "PrimeV2ForMaskedDiffusion"),
            (*METHODS, "sampler"),
            None,
            digits=True,
        ),
        Family(
            "arm",
            "prime_v2_arm",
            ("configuration_arm_prime_v2", "PrimeV2ArmConfig"),
            ("modeling_arm_prime_v2", "PrimeV2ForCausalLM"),
            ("causal",),
            "causal",
            digits=True,
        ),
        Family(
            "uniform",
            "prime_v2_uniform",
            ("configuration_uniform_prime_v2", "PrimeV2UniformConfig"),
            ("modeling_uniform_prime_v2", "PrimeV2ForUniformDiffusion"),
            ("uniform",),
            "uniform",
            digits=False,
        ),
        Family(
            "interpolating",
            "prime_v2_interpolating",
            ("configuration_interpolating_prime_v2", "PrimeV2InterpolatingConfig"),
            ("modeling_interpolating_prime_v2", "PrimeV2ForInterpolatingDiffusion"),
            ("interpolating", "chain"),
            "interpolating",
            digits=True,
        ),
    )
}
FAMILY_OF_TYPE = {family.model_type: family for family in FAMILIES.values()}


def family_named(name: str) -> Family:
    """The family of a `--family`; ValueError for a name that there is not."""
    if name not in FAMILIES:
        raise ValueError(f"--family {name} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def methods_of(config: Any) -> tuple[str, ...]:
    """The methods of `log_likelihood` that a model of this configuration has."""
    return FAMILY_OF_TYPE[config.model_type].model_class.likelihood_class.methods_of(config)


def check_method(config: Any, method: str) -> None:
    """ValueError, with the reason, for a method of the family that a model of this configuration does not have.

    "sampler" is checked with its options, where a model generates.
    """
    if method != "sampler":
        likelihood = FAMILY_OF_TYPE[config.model_type].model_class.likelihood_class
        likelihood(config, method, num_samples=1, exhaustive=False, round_number=0)


def bound_method(config: Any) -> str:
    """The method of `log_likelihood` that is reported for a model of this configuration: an exact value or a bound."""
    return FAMILY_OF_TYPE[config.model_type].bound or BOUND_OF_ORDER[config.reveal_order]


def rows_of_sequence(config: Any, method: str, num_tokens: int, num_samples: int) -> int:
    """Rows of the network that `log_likelihood` runs for a sequence of so many tokens, at least."""
    family = FAMILY_OF_TYPE.get(config.model_type)
    if family is None or method in ("causal", "sampler"):
        return 1
    if family.name == "interpolating":
        return 1 if method == "chain" or config.alpha_0 == 0 else num_samples
    if method == "chain":
        stages = len(config.stage_digits) if getattr(config, "reveal_order", None) == "coarse_first" else 1
        return num_tokens * stages
    return num_samples * num_tokens if method == "orders" else num_samples


def label_of(config: Any) -> str:
    """The name of a model's family as the field uses it, from its configuration or the dictionary of one."""
    values = config if isinstance(config, dict) else config.to_dict()
    kind = values["model_type"]
    if kind == "prime_v2_uniform":
        return "uniform-state"
    name = _label_of_interpolating(values) if kind == "prime_v2_interpolating" else _label_of_codes(kind, values)
    return f"{name}, head in stages" if values.get("head") == "stages" else name


def _label_of_interpolating(values: dict[str, Any]) -> str:
    alpha_0 = f"alpha_0 = {values['alpha_0']:g}"
    is_tree, digits = values.get("subtoken_embedding") == "ancestors", values.get("num_subtokens", 1)
    embedding = ", tree embedding" if is_tree else ", sub-token embedding" if digits > 1 else ""
    return f"interpolating, {alpha_0}{embedding}"


def _label_of_codes(kind: str, values: dict[str, Any]) -> str:
    digits, order = values.get("num_subtokens", 1), values.get("reveal_order")
    is_tree, levels = values.get("subtoken_embedding") == "ancestors", values.get("tree_levels")
    whole = digits == 1 or (is_tree and (levels or [digits]) == [digits])  # a vector for each token
    if kind == "prime_v2_arm":
        return "ARM" if whole else "ARM, tree embedding" if is_tree else "ARM over sub-tokens"
    if digits == 1 or (order == "token" and whole):
        return "MDM"
    if order == "token":  # whole tokens are hidden: no digit diffuses
        return f"MDM, {'tree' if is_tree else 'sub-token'} embedding"
    if order != "digit":
        trained = values.get("training_order") or order
        kind = "stages in windows" if order == "windows" else f"{order.replace('_', '-')} order"
        how = "in windows" if trained == "windows" else trained.replace("_", "-")
        return f"sub-tokens, {kind}" + ("" if trained == order else f", trained {how}")
    return "MDM-Prime-v2" if values["base"] == 2 and values["shuffle_ratio"] > 0 else "MDM-Prime"
