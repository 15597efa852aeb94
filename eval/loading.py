"""Load a checkpoint and its tokenizer for the command line, with one clear sentence for whatever is wrong with it.

No code of the checkpoint runs: its classes are this package's, or, for a causal model to compare with, Transformers'.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prime_v2.families import FAMILY_OF_TYPE
from prime_v2.output.seals import PICKLES
from prime_v2.validation_config_prime_v2 import read_mapping, readable_json
from prime_v2.validation_keywords_prime_v2 import nearest

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_model_and_tokenizer(
    path_or_repo: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[Any, Any]:
    """(A model of one of our families in evaluation mode, its PrimeV2Tokenizer) of a folder or a Hub repository.

    device: None takes CUDA where there is one, else the CPU. Apple's MPS has no float64, which likelihoods are summed
        in, and is used only when asked for.
    dtype: None is bfloat16 on CUDA and float32 elsewhere; a name such as "float32" or a torch.dtype.
    Raises ValueError for a path that does not exist, a folder without configuration, weights or tokenizer, a foreign
    model type, weights that do not fit, and a tokenizer whose code table differs from the model's.
    """
    device, dtype = _choose(device, dtype)
    place = _locate(path_or_repo)
    return _load_own(place, _check_type(place, foreign=False), device, dtype)


def load_scorer(
    path_or_repo: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[Any, Any]:
    """(what has `log_likelihood`, its tokenizer): `load_model_and_tokenizer`, or a `CausalScorer` of a causal model.

    Raises ValueError for what that refuses, and for a causal model that `CausalScorer` refuses.
    """
    from transformers import AutoModelForCausalLM

    from prime_v2.eval.causal import CausalScorer

    device, dtype = _choose(device, dtype)
    place = _locate(path_or_repo)
    model_type = _check_type(place, foreign=True)
    if model_type in FAMILY_OF_TYPE:
        return _load_own(place, model_type, device, dtype)
    model = _load_weights(AutoModelForCausalLM, place, dtype, own=False).to(device).eval()
    tokenizer = load_tokenizer(place)
    try:
        return CausalScorer(model, tokenizer), tokenizer
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def is_causal(path_or_repo: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint holds a causal language model of Transformers; False for one of our families.

    Reads only its configuration. Raises ValueError where there is none, and for any other model type.
    """
    return _check_type(_locate(path_or_repo), foreign=True) not in FAMILY_OF_TYPE


def load_config(path_or_repo: str | os.PathLike[str]) -> Any:
    """The configuration of a checkpoint that `load_scorer` takes, without its weights."""
    from transformers import AutoConfig

    place = _locate(path_or_repo)
    model_type = _check_type(place, foreign=True)
    make = FAMILY_OF_TYPE[model_type].config_class if model_type in FAMILY_OF_TYPE else AutoConfig
    return _loaded(lambda: make.from_pretrained(place, trust_remote_code=False), place, "a model")


def _choose(device, dtype) -> tuple[torch.device, torch.dtype]:
    device, dtype = choose_device(device), dtype if dtype is None else choose_dtype(dtype)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, dtype


