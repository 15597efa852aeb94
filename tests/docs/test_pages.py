"""README and the pages: short, with links that lead somewhere, and commands that something runs."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from command_options import PARAMETERS
from networks import one_layer

from docs.map import main as map_main
from prime_v2.tokenization import build_tokenizer
from prime_v2.tokenization.bpe import train_bpe
from prime_v2.training.options import RaisingParser, parse_options

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What runs each command of README: a line of a test, of the Makefile or of `.ci/run`.
COVERED = {
    "pip install torch==2.13.0 && pip install .": "def test_installed_wheel_imports_every_module",
    "make demo": "$(BIN)/prime-v2 demo",
    "make test": "make test\n",
    "prime-v2 generate": "def test_the_picture_shows_the_text_that_is_printed",
    "prime-v2 ppl": 'run("ppl", ',
    "prime-v2 eval": 'invoke(app, ["eval", ',
    "prime-v2 quality": "def test_quality_prints_tables_records_the_numbers_and_draws_them",
    "prime-v2 demo": 'invoke(app, ["demo", ',
    "accelerate launch train.py": "def test_the_training_line_of_readme_runs_installed",
    "lm_eval": "--model prime_v2 --model_args pretrained=model,num_samples=4 --tasks sciq,boolq,arc_easy",
}
RUNNERS = [ROOT / "Makefile", ROOT / ".ci" / "run", *sorted((ROOT / "tests").rglob("test_*.py"))]


def commands(text: str) -> list[str]:
    """The lines of a page that are indented as commands, without their comments."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"\\\n\s*", "", outside)  # a line that goes on
    lines = re.findall(r"^    (\S.*)$", outside, flags=re.MULTILINE)
    return [re.split(r"\s+#", line)[0].strip() for line in lines]


def test_readme_is_read_to_its_end():
    assert len(README.splitlines()) <= 130
    assert len(re.findall(r"^\| --- ", README, flags=re.MULTILINE)) <= 2


@pytest.mark.parametrize("command", commands(README))
def test_every_command_of_readme_is_run_by_something(command):
    (key,) = (each for each in COVERED if command == each or command.startswith(f"{each} "))
    texts = [path.read_text(encoding="utf-8") for path in RUNNERS if path != Path(__file__)]
    assert any(COVERED[key] in text for text in texts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_sub_commands_and_options_that_exist(page):
    for line in commands(page.read_text(encoding="utf-8")):
        for command in line.split(" && "):
            words = shlex.split(command)
            if words[0] == "prime-v2" and words[1] not in ("eval", "demo"):  # which pass options on
                names = {each.command for each in PARAMETERS}
                name = tuple(words[1:3]) if tuple(words[1:3]) in names else (words[1],)
                flags = {each.flag for each in PARAMETERS if each.command == name}
                flags |= {part for each in PARAMETERS if each.command == name for part in declared(each)}
                assert name in names, command
                assert {word.split("=")[0] for word in words if word.startswith("--")} <= flags, command


def declared(parameter) -> list[str]:
    """All spellings of an option, such as --greedy and --sample."""
    written = [*(parameter.info.param_decls or ()), parameter.info.default]  # typer takes the first name for a default
    return [part for each in written if isinstance(each, str) for part in each.split("/")]


@pytest.mark.parametrize("line", [each for each in commands(README) if "train.py" in each])
def test_the_training_commands_of_readme_are_options_that_train_py_takes(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    run, training, _ = parse_options(words[words.index("train.py") + 1 :], parser_class=RaisingParser)
    assert training.output_dir.startswith("runs/")
    assert run.family in ("prime", "arm")


def test_the_python_of_readme_runs_on_a_model_and_prints_what_its_comments_say(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    folder = tmp_path / "runs" / "demo" / "coarse_first"
    one_layer(vocab_size=280, max_position_embeddings=64).save_pretrained(folder)
    text = ["return the number of elements of the list"] * 9
    build_tokenizer(train_bpe(text, 280), special_tokens={"eos_token": "<|endoftext|>"}).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    digits, bound, text = printed.getvalue().split("\n", 2)
    assert re.fullmatch(r"\[[01](, [01]){8}\]", digits)
    assert re.fullmatch(r"-\d+\.\d\d ± \d+\.\d\d True", bound)
    assert text.startswith("Return the number of elements")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_or_a_heading_leads_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in headings(file), f"{page.name}: {target}"


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in found}


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))


def test_the_map_of_the_rooms_is_that_of_the_imports():
    """`python docs/map.py` draws it anew."""
    assert map_main(["--check"]) == 0


def test_files_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:tests|configs|benchmarks|docs)/[\w./-]+\.\w+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
