"""Read what others publish, tensors and permutations, without running anything that a file holds."""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

STATE_KEYS = ("model", "state_dict")  # under which training scripts put the tensors
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name: .safetensors, or what torch.save wrote, mapped into memory.

    A training checkpoint gives what is under its "model" or "state_dict". Raises ValueError for a file that is neither
    or that holds anything which could run code, and for values that are no floating-point tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the checkpoint, e.g. model.pth or model.safetensors")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        content: Any = _loaded(lambda: load_file(path), path, ".safetensors file")
    else:
        content = _load_pickle(path)
        for key in STATE_KEYS:
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds {type(content).__name__} and no tensors by name; give a state dict")
    for name, value in content.items():
        if not isinstance(value, Tensor) or value.dtype not in DTYPES or value.layout != torch.strided:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{path}: {name} is {kind}; it must be a tensor of 16-, 32- or 64-bit floating point")
    return dict(content)


def read_permutation(path: Path) -> Tensor:
    """A permutation (n,) int64 of a .npy, .json or .pt file; ValueError unless it is a row of distinct integers."""
    if not path.is_file():
        raise ValueError(f"--permutation {path} is not a file; give a .pt, .npy or .json file")
    if path.suffix == ".npy":
        values: Any = _loaded(lambda: np.load(path, allow_pickle=False), path, ".npy file of numbers")
    elif path.suffix == ".json":
        values = _loaded(
            lambda: _integers(json.loads(path.read_text(encoding="utf-8"))), path, "JSON list of integers"
        )
    else:
        values = _load_pickle(path)
        values = values.cpu().numpy() if isinstance(values, Tensor) else values
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "iu" or not values.size:
        kind = f"{values.dtype} of shape {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise ValueError(f"--permutation {path} holds {kind}; it must be one row of integers, the code of each token")
    codes = values.astype(np.int64)
    distinct, first, counts = np.unique(codes, return_index=True, return_counts=True)
    if len(distinct) < len(codes):
        value = int(distinct[counts > 1][0])
        places = np.flatnonzero(codes == value)
        raise ValueError(
            f"--permutation {path} has the value {value} twice, for the tokens {places[0]} and {places[1]}; every "
            f"token needs a code of its own"
        )
    return torch.from_numpy(codes)


def _integers(values: Any) -> np.ndarray:
    """A JSON list as an array; a float or a truth value in it is no integer."""
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError("it holds something else")
    return np.array(values, dtype=np.int64)


def _load_pickle(path: Path) -> Any:
    """What torch.save wrote, only tensors and plain values."""
    # Files of before PyTorch 1.6 are no archives and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    kind = "file that can be read without running code of it"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forms that are then refused
        return _loaded(lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), path, kind)


def _loaded(load: Callable[[], Any], path: Path, kind: str) -> Any:
    """load(), with what a damaged or foreign file raises turned into a sentence."""
    try:
        return load()
    except OSError:
        raise
    except Exception as error:  # a crafted file can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if isinstance(error, pickle.UnpicklingError):  # its text advises to run the code
            named = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it calls {named[1]}" if named else "PyTorch does not know its form"
        raise ValueError(f"{path} is no {kind} ({reason}); nothing was run or written") from None
