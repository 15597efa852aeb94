"""Nothing that is passed on, an export or a record, says where on a machine something lies, or whose it is."""

import json
import platform
import socket
import sys
from pathlib import Path

import pytest
from tiny_runs import MODEL, TINY, write_text
from typer.testing import CliRunner

from prime_v2.commands.main import app
from prime_v2.hub_card.card import write_card
from prime_v2.output.paths import without_places
from prime_v2.output.records import code_version, make_record
from prime_v2.training import run as training

PERSON, HOST = "somebody-of-here", "host-of-here"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("/home/me/run", "run"),
        ("/home/me/my texts", "my texts"),
        ("~/texts.jsonl", "texts.jsonl"),
        ("~me/texts.jsonl", "texts.jsonl"),
        ("../../me/texts", "texts"),
        ("file:///home/me/texts", "texts"),
        ("/home/me/a.yaml:entry", "a.yaml:entry"),
        ("pretrained=/home/me/run,seed=1", "pretrained=run,seed=1"),
        ("/home/me/a,/home/me/b", "a,b"),
        ("data_files=test:/home/me/x", "data_files=test:x"),
        ("data_files=test:/home/me/my x", "data_files=test:my x"),
        ("a=test:/home/me/x,train:~/y", "a=test:x,train:y"),
        ("pretrained:/home/me/m", "pretrained:m"),
        ("seen (pretrained:/home/me/m)", "seen (pretrained:m)"),
        ("file:/home/me/m", "file:m"),
        ("-o/home/me/x", "-ox"),
        ("-o../../me/x", "-ox"),
        ("it's with -o/home/me/x", "it's with -ox"),
        ("prime-v2 ppl -o/home/me/x -o '/home/me/x y' '-o/home/me/x y'", "prime-v2 ppl -ox -o 'x y' '-ox y'"),
        ("it's in /home/me/x, there", "it's in x, there"),
        ("python train.py --data /home/me/x --config=/home/me/y.yaml", "python train.py --data x --config=y.yaml"),
        ("prime-v2 ppl '/home/me/my run' '/home/me/my text.txt'", "prime-v2 ppl 'my run' 'my text.txt'"),
        ("""lm_eval -a '{"pretrained": "/home/me/my run"}'""", """lm_eval -a '{"pretrained": "my run"}'"""),
    ],
)  # fmt: skip
def test_of_a_path_the_last_part_is_kept(text, expected):
    assert without_places(text) == expected
    assert without_places({"a": [text], text: 1}) == {"a": [expected], expected: 1}


def test_keys_with_one_last_part_lose_no_entry():
    assert without_places({"/home/me/a/x": 1, "/home/me/b/x": 2, 3: 4}) == {"x": 1, "x (2)": 2, 3: 4}


@pytest.mark.parametrize(
    "text",
    [
        "runs/tiny",
        "nats/token",
        "https://host/a/b",
        "url=https://host/a/b",
        "hub:hf://a/b",
        "1:2",
        "top-k/all",
        "a-b/c",
        "a / b",
        "/",
        "and/or",
        "org/model",
        "",
        "a\n\n b  c",
        "~",
        "a:" * 5000 + "b/c",
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_place_on_a_machine_stays(text):
    assert without_places(text) == text


def test_generated_text_and_numbers_stay():
    content = {"samples": ["see /usr/lib"], "nats": 1.5, "none": None, "is_bound": True}
    assert without_places(content) == content


def test_every_record_names_files_by_their_last_part(tmp_path):
    results = {"source": str(tmp_path / "a.txt"), "models": [{"name": str(tmp_path / "b")}]}
    record = make_record(
        "ppl", results, seed=0, code=code_version(), command=f"prime-v2 ppl {tmp_path}/b {tmp_path}/a.txt"
    )
    assert record["command"] == "prime-v2 ppl b a.txt"
    assert record["results"] == {"source": "a.txt", "models": [{"name": "b"}]}


@pytest.fixture
def told(tmp_path, monkeypatch) -> list[bytes]:
    """A home, user and host of known names; what must not be told, the temporary folder too."""
    home = tmp_path / PERSON
    home.mkdir()
    for name, value in {"HOME": str(home), "USER": PERSON, "LOGNAME": PERSON, "HOSTNAME": HOST}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(platform, "node", lambda: HOST)
    return [each.encode() for each in (str(tmp_path), tmp_path.name, PERSON, HOST)]


def test_no_file_of_an_export_and_no_record_tells_where_or_by_whom_it_was_made(told, tmp_path, monkeypatch):
    """A run from a trained folder, every place an absolute path; then a card from a record that has them still."""
    home = tmp_path / PERSON
    text = write_text(home / "text.jsonl")

    def train(name: str, *more: str) -> Path:
        arguments = ["--data", str(text), "--output_dir", str(home / name), "--record", str(home / f"{name}.json")]
        arguments += [*TINY.split(), "--max_steps", "1", "--num_generated", "0", *more]
        monkeypatch.setattr(sys, "argv", [str(home / "train.py"), *arguments])
        assert training.main(arguments) == 0
        return home / name

    base = train("base", *MODEL)
    run = train("run", "--init_from", str(base), "--label", f"of {home}/base")
    result = CliRunner().invoke(app, ["card", str(run), "--export", str(home / "export")])
    assert result.exit_code == 0, result.output
    passed_on = [*(home / "export").rglob("*"), run / "results" / "train.json", home / "run.json"]
    assert len(passed_on) > 20
    for path in passed_on:
        content = path.read_bytes()
        assert [each for each in told if each in content] == [], path.name

    record = make_record("train", {}, seed=0, code=code_version()) | json.loads((home / "run.json").read_text())
    record["command"] = f"python {home}/train.py --data {text}"
    record["results"]["data"]["source"] = str(text)
    card = write_card(home / "export", record).read_bytes()
    assert [each for each in told if each in card] == []
    assert b"python train.py --data text.jsonl" in card
