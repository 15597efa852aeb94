"""The options and arguments of every sub-command of `prime-v2`, read from the signatures that typer reads."""

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_v2.commands.main import app


@dataclass(frozen=True)
class Parameter:
    """An option or argument of a command. kind: its type without None and list."""

    command: tuple[str, ...]
    name: str
    kind: Any
    info: Any
    required: bool

    @property
    def flag(self) -> str | None:
        """--its-name; None for an argument."""
        if type(self.info).__name__ == "ArgumentInfo":
            return None
        # Typer has the first name of an annotation as its default.
        names = [self.info.default, *(self.info.param_decls or ())]
        declared = [each for each in names if isinstance(each, str) and each.startswith("--")]
        return declared[0].split("/")[0] if declared else f"--{self.name.replace('_', '-')}"

    def __str__(self) -> str:
        return f"{' '.join(self.command)} {self.flag or self.name}"


def parameters(group: Any = app, names: tuple[str, ...] = ()) -> Iterator[Parameter]:
    """The parameters of all commands of a typer app and of the groups in it."""
    for inner in group.registered_groups:
        yield from parameters(inner.typer_instance, (*names, inner.typer_instance.info.name))
    for command in group.registered_commands:
        path = (*names, command.name or command.callback.__name__)
        hints = typing.get_type_hints(command.callback, include_extras=True)
        defaults = len(command.callback.__defaults__ or ())
        needed = list(hints)[: command.callback.__code__.co_argcount - defaults]
        for name, hint in hints.items():
            if typing.get_origin(hint) is typing.Annotated:
                kind, info = typing.get_args(hint)[:2]
                yield Parameter(path, name, _plain(kind), info, name in needed)


def _plain(kind: Any) -> Any:
    """int of int | None and of list[int] | None."""
    if typing.get_origin(kind) is None:
        return kind
    (inner,) = (each for each in typing.get_args(kind) if each is not type(None))
    return _plain(inner)


PARAMETERS = list(parameters())
NUMBERS = [each for each in PARAMETERS if each.kind in (int, float)]
PATHS = [each for each in PARAMETERS if each.kind is Path]
