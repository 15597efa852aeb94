"""`prime-v2` in this process, and a text for it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from typer.testing import CliRunner

from prime_v2.commands.main import app

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
