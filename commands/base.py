"""What makes a sub-command of `prime-v2`: one sentence on stderr and exit status 2 for bad input, and shared options.

Bad input is ValueError, OSError, a configuration that Transformers refuses or a wrong option; any other exception is
a fault of ours and keeps its traceback.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from prime_v2.output.places import check_folder, check_new_file, check_new_folder

PROGRAM = "prime-v2"
INTERRUPTED = 130  # by Ctrl-C, as shells count it
# The largest values of options that count: more would end in the machine's limits, or never.
MANY = 10**12  # of what is read or done at most, where less is there
MOST_SAMPLES = 1024  # texts that are generated at once
MOST_DRAWS = 10**6  # for one number


def _place(check: Callable[[Path, str], None]) -> Callable[..., Path | None]:
    """The callback of an option or argument that names a place to write: the place is tried before the work."""

    def callback(context: typer.Context, param: typer.CallbackParam, value: Path | None) -> Path | None:
        if value is not None and not context.resilient_parsing:
            check(value, param.opts[0] if param.opts[0].startswith("-") else str(param.metavar))
        return value

    return callback


NEW_FILE, NEW_FOLDER, FOLDER = map(_place, (check_new_file, check_new_folder, check_folder))

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and only JSON, on stdout.")]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Also write a record: the numbers with command, commit, versions and machine. FILE must be new.",
        callback=NEW_FILE,
    ),
]


class BadInput(Exception):
    """A sentence about the input of a command, ready to print."""


class Command(TyperCommand):
    """A sub-command whose refusals name it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except (ValueError, OSError) as error:  # of the callback of an option
            raise BadInput(f"{ctx.command_path}: error: {bad_input(error)}") from error
        except Exception as error:
            if hasattr(error, "format_message") and getattr(error, "ctx", None) is None:
                error.ctx = ctx  # type: ignore[attr-defined]  # an option without its value: the parser knows no command
            raise

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            sentence = bad_input(error)
            if sentence is None:
                raise
            raise BadInput(f"{ctx.command_path}: error: {sentence}") from error


class Group(TyperGroup):
    """Ends the process with the statuses above, under typer's test runner as well."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            status = super().main(args, PROGRAM, complete_var, False, windows_expand_args, **extra)
        except BadInput as error:
            status = _fail(str(error))
        except Exception as error:
            if type(error).__name__ == "Abort":  # what click makes of Ctrl-C
                status = INTERRUPTED
            # Typer's own refusals (an unknown option, a value of the wrong kind); where they live differs by version.
            elif hasattr(error, "format_message") and hasattr(error, "exit_code"):
                status = self._usage_error(error)
            else:
                raise
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else 0)

    @staticmethod
    def _usage_error(error: Any) -> int:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 2
        place = error.ctx.command_path if getattr(error, "ctx", None) else PROGRAM
        return _fail(f"{place}: error: {_sentence(error.format_message())}; see {place} --help")


def _fail(line: str) -> int:
    print(line, file=sys.stderr)
    return 2


def bad_input(error: Exception) -> str | None:
    """One sentence for an error that the input caused, None for any other."""
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError) and error.strerror:
        return _sentence(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if isinstance(error, ValueError | OSError):
        return _sentence(str(error))
    if isinstance(error, RecursionError) and "JSON" in str(error):
        return "a JSON file that was read is nested too deeply; write it again"
    if _is_out_of_memory(error):
        return "not enough memory; ask for less at once: fewer samples, shorter texts or a smaller model"
    from huggingface_hub.errors import StrictDataclassError

    if isinstance(error, StrictDataclassError):
        inner = error.__cause__ or error
        return _sentence(str(inner).split("ValueError: ")[-1].split("TypeError: ")[-1])
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Of Python and numpy, of an accelerator, and of the CPU's memory as torch says it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _sentence(text: str) -> str:
    return " ".join(text.split()).replace("Value error, ", "").rstrip(".")


__all__ = [
    "FOLDER",
    "MANY",
    "MOST_DRAWS",
    "MOST_SAMPLES",
    "NEW_FILE",
    "NEW_FOLDER",
    "PROGRAM",
    "BadInput",
    "Command",
    "Group",
    "Json",
    "Output",
    "bad_input",
]
