"""Records: what stands behind a number."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from prime_v2.output import records
from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_of, code_version, command_line, make_record, read_record


def test_record_says_what_made_the_numbers(tmp_path):
    record = make_record("ppl", {"nats": 1.5}, seed=7, code=code_version(), command="prime-v2 ppl a b")
    assert record["results"] == {"nats": 1.5}
    assert (record["name"], record["seed"], record["command"]) == ("ppl", 7, "prime-v2 ppl a b")
    assert {"python", "torch", "transformers", "prime-v2"} <= set(record["versions"])
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["threads"] >= 1
    assert record["time_utc"].endswith("Z")
    assert isinstance(record["uncommitted_changes"], bool)
    path = write_json(tmp_path / "new" / "record.json", record)
    assert read_record(path) == record


def test_a_package_in_another_repository_is_its_release_and_not_that_repositorys_commit(tmp_path):
    """An environment inside somebody's project: their commits say nothing about this code."""
    place = tmp_path / "project" / ".venv" / "site-packages" / "output"
    place.mkdir(parents=True)
    (tmp_path / "project" / ".gitignore").write_text(".venv\n")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path / "project", check=True)
    shutil.copy(records.__file__, place / "records.py")
    program = "import importlib.util, json; spec = importlib.util.spec_from_file_location('copy', 'records.py'); "
    program += "copy = importlib.util.module_from_spec(spec); spec.loader.exec_module(copy); "
    program += "print(json.dumps(copy.code_version()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True, check=True)
    release = {"commit": f"release {version('prime-v2')}", "uncommitted_changes": False}
    assert json.loads(done.stdout) == release
    assert code_of(release, 12) == release["commit"], "only a hash is cut"
    assert code_of({"commit": "a" * 40, "uncommitted_changes": True}, 12) == f"{'a' * 12} with uncommitted changes"


def test_a_git_that_fails_is_no_clean_code(monkeypatch):
    """As where it takes too long: neither another commit nor "no changes" would be true."""
    real = records.git
    for fails in ("status", "rev-parse"):
        monkeypatch.setattr(records, "git", lambda *a, folder, f=fails: None if a[0] == f else real(*a, folder=folder))
        if real("ls-files", "records.py", folder=Path(records.__file__).parent):
            with pytest.raises(ValueError, match="git does not say which commit"):
                code_version()
    monkeypatch.setattr(records, "git", lambda *a, folder: None)
    assert code_version()["commit"] in ("not a git checkout", f"release {version('prime-v2')}")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/some/place/bin/prime-v2", "ppl", "a b"], "prime-v2 ppl 'a b'"),
        (["/some/place/train.py", "--seed", "1"], "python train.py --seed 1"),
    ],
)
def test_command_line_leaves_the_programs_folder_out(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give a record"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"3", "is no record: it lacks name, command, commit, results"),
        (b"null", "is no record: it lacks name"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"name": "x", "command": "x", "commit": "x", "results": 3}', "is no record: its results"),
        (b'{"name": "x", "results": {}}', "is no record: it lacks command, commit"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, content, message):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_record(path)


def test_a_record_with_earlier_names_reads_with_the_present_ones(tmp_path):
    loss = {"method": "token_objective", "nats_per_token": 5.5}
    results = {
        "config": {"objective": "subtoken"},
        "rows": [{"objective": "token"}],
        "evaluation": {"token_objective": loss},
    }
    path = write_json(tmp_path / "old.json", {"name": "train", "command": "", "commit": "", "results": results})
    assert read_record(path)["results"] == {
        "config": {"objective": "marginal"},
        "rows": [{"objective": "joint"}],
        "evaluation": {"paper_loss": {"method": "paper_loss", "nats_per_token": 5.5}},
    }
