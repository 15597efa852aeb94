"""What makes a sub-command of `prime-v2`: how it refuses bad input, and how it prints and records its results.

Bad input ends with one sentence on stderr and exit status 2. It is ValueError, OSError, a configuration that
Transformers refuses or a wrong option; any other exception is a fault of ours and keeps its traceback.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from prime_v2.output.places import print_and_record
from prime_v2.output.records import make_record

PROGRAM = "prime-v2"
INTERRUPTED = 130  # by Ctrl-C, as shells count it


def new_app(name: str, help_text: str) -> typer.Typer:
    """An app, or a group of sub-commands in one, that refuses bad input in one sentence."""
    return typer.Typer(
        name=name,
        cls=Group,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def place(check: Callable[[Path, str], None]) -> Callable[..., Path | None]:
    """The callback of an option or argument that names a place to write: the place is tried before the work."""

    def callback(context: typer.Context, param: typer.CallbackParam, value: Path | None) -> Path | None:
        if value is not None and not context.resilient_parsing:
            check(value, param.opts[0] if param.opts[0].startswith("-") else str(param.metavar))
        return value

    return callback


def finish(
    name: str,
    results: dict[str, Any],
    text: Callable[[], str],
    as_json: bool,
    output: Path | None,
    *,
    seed: int | None,
    **about: Any,
) -> None:
    """Print the results of a sub-command, as text or as JSON, and record them under `name` at `output`, if any.

    seed, about: arguments of `make_record`.
    """
    shown = json.dumps(results, ensure_ascii=False, allow_nan=False) if as_json else text()
    print_and_record(shown, output, lambda: make_record(name, results, seed=seed, **about))


# An argument in a message, name=value: the name is no part of a path, of another name or of NAME,OPTION=VALUE.
NOT_IN_NAME = r"(?<![\w./,-])"
VALUE = r"""('[^']*'|"[^"]*"|[^\s,;:()]+)"""
# Where words are names of arguments: "takes unit, score", "leave sampler out".
LISTED = re.compile(r"(?<=\btakes )[\w-]+(?:, [\w-]+)*|(?<=\bleave )[\w-]+(?= out\b)")
# Arguments of functions that have another name on the command line.
SPOKEN = {"do_sample=False": "--greedy", "do_sample=True": "--sample", "suffix_ids": "--suffix"}


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
            raise BadInput(f"{ctx.command_path}: error: {self._in_options(sentence)}") from error

    def _in_options(self, sentence: str) -> str:
        """A refusal of a function with its arguments named as the options of this command that give them.

        Configs of samplers are their names on the command line.
        """
        own = {each for param in self.params for each in (*param.opts, *param.secondary_opts)}
        for argument, flag in SPOKEN.items():
            if flag in own:
                sentence = sentence.replace(argument, flag)
        if "--sampler" in own and "ampler" in sentence:
            from prime_v2.eval.samplers import by_name

            sentence = by_name(sentence)
        for param in self.params:
            option = param.opts[0]
            if not option.startswith("--"):
                continue
            for name in dict.fromkeys([str(param.name), *(each.lstrip("-").replace("-", "_") for each in param.opts)]):
                sentence = re.sub(rf"{NOT_IN_NAME}{name}={VALUE}", partial(_given, option), sentence)
                if "_" in name:  # other names are words, too
                    sentence = re.sub(rf"{NOT_IN_NAME}{name}(?![\w/.=-])", option, sentence)
        options = {str(param.name): param.opts[0] for param in self.params if param.opts[0].startswith("--")}
        return LISTED.sub(
            lambda found: re.sub(r"[\w-]+", lambda word: options.get(word[0], word[0]), found[0]), sentence
        )


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


def _given(option: str, found: re.Match[str]) -> str:
    """The option with the value that was found, without quotes where it is one word."""
    word = found[1].strip("'\"")
    return f"{option} {word if word.split() == [word] else found[1]}"


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
    """Whether Python, numpy, an accelerator or torch (for the CPU's memory) says that memory is used up."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _sentence(text: str) -> str:
    return " ".join(text.split()).replace("Value error, ", "").rstrip(".")