def _load_own(place: str, model_type: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    model = _load_weights(FAMILY_OF_TYPE[model_type].model_class, place, dtype, own=True).to(device).eval()
    tokenizer = load_tokenizer(place)
    check_same_table(model, tokenizer, place)
    return model, tokenizer


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or CUDA where there is one, else the CPU; ValueError for one that is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        names = devices()
        kind = str(device).partition(":")[0]
        near = nearest({"gpu": "cuda"}.get(kind, kind), [each.partition(":")[0] for each in names])
        near = next((each for each in names if each.partition(":")[0] == near), "cpu")
        raise ValueError(f"device={str(device)!r} cannot be used; here are {', '.join(names)}: use {near}") from None
    return chosen


def devices() -> list[str]:
    """The names of the devices of this machine that torch can use: cpu, cuda or cuda:0, cuda:1, ..."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ["cpu"]
    count = torch.accelerator.device_count()
    numbered = [f"{accelerator.type}:{number}" for number in range(count)]
    return ["cpu", *(numbered if count > 1 else [accelerator.type])]


def choose_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype from itself or its name."""
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is not a floating-point type of torch; use float32 or bfloat16")
    return chosen


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Any:
    """A PrimeV2Tokenizer, or any fast tokenizer, of a folder, a tokenizer.json file or a Hub repository.

    Raises ValueError where there is none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    from prime_v2.tokenization import PrimeV2Tokenizer

    place = str(name_or_path)
    path = Path(place).expanduser()
    if path.is_file() and path.suffix == ".json":
        return _loaded(lambda: PreTrainedTokenizerFast(tokenizer_file=str(path)), place, "a tokenizer")
    place = _locate(place)
    if path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{place} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); save one beside the model")
    made_by = _loaded(lambda: get_tokenizer_config(place).get("tokenizer_class"), place, "a tokenizer")
    if made_by == PrimeV2Tokenizer.__name__:
        return _loaded(lambda: PrimeV2Tokenizer.from_pretrained(place), place, "a tokenizer")
    tokenizer = _loaded(lambda: AutoTokenizer.from_pretrained(place, trust_remote_code=False), place, "a tokenizer")
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {place} is not a fast one; use one that has a tokenizer.json")
    return tokenizer


def check_same_table(model: Any, tokenizer: Any, place: str) -> None:
    """ValueError unless the tokenizer splits every token into the digits that the model was trained with."""
    table = getattr(tokenizer, "code_table", None)
    if table is None:
        raise ValueError(f"the tokenizer of {place} has no code table; save the PrimeV2Tokenizer beside the model")
    if getattr(model, "code_table", None) is not None:
        codes = model.code_table.codes[:-1].cpu().numpy()
    else:  # whole tokens: their single digit names them, and is not read
        codes = table if table.shape == (model.config.vocab_size, 1) else np.zeros((model.config.vocab_size, 1))
    if table.shape != codes.shape:
        difference = f"{tuple(table.shape)} instead of {tuple(codes.shape)}"
    elif (table != codes).any():
        different = (table != codes).any(axis=1)
        difference = f"{int(different.sum())} of {len(codes)} tokens, the first being {int(different.argmax())}"
    else:
        return
    raise ValueError(
        f"the code table of the tokenizer of {place} differs from the model's ({difference}); "
        f"use the tokenizer that the model was trained with"
    )


def _locate(path_or_repo: str | os.PathLike[str]) -> str:
    """The folder, or the name of a Hub repository; ValueError for a path that does not exist or is a file."""
    place = str(path_or_repo)
    if not place.strip():
        raise ValueError("the name is empty; give a folder, or the name of a Hub repository")
    path = Path(place).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ValueError(f"{place} is a file; give a folder")
    if place.startswith((".", "~", "/")) or place.count("/") > 1 or path.is_absolute():
        raise ValueError(f"{place} does not exist; give a folder, or the name of a Hub repository")
    return place


def _check_type(place: str, foreign: bool) -> str:
    """The model type of a checkpoint; ValueError unless it is ours, or (`foreign`) a causal one of Transformers."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if Path(place).is_dir():
        _loaded(lambda: _check_folder(Path(place)), place, "a model")
    content, _ = _loaded(lambda: PreTrainedConfig.get_config_dict(place), place, "a model")
    model_type = content.get("model_type")
    if model_type not in FAMILY_OF_TYPE and not (foreign and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        also = " and causal language models of Transformers, such as 'gpt2'," if foreign else ""
        raise ValueError(
            f"{place} holds a model of type {model_type!r}; only {', '.join(FAMILY_OF_TYPE)}{also} are supported"
        )
    return model_type


def _load_weights(model_class: Any, place: str, dtype: torch.dtype, own: bool) -> Any:
    """A model of this class from its safetensors weights, every tensor of which must be there and fit.

    own: of one of our families, which see to most of that themselves (`validation_weights_prime_v2`).
    """
    from safetensors import SafetensorError

    try:
        model, report = _loaded(
            lambda: model_class.from_pretrained(
                place,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=not own,
                use_safetensors=True,
                trust_remote_code=False,
            ),
            place,
            "a model",
        )
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the weights of {place} cannot be loaded ({_first_line(error)}); save the model again"
        ) from None
    for key, fault in (("missing_keys", "lack"), ("mismatched_keys", "have other shapes for")):
        names = sorted(each if isinstance(each, str) else each[0] for each in report[key])
        if names:
            raise ValueError(
                f"the weights of {place} {fault} {len(names)} tensors that {CONFIG_FILE} asks for, the first being "
                f"{names[0]}; save the model again"
            )
    return model


def _check_folder(folder: Path) -> None:
    if not (folder / CONFIG_FILE).is_file():
        from transformers.trainer_utils import get_last_checkpoint

        checkpoint = get_last_checkpoint(str(folder))
        advice = (
            "give the folder of a saved model" if checkpoint is None else f"the run is unfinished; give {checkpoint}"
        )
        raise ValueError(f"{folder} has no {CONFIG_FILE}; {advice}")
    read_mapping(folder / CONFIG_FILE)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickled:
            raise ValueError(
                f"{folder} has its weights in {pickled[0]}, a pickle, which can run code when it is read; save them "
                f"as {WEIGHT_FILES[0]}"
            )
        raise ValueError(f"{folder} has no weights ({' or '.join(WEIGHT_FILES)}); give the folder of a saved model")


def _loaded(load, place: str, what: str) -> Any:
    """load(), with what missing and damaged files raise turned into a sentence that says what was looked for."""
    try:
        with readable_json(place):
            return load()
    except Exception as error:
        damage = (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError)
        # The tokenizers library raises a plain Exception.
        if not isinstance(error, damage) and type(error) is not Exception:
            raise
        if Path(place).exists():
            raise ValueError(f"{place} does not hold {what} that can be loaded ({_first_line(error)})") from None
        raise ValueError(
            f"{place} is neither a folder here nor {what} that could be loaded from the Hub ({_first_line(error)})"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        return " ".join([type(error).__name__, *lines[:1]])
    return lines[0].rstrip(".")
