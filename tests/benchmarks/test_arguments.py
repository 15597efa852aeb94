"""The benchmarks' command lines: what they do without arguments is what they would accept as arguments."""

import argparse
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "parse_args" in path.read_text())


class ParserFound(Exception):
    pass


def load(name: str, monkeypatch) -> dict:
    """The names of a benchmark's file, which finds its neighbours in its folder."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [name])
    return runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_default_is_a_value_that_the_option_accepts(name, monkeypatch):
    """Defaults do not pass through an option's type and choices, so nothing else would notice an outdated one."""
    main = load(name, monkeypatch)["main"]
    parsers = []

    def parse_args(parser, *_):
        parsers.append(parser)
        raise ParserFound

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(ParserFound):
        main()
    (parser,) = parsers
    monkeypatch.undo()
    for action in parser._actions:
        values = action.default if isinstance(action.default, list) else [action.default]
        if action.nargs == 0 or action.default in (None, argparse.SUPPRESS):  # flags, and options without a default
            continue
        words = [*action.option_strings[:1], *map(str, values)]
        required = [word for each in parser._actions if each.required for word in (*each.option_strings[:1], "x")]
        found = vars(parser.parse_args([*required, *words]))[action.dest]
        assert found == action.default, action.dest


def test_the_growth_of_a_step_is_measured_with_cases_of_the_command_line(monkeypatch):
    """On two small batches; the command of the memory's own process, which takes seconds to start, is read only."""
    names = load("growth", monkeypatch)
    scope, step = names["measure"].__globals__, sys.modules["training_step"]
    commands = []

    def memory(kind, case, options):
        commands.append(step.parse(["--cases", str(case), "--memory-of", kind]))
        return 1.0

    monkeypatch.setitem(scope, "AXES", {"batch": (1, 2)})
    monkeypatch.setitem(scope, "MIDDLE", {"batch": 1, "length": 8, "vocab_size": 64})
    monkeypatch.setitem(scope, "memory_in_fresh_process", memory)
    names["main"](["--hidden-size", "64", "--layers", "1", "--repeats", "1"])
    assert [(each.memory_of, str(each.cases[0])) for each in commands] == [
        (kind, "64:6:marginal") for kind in ("prime", "causal") for _ in range(2)
    ]
