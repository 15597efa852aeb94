"""Keywords of public functions: one that is not known is refused by name, with the nearest; none is swallowed."""

import difflib
import inspect
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import TransformersKwargs

# How alike two names must be, from 0 to 1, for one to be offered in place of the other: "temprature" is, and "steps"
# is not taken for "seed".
NEAR = 0.65
MOST_LISTED = 20  # names in a sentence

# What a `forward` takes beside its own arguments.
# Read by Transformers' decorators of `forward` (`capture_outputs`, `can_return_tuple`):
OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")
# Read by flash attention, where packed texts end; no other attention reads it:
FLASH_ATTENTION = tuple(FlashAttentionKwargs.__annotations__)
# Passed without a meaning to every model, as None or, where it asks for something more, as False or 0, by
#   Transformers' `generate` and pipelines, and what `TransformersKwargs` lists;
#   peft's PeftModelForCausalLM.forward (inputs_embeds, task_ids) and its prompt learning (token_type_ids).
IDLE = (
    *TransformersKwargs.__annotations__,
    "cache",
    "cache_position",
    "inputs_embeds",
    "logits_to_keep",
    "past_key_values",
    "task_ids",
    "token_type_ids",
    "use_cache",
)
ASKING = ("logits_to_keep", "output_router_logits", "use_cache")

LM_EVAL = "lm_eval.models.huggingface"


def nearest(name: Any, names: Iterable[str]) -> str | None:
    """The one of `names` that is most like `name`; None where none is near."""
    near = difflib.get_close_matches(str(name), list(names), n=1, cutoff=NEAR)
    return near[0] if near else None


def did_you_mean(name: Any, names: Iterable[str], prefix: str = "") -> str:
    """The end of a sentence about an unknown name: "; did you mean X?", or nothing where no name is near."""
    near = nearest(name, names)
    return "" if near is None else f"; did you mean {prefix}{near}?"


def one_of(given: str, value: Any, names: Iterable[str]) -> Any:
    """`value`, which must be one of `names`; else ValueError, which begins with `given` and lists them."""
    names = list(names)
    if value not in names:
        raise ValueError(f"{given} is not one of {', '.join(names)}{did_you_mean(value, names)}")
    return value


def shown(value: Any) -> str:
    """A value as a sentence names it: short, whatever it is."""
    if isinstance(value, Tensor):
        return f"<tensor of shape {tuple(value.shape)}>"
    return reprlib.repr(value)


def refuse_unknown(
    where: str,
    given: Mapping[str, Any],
    known: Iterable[str],
    meant: Callable[[str, Any], str | None] = lambda name, value: None,
) -> None:
    """ValueError for the first of the keywords `given` that is none of the `known` ones of the function `where`.

    meant: for what is known by another name, what to do, as meant(name, value); None where it knows nothing.
    """
    known = list(known)
    for name, value in given.items():
        if name not in known:
            listed = f"; it takes {', '.join(known)}" if len(known) <= MOST_LISTED else "; leave it out"
            advice = meant(name, value)
            hint = did_you_mean(name, known) or listed if advice is None else f"; {advice}"
            raise ValueError(f"{where} has no argument {name}={shown(value)}{hint}")


def arguments_of(function: Callable) -> list[str]:
    """Names of a function's own arguments."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [each.name for each in inspect.signature(function).parameters.values() if each.kind in kinds]
    return [name for name in names if name not in ("self", "model")]


def forward_keywords(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a `forward`, beside its own arguments, that something reads; what means nothing is dropped.

    What the model's configuration says already means nothing either (use_cache, which Trainer sets there).
    Raises ValueError for all others. Every `forward` begins here, so `refuse_causal_scoring` has its place here too.
    """
    refuse_causal_scoring(model)
    read = {}
    for name, value in given.items():
        if name in IDLE and _is_idle(model.config, name, value):
            continue
        if name in OUTPUTS or name in FLASH_ATTENTION and "flash" in str(model.config._attn_implementation):
            read[name] = value
        elif name in FLASH_ATTENTION:
            raise ValueError(
                f"{name}={shown(value)} is read by flash attention only, but attn_implementation="
                f"{model.config._attn_implementation!r}; leave it out, or pad the texts and give an attention_mask"
            )
        elif name in IDLE:
            raise ValueError(f"{type(model).__name__}.forward makes no use of {name}={shown(value)}; leave it out")
        else:
            refuse_unknown(f"{type(model).__name__}.forward", {name: value}, [*arguments_of(model.forward), *OUTPUTS])
    return read


def refuse_causal_scoring(model: Any) -> None:
    """ValueError inside lm-eval's HFLM, which takes the logits of a place for those of the token after it.

    A model that is not causal has other logits there, so HFLM would report -inf or, worse, a plausible number. The
    arguments of its calls are those of anybody's: only the caller tells them apart.
    """
    if model.config.causal or LM_EVAL not in sys.modules or torch.compiler.is_compiling():
        return
    frame = sys._getframe()
    while frame is not None:
        owner = type(frame.f_locals.get("self"))
        if frame.f_code.co_name == "_model_call" and any(each.__module__ == LM_EVAL for each in owner.__mro__):
            raise ValueError(
                f"{type(model).__name__} is not causal, so lm-eval's model hf (HFLM) would score its answers "
                f"wrongly; use --model prime_v2, in Python prime_v2.eval.lm:PrimeV2LM(pretrained=model, tokenizer=...)"
            )
        frame = frame.f_back


def _is_idle(config: Any, name: str, value: Any) -> bool:
    """None; False or 0 for what asks for something more; and what holds already."""
    if value is None or value is getattr(config, "causal" if name == "is_causal" else name, None):
        return True
    return name in ASKING and (value is False or type(value) is int and value == 0)
