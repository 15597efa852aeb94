"""`prime-v2 entropy`: the paper's Table 1 for any tokenizer and text."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from prime_v2.commands.base import finish
from prime_v2.commands.options import Json, MaxDocuments, Output, Source, Split, TextField
from prime_v2.commands.text_source import TextSource, counted
from prime_v2.output.progress import progress_bar, quiet_libraries
from prime_v2.output.records import code_version


class ShuffleDomain(StrEnum):
    """What the index shuffle permutes."""

    codes = "codes"
    vocab = "vocab"


def entropy(
    source: Source,
    tokenizer: Annotated[
        str, typer.Option(metavar="NAME_OR_DIR", help="Any fast tokenizer: a folder, a tokenizer.json, a Hub name.")
    ],
    shuffle_seed: Annotated[int, typer.Option(metavar="N", help="Seed of the index shuffle.")] = 0,
    shuffle_domain: Annotated[
        ShuffleDomain, typer.Option(help="Permute all base^S codes, or the ids of the vocabulary.")
    ] = ShuffleDomain.codes,
    split: Split = None,
    text_field: TextField = "text",
    max_documents: MaxDocuments = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Sub-token entropy of text (the paper's Table 1).

    For each number of sub-tokens, unshuffled and shuffled.
    """
    from prime_v2.eval.loading import load_tokenizer
    from prime_v2.tokenization.entropy import count_tokens, entropy_table, render_table

    quiet_libraries()
    code = code_version()
    text = TextSource(source, split, text_field, max_documents)
    documents = text.documents("train")
    with progress_bar("counting tokens of documents") as show:
        counts = count_tokens(counted(documents, show), load_tokenizer(tokenizer))
    vocab_size, num_tokens = len(counts), int(counts.sum())
    rows = entropy_table(counts, vocab_size, shuffle_seed, shuffle_domain.value)
    results = {
        "tokenizer": Path(tokenizer).name if Path(tokenizer).exists() else tokenizer,
        "vocab_size": vocab_size,
        **text.about(),
        "num_tokens": num_tokens,
        "shuffle_seed": shuffle_seed,
        "shuffle_domain": shuffle_domain.value,
        "rows": rows,
    }
    shown = f"{num_tokens:,} tokens of {source}, vocabulary of {vocab_size:,}\n{render_table(rows)}"
    finish("entropy", results, lambda: shown, as_json, output, seed=shuffle_seed, code=code)
