"""`prime-v2 overlap`: how much of a text also stands in the text that a model was trained on."""

from pathlib import Path
from typing import Annotated

import typer

from prime_v2.commands.base import finish
from prime_v2.commands.options import Json, MaxDocuments, Output, Source, Split, TextField
from prime_v2.commands.text_source import TextSource, counted
from prime_v2.output.progress import progress_bar, quiet_libraries
from prime_v2.output.records import code_version


def overlap(
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="Prepared text: the folder data of a run, or data/seedN of a comparison."),
    ],
    source: Source,
    split: Split = None,
    text_field: TextField = "text",
    max_documents: MaxDocuments = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Count what a text shares with the training text of a model.

    Runs of 8 and of 32 tokens of SOURCE, by the tokenizer of DATA, that also occur in the training split of DATA.

    \b
    prime-v2 overlap runs/mine/data my_text.txt
    prime-v2 overlap runs/compare/study_1e13/data/seed0 speeches.jsonl --max-documents 8
    """
    import numpy as np

    from prime_v2.data.overlap import LENGTHS
    from prime_v2.data.overlap import overlap as shared
    from prime_v2.data.packing import PackedBlocks
    from prime_v2.data.preparation import COMPLETE, WHOLE_TOKENS, check_prepared, shares_in
    from prime_v2.data.splits import Fingerprint
    from prime_v2.tokenization.plain_text import in_batches, plain_ids
    from prime_v2.tokenization.tokenization_prime_v2 import PrimeV2Tokenizer

    quiet_libraries()
    if not (data / COMPLETE).exists():
        raise ValueError(
            f"{data} holds no prepared text; give the folder `data` of a run of train.py, or `data/seed0` of a "
            f"comparison"
        )
    code = code_version()
    check_prepared(data)
    if not (data / "train").exists():
        raise ValueError(
            f"{data} is of a streamed text, of which the training split is not kept; give that of a run without "
            f"--streaming"
        )
    tokenizer = PrimeV2Tokenizer.from_pretrained(data / WHOLE_TOKENS)
    text, parts, read = TextSource(source, split, text_field, max_documents), [np.empty(0, np.int64)], Fingerprint()
    with progress_bar("reading documents") as show:
        for texts in in_batches(counted(text.documents("test", shares=shares_in(data)), show)):
            for document, encoded in zip(texts, plain_ids(tokenizer, texts), strict=True):
                read.add(document)
                parts.append(np.array([*encoded, tokenizer.eos_token_id], dtype=np.int64))
    ids, documents, train = np.concatenate(parts), len(parts) - 1, PackedBlocks(data / "train")
    found = [shared(train.ids, ids, length) for length in LENGTHS]
    results = {
        **text.about(),
        "documents": documents,
        "tokens": len(ids) - documents,
        "train_tokens": train.tokens,
        "fingerprints": {"train": train.fingerprint, "text": read.hexdigest()},
        "ngrams_in_train": found,
    }
    lines = [
        f"{each['ngrams_in_train']:,} of {each['ngrams']:,} runs of {each['length']} tokens"
        + (f", {each['share']:.1%}" if each["ngrams"] else "")
        for each in found
    ]
    heading = f"of {documents:,} documents of {source} in the {train.tokens:,} training tokens of {data}:"
    finish("overlap", results, lambda: "\n".join([heading, *lines]), as_json, output, seed=None, code=code)
