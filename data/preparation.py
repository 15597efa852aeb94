"""From a source of text to a tokenizer and packed splits in a run's folder."""

import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from prime_v2.data.docs_corpus import docs_versions
from prime_v2.data.documents import read_documents
from prime_v2.data.overlap import LENGTHS, overlap
from prime_v2.data.packing import PackedBlocks, pack_blocks
from prime_v2.data.sources import change_of, fingerprint_of, is_fingerprint
from prime_v2.data.splits import deduplicate, split_of
from prime_v2.data.token_vectors import COST, table_of
from prime_v2.output.atomic import write_json
from prime_v2.output.locks import folder_lock
from prime_v2.output.seals import Damaged, check_seal, read_json, write_seal, writing
from prime_v2.tokenization.bpe import train_bpe
from prime_v2.tokenization.build import build_tokenizer, recode_tokenizer
from prime_v2.tokenization.plain_text import first_loss, plain_ids
from prime_v2.tokenization.tokenization_prime_v2 import PrimeV2Tokenizer

EOS_TOKEN = "<|endoftext|>"
WHOLE_TOKENS = "tokenizer_of_whole_tokens"  # folder of the tokenizer before its tokens are split into digits
COMPLETE = "complete"  # the seal, written last: without it a folder of prepared text does not count
SEALED = (WHOLE_TOKENS, "text.json")  # beside the splits
CODE_OPTIONS = ("base", "num_subtokens", "shuffle_seed", "shuffle_ratio", "shuffle_domain")
# Documents of a stream that are read for the dev and test splits, for each block that is wanted.
DOCUMENTS_PER_EVAL_BLOCK = 4


@dataclass
class TextOptions:
    """Where the text comes from and how it is cut: the options of train.py of the same names."""

    data: str
    data_split: str
    text_field: str
    streaming: bool
    max_documents: int | None
    tokenizer: str
    bpe_vocab_size: int
    block_size: int
    dev_share: float
    test_share: float
    eval_sequences: int
    test_sequences: int
    seed: int


def documents_by_side(text: TextOptions, on_repeat: Callable[[], object] | None = None) -> Iterator[tuple[str, str]]:
    """(split, document) of each document, once: train, dev or test by the document's content and the seed.

    on_repeat is called for each document that is left out, being equal to an earlier one.

    A stream is not deduplicated, since the digests of a hub-scale set would fill the memory; equal documents are on
    the same side of the split all the same.
    """
    documents: Iterable[str] = read_documents(
        text.data,
        text_field=text.text_field,
        split=text.data_split,
        streaming=text.streaming,
        max_documents=text.max_documents,
    )
    side_of = partial(split_of, seed=text.seed, dev_share=text.dev_share, test_share=text.test_share)
    for document in documents if text.streaming else deduplicate(documents, on_repeat):
        yield side_of(document), document


def prepare_text(
    text: TextOptions,
    code_options: dict[str, Any],
    folder: Path,
    shared: Path | None = None,
    codes: str = "shuffle",
    num_samples: int | None = None,
) -> tuple[PrimeV2Tokenizer, dict[str, PackedBlocks]]:
    """Tokenizer and packed splits of a run: made by the first process, read by all, not made twice.

    code_options: arguments of `build_tokenizer` (base, num_subtokens, shuffle_*). folder: the run's own, which keeps
    its tokenizer. shared: folder of the splits, by default the run's own; runs with other digits can share it.
    codes: "shuffle", or what they are made from: "similarity", "clusters" or "frequency" in the text that the run
    trains on, or an .npy file of vectors (V, K) of the tokens. num_samples: blocks that the run reads, by default each
    once.
    Returns the tokenizer and the splits train (not when streaming), dev and test. Text that is there already is read
    against its checksums, and its source against the fingerprint that was taken before it was read. Raises ValueError
    for a bad source, see `read_documents`, `pack_blocks`, for a shared folder that was made of other text, and for
    damage.
    """
    splits = ("dev", "test") if text.streaming else ("train", "dev", "test")
    shared = shared or folder
    with PartialState().main_process_first(), writing(f"the prepared text in {shared}"):
        if PartialState().is_main_process:
            _make_or_check(text, shared, splits)
            _recode_or_check(codes, code_options, folder / "tokenizer", shared, text.seed, num_samples)
    return PrimeV2Tokenizer.from_pretrained(folder / "tokenizer"), {
        each: PackedBlocks(shared / each) for each in splits
    }


