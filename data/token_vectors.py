"""What a run makes of its own training text before it trains: codes of the tokens, and vectors to begin with.

Both read the blocks that the run will train on and no others, so that they know no more text than the weights will;
what they cost is written beside them, and ends in the run's record.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from prime_v2.code_table_prime_v2 import digits_needed
from prime_v2.data.packing import PackedBlocks, TrainingOrder
from prime_v2.output.atomic import write_json
from prime_v2.output.seals import Damaged, check_seal, read_json, write_seal, writing
from prime_v2.tokenization.codes import SOURCES, codes_from_text, neighbour_vectors, tree_codes

MAX_BLOCKS = 2**17  # of a longer run, the first so many blocks are read
MAX_WIDTH = 512  # of vectors: those of a wider network have no more
COST = "cost.json"  # what was made from text: {"tokens": that were read, "seconds", "flops"}
VECTORS, COMPLETE = "vectors.npy", "complete"


def table_of(
    codes: str, options: dict[str, Any], vocab_size: int, train: Path, seed: int, num_samples: int | None
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """Arguments of `recode_tokenizer` for codes that are made, and what they cost; None for those of a file.

    codes: "similarity", "clusters" or "frequency" in the text, or an .npy file of vectors (V, K). options: base,
    num_subtokens.
    train: the packed training text. seed, num_samples: of the run, see `TrainingOrder`.
    ValueError for codes that there are not, and a shuffle beside made codes.
    """
    unused = [name for name in options if name.startswith("shuffle")]
    if unused:
        raise ValueError(f"--codes {codes} makes the table from text, so {unused[0]} has no effect; leave it out")
    base = options.get("base") or 2
    num_subtokens = options.get("num_subtokens") or digits_needed(vocab_size, base)
    if codes not in SOURCES:
        vectors = _vectors_of_file(Path(codes), vocab_size)
        return {"base": base, "codes": tree_codes(vectors, base, num_subtokens)}, None
    started, blocks = time.monotonic(), _blocks_read(train, seed, num_samples)
    table, flops = codes_from_text(codes, blocks, vocab_size, base, num_subtokens)
    return {"base": base, "codes": table}, _cost(blocks, started, flops)


def token_vectors(folder: Path, train: Path, vocab_size: int, width: int, seed: int, num_samples: int) -> np.ndarray:
    """Vectors (V, K) float64 of the tokens, K <= width: see `neighbour_vectors`; made once, in `folder`.

    The first process makes them, the others read them, as does a run that is continued. train, seed and num_samples as
    for `table_of`. ValueError for a folder that is damaged.
    """
    with PartialState().main_process_first(), writing(f"the vectors of the tokens in {folder}"):
        if PartialState().is_main_process and not (folder / COMPLETE).exists():
            started, blocks = time.monotonic(), _blocks_read(train, seed, num_samples)
            vectors, flops = neighbour_vectors(blocks, vocab_size, min(width, MAX_WIDTH))
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / VECTORS, vectors, allow_pickle=False)
            write_json(folder / COST, _cost(blocks, started, flops))
            write_seal(folder, COMPLETE)
    try:
        check_seal(folder, COMPLETE, only_listed=False)
    except Damaged as error:
        raise ValueError(
            f"the vectors of the tokens in {folder} are damaged ({error}); put a copy back, or start the run in "
            f"another folder"
        ) from None
    return np.load(folder / VECTORS, allow_pickle=False)


def costs_in(folder: Path) -> dict[str, dict[str, float]]:
    """What codes and vectors of the run's folder of data cost, by name; {} where nothing was made from text."""
    places = {"codes": folder / "tokenizer" / COST, "vectors": folder / "vectors" / COST}
    return {name: read_json(path) for name, path in places.items() if path.exists()}


def _blocks_read(train: Path, seed: int, num_samples: int | None) -> np.ndarray:
    blocks = PackedBlocks(train)
    order = TrainingOrder(blocks, len(blocks) if num_samples is None else num_samples, seed)
    return order.blocks_read(MAX_BLOCKS).numpy()


def _cost(blocks: np.ndarray, started: float, flops: int) -> dict[str, float]:
    return {"tokens": blocks.size, "seconds": round(time.monotonic() - started, 3), "flops": flops}


def _vectors_of_file(path: Path, vocab_size: int) -> np.ndarray:
    if path.suffix != ".npy" or not path.is_file():
        raise ValueError(f"--codes {path} is neither shuffle, {', '.join(SOURCES)} nor an .npy file; use similarity")
    vectors = np.load(path, allow_pickle=False)
    if vectors.ndim != 2 or len(vectors) != vocab_size or not np.isfinite(vectors).all():
        raise ValueError(
            f"--codes {path} holds {vectors.shape}, but must hold a finite vector for each of {vocab_size}"
        )
    return vectors.astype(np.float64)
