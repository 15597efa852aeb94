"""Every place that a command writes to is tried before its work, and no result is lost to one that fails after it."""

import errno
import json
from pathlib import Path

import pytest
from command_options import NUMBERS, PARAMETERS, PATHS, Parameter
from typer.testing import CliRunner

from prime_v2.commands.main import app
from prime_v2.output import places

READ = {"data", "record", "recorded", "permutation", "fit", "checkpoint", "folder"}  # parameters of input files


WRITTEN = [each for each in PATHS if each.name not in READ]


def call(written: Parameter, value: str) -> list[str]:
    """A command line with `value` as this parameter and something for all others that are needed."""
    options, arguments = [], []
    for each in PARAMETERS:
        if each.command != written.command or not (each.required or each is written):
            continue
        given = value if each is written else "3" if each in NUMBERS else "x"
        if each.flag is None:
            arguments.append(given)
        else:
            options += [each.flag, given]
    return [*written.command, *arguments, *options]


def test_the_commands_with_places_are_found():
    """A new parameter of a path is a place to write unless it is named in READ."""
    found = set(map(str, WRITTEN))
    assert {"ppl --output", "eval --output", "analyze --figure-dir", "card --export", "scaling plot --figure"} <= found
    assert {"compare --out", "convert out", "tasks out", "scaling fit --output"} <= found


@pytest.mark.parametrize("written", WRITTEN, ids=str)
def test_every_place_is_tried_by_the_one_check_before_anything_else(written, tmp_path, monkeypatch):
    """A file system that takes no file: the model, text and config `x` would be refused after it."""

    def full(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(places.tempfile, "mkstemp", full)
    monkeypatch.chdir(tmp_path)
    place = str(tmp_path / "new")
    result = CliRunner().invoke(app, call(written, place))
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"prime-v2 {' '.join(written.command)}: error: ")
    assert line.endswith(f"{place} cannot be written (Read-only file system); give another place")
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", [places.check_new_file, places.check_new_folder, places.check_folder])
@pytest.mark.parametrize("name", ["a" * 300, "nul\0", "file/below"])
def test_a_name_that_no_file_can_have_is_refused_in_a_sentence(check, name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="give another place|make it first"):
        check(tmp_path / name, "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("check", [places.check_new_file, places.check_new_folder, places.check_folder])
def test_a_check_leaves_nothing(check, tmp_path):
    check(tmp_path / "new", "--output")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_lie_below_new_ones_and_a_file_may_not(tmp_path):
    places.check_folder(tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="the folder .*a does not exist; make it first"):
        places.check_new_file(tmp_path / "a" / "b")


def test_a_disk_that_is_full_after_the_work_leaves_the_printed_result_and_status_2(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(places, "write_json", full)
    fit = ["scaling", "fit", "--bootstrap", "0", "--family", "MDM", "--json"]
    result = CliRunner().invoke(app, [*fit, "--output", str(tmp_path / "fit.json")])
    assert result.exit_code == 2
    assert "MDM" in json.loads(result.stdout)["families"]
    assert result.stderr == "prime-v2 scaling fit: error: No space left on device\n"


def test_a_reader_that_closes_the_pipe_does_not_lose_the_record(tmp_path, monkeypatch):
    def closed(*arguments, **options):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        places.print_and_record("numbers", tmp_path / "record.json", lambda: {"numbers": 1})
    assert json.loads((tmp_path / "record.json").read_text()) == {"numbers": 1}


def test_a_result_without_a_record_asks_for_neither_commit_nor_machine(monkeypatch, capsys):
    places.print_and_record("numbers", None, lambda: pytest.fail("a record was made"))
    assert capsys.readouterr().out == "numbers\n"


def test_every_result_with_a_record_is_printed_and_written_by_the_one_function():
    """No command writes a record itself, before or without printing."""
    root = Path(places.__file__).parents[1]
    sources = [*(root / "commands").glob("*.py"), *(root / "studies").rglob("*.py")]
    writers = {path.relative_to(root).as_posix() for path in sources if "write_json(" in path.read_text()}
    assert writers <= {
        "commands/compare.py",
        "studies/compare/run.py",  # summary.json of the runs' folder, after the printed tables
        "studies/quality/run.py",  # finished cells, from which a stopped study goes on
    }


def test_a_new_file_has_a_suffix_of_its_format(tmp_path):
    """By option and command: before the model `x` is looked for, and nothing is written."""
    suffixes = {"output": ".json", "page": ".html", "picture": ".svg or .png", "figure": ".png"}
    found = 0
    for each in WRITTEN:
        if each.name not in suffixes:
            continue
        result = CliRunner().invoke(app, call(each, str(tmp_path / "out.txt")))
        ending = suffixes[each.name] + (" or .pdf or .svg" if each.command == ("scaling", "plot") else "")
        assert result.exit_code == 2
        option = each.flag or each.info.metavar
        assert f"error: {option} {tmp_path / 'out.txt'} must end with {ending}; use e.g. out." in result.stderr
        found += 1
    assert found >= 8 and not list(tmp_path.iterdir())
