"""`prime-v2` in this process, and texts for it."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from prime_v2.commands.main import app
from prime_v2.data.preparation import prepare_text
from prime_v2.training.options import RaisingParser, parse_options
from prime_v2.training.run import text_options

DOCUMENTS = [f"document {i} says that the quick brown fox jumps over {i * 7} lazy dogs" for i in range(12)]


def run(*arguments: object) -> Any:
    """The result of a command."""
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refused(*arguments: object) -> str:
    """The sentence of a refusal, which must be all that it prints and must name the command."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    command, sentence = line.split(": error: ", 1)
    words = command.split()
    assert words == ["prime-v2", *map(str, arguments[: len(words) - 1])]
    assert len(words) > 1
    return sentence


def of_command(name: str) -> tuple[Callable[..., Any], Callable[..., str]]:
    """`run` and `refused` of a sub-command."""
    return partial(run, name), partial(refused, name)


def prepared(folder: Path, documents: Sequence[str]) -> Path:
    """The folder of the documents as train.py prepares them, a fifth for dev and a fifth for test.

    They lie in trained_on.jsonl beside it.
    """
    path = folder / "trained_on.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    arguments = ["--data", str(path), "--bpe_vocab_size", "280", "--block_size", "8", "--output_dir", str(folder)]
    arguments += ["--dev_share", "0.2", "--test_share", "0.2", "--seed", "3"]
    run_options, training, _ = parse_options(arguments, parser_class=RaisingParser)
    prepare_text(text_options(run_options, training.seed), {"num_subtokens": 1}, folder / "data")
    return folder / "data"