def _make_or_check(text: TextOptions, shared: Path, splits: tuple[str, ...]) -> None:
    if not (shared / COMPLETE).exists():
        with folder_lock(shared, f"the folder of prepared text {shared}", wait=True):
            if not (shared / COMPLETE).exists():  # another run that shares the text may have made it meanwhile
                _make(text, shared, splits)
                return
    check_prepared(shared)
    _check_same_text(text, shared)
    source = prepared_source(shared)
    if source.get("versions") not in (None, docs_versions()):
        # Packages are updated for other reasons, and what was read of them is kept.
        print(
            f"the installed packages have changed since the text in {shared} was prepared of their documentation; it "
            f"stays as it is",
            file=sys.stderr,
        )
    change = change_of(source, text.data)
    if change is not None:
        raise ValueError(
            f"--data {text.data} has changed since the text in {shared} was prepared of it ({change}); put it back, "
            f"or use another folder"
        )


def _recode_or_check(
    codes: str, code_options: dict[str, Any], folder: Path, shared: Path, seed: int, num_samples: int | None
) -> None:
    if (folder / COMPLETE).exists():
        check_prepared(folder)
        return
    whole = PrimeV2Tokenizer.from_pretrained(shared / WHOLE_TOKENS)
    cost = None
    if codes != "shuffle":
        code_options, cost = table_of(codes, code_options, len(whole.code_table), shared / "train", seed, num_samples)
    recode_tokenizer(whole, **code_options).save_pretrained(folder)
    if cost is not None:
        write_json(folder / COST, cost)
    write_seal(folder, COMPLETE)


def check_prepared(folder: Path) -> None:
    """ValueError unless all that was prepared in a folder is as it was written; it is read from end to end."""
    try:
        check_seal(folder, COMPLETE, only_listed=False)
    except Damaged as error:
        raise _damage_of(folder, error) from None


def _damage_of(folder: Path, error: Damaged) -> ValueError:
    return ValueError(
        f"the prepared text in {folder} is damaged ({error}); put a copy back, or delete the folder to have it "
        f"prepared again"
    )


def prepared_source(shared: Path) -> dict[str, Any]:
    """The fingerprint of the source that prepared text was made of, see `sources`."""
    return _description(shared)["source"]


def shares_in(shared: Path) -> dict[str, Any]:
    """Arguments of `split_of` that decided on which side of prepared text a document is."""
    found = _description(shared)
    return {name: found[name] for name in ("seed", "dev_share", "test_share")}


def measured_of(shared: Path) -> dict[str, Any]:
    """What was counted when text was prepared: repeated_documents, test_ngrams_in_train (a list of `overlap`).

    Empty of a stream, and of text that an earlier version prepared.
    """
    return _description(shared).get("measured", {})


def _description(shared: Path) -> dict[str, Any]:
    """What text.json says of prepared text: its options and its source; ValueError for a file that is damaged."""
    try:
        found = read_json(shared / "text.json")
        if not isinstance(found, dict) or not is_fingerprint(found.get("source")):
            raise Damaged("text.json is damaged")
    except Damaged as error:
        raise _damage_of(shared, error) from None
    return found


def _check_same_text(text: TextOptions, shared: Path) -> None:
    found = _description(shared)
    for key, value in vars(text).items():
        if found.get(key) != value and (text.streaming or key not in ("eval_sequences", "test_sequences")):
            raise ValueError(
                f"--data_dir {shared} holds text with {key}={found.get(key)!r}, not {value!r}; use another folder"
            )


def _make(text: TextOptions, folder: Path, splits: tuple[str, ...]) -> None:
    fingerprint = fingerprint_of(text.data)  # before it is read, so that a change meanwhile is seen later
    tokenizer = None if text.tokenizer == "bpe" else _whole_tokens_of(text.tokenizer)
    repeats = itertools.count()
    on_disk = _documents_by_side_on_disk(text, folder / "documents", splits, partial(next, repeats))
    with on_disk as documents_of:
        if tokenizer is None:
            bpe = train_bpe(documents_of("train"), text.bpe_vocab_size, eos_token=EOS_TOKEN)
            special = {"eos_token": EOS_TOKEN}
            tokenizer = build_tokenizer(bpe, num_subtokens=1, special_tokens=special, model_max_length=text.block_size)
        for split in splits:
            try:
                pack_blocks(
                    documents_of(split),
                    partial(plain_ids, tokenizer),
                    block_size=text.block_size,
                    eos_token_id=tokenizer.eos_token_id,
                    vocab_size=tokenizer.code_table.shape[0],
                    path=folder / split,
                    # The bytes of a split that is measured count only where its tokens hold them.
                    find_loss=None if split == "train" else partial(first_loss, tokenizer),
                )
            except ValueError as error:
                shares = f"dev_share={text.dev_share}, test_share={text.test_share}"
                raise ValueError(f"the {split} split ({shares}): {error}, or other shares") from None
    tokenizer.save_pretrained(folder / WHOLE_TOKENS)
    measured: dict[str, Any] = {}
    if not text.streaming:
        measured["repeated_documents"] = next(repeats)
        train, test = (PackedBlocks(folder / split) for split in ("train", "test"))
        measured["test_ngrams_in_train"] = [overlap(train.ids, test.ids, length) for length in LENGTHS]
    write_json(folder / "text.json", {**vars(text), "source": fingerprint, "measured": measured})
    write_seal(folder, COMPLETE, (*(f"{split}{end}" for split in splits for end in ("", ".json")), *SEALED))


def _whole_tokens_of(name: str) -> PrimeV2Tokenizer:
    """A tokenizer by its name or folder, its tokens not split into digits; ValueError for one without EOS."""
    if (Path(name) / "code_table.json").is_file():  # a PrimeV2Tokenizer, e.g. of a trained model
        tokenizer = recode_tokenizer(PrimeV2Tokenizer.from_pretrained(name), num_subtokens=1)
    else:
        tokenizer = build_tokenizer(name, num_subtokens=1)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name} has no EOS token to put between documents; use one that has")
    return tokenizer


@contextmanager
def _documents_by_side_on_disk(
    text: TextOptions, folder: Path, splits: tuple[str, ...], on_repeat: Callable[[], object]
) -> Iterator[Callable[[str], Iterator[str]]]:
    """Reads the source once, into files in `folder`, which go at the end; yields a reader of the documents of a split.

    The training documents are read from there twice where a BPE is trained. From a stream, only as many are kept for
    dev and test as their blocks may need.
    """
    left = dict.fromkeys(splits, math.inf)
    if text.streaming:
        wanted = {"dev": text.eval_sequences, "test": text.test_sequences}
        left = {split: DOCUMENTS_PER_EVAL_BLOCK * count for split, count in wanted.items()}

    def documents_of(split: str) -> Iterator[str]:
        with open(folder / split, encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    shutil.rmtree(folder, ignore_errors=True)  # what a kill has left
    folder.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            files = {split: stack.enter_context(open(folder / split, "w", encoding="utf-8")) for split in splits}
            for split, document in documents_by_side(text, on_repeat):
                if left.get(split, 0) > 0:
                    files[split].write(json.dumps(document) + "\n")
                    left[split] -= 1
                    if not any(left.values()):
                        break
        yield documents_of
    finally:
        shutil.rmtree(folder, ignore_errors=True)
