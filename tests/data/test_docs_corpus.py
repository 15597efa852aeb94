"""The corpus of the documentation of the installed packages."""

import ast
import importlib.metadata
import re
import subprocess
import sys

from prime_v2.data import docs_corpus
from prime_v2.data.docs_corpus import docs_documents, docs_versions
from prime_v2.data.splits import corpus_fingerprint


def test_docs_of_a_package_are_prose_of_its_docstrings_in_the_order_of_its_files():
    documents = list(docs_documents(["click"]))
    files = sorted(
        (file for file in importlib.metadata.distribution("click").files if file.suffix == ".py"),
        key=lambda file: file.as_posix(),
    )
    sources = [file.locate().read_text(encoding="utf-8") for file in files]
    place = -1
    for document in documents:
        assert len(document) >= 200 and ">>>" not in document
        first_line = document.strip().splitlines()[0]
        place = next(i for i in range(place + 1, len(sources)) if first_line in sources[i])
        docstrings = [
            re.sub(r"\s+", " ", ast.get_docstring(node) or "")
            for node in ast.walk(ast.parse(sources[place]))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        ]
        for paragraph in document.split("\n\n"):
            text = " ".join(paragraph.split())
            assert any(text in docstring for docstring in docstrings)
    assert len(documents) >= 5
    assert docs_versions(["click", "no-such-distribution"]) == {"click": importlib.metadata.version("click")}


def test_docs_are_the_same_in_every_process_and_skip_what_is_not_installed():
    program = (
        "from prime_v2.data.docs_corpus import docs_documents\n"
        "from prime_v2.data.splits import corpus_fingerprint\n"
        "print(corpus_fingerprint(docs_documents(['no-such-distribution', 'click'])))"
    )
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True).stdout
    assert output.strip() == corpus_fingerprint(docs_documents(["click"]))


def test_docs_keep_the_first_of_repeated_paragraphs(tmp_path, monkeypatch):
    words = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(300)]
    fresh = [" ".join(words[i * 50 : i * 50 + 50]) for i in range(6)]
    half_seen = " ".join(words[10:50] + words[99:59:-1])
    sources = {
        "a.py": f'"""{fresh[0]}\n\n{fresh[1]}\n\n    >>> 1 + 1\n    2\n\n{"1.5 2.5 " * 50}"""',
        "b.py": f'"""{fresh[0].upper()}.\n\n{fresh[2]}\n"""\nclass A:\n    """{half_seen}\n\n    {fresh[3]}"""\n',
        "c.py": f'def f():\n    """{fresh[4]}"""\n    def g():\n        """{fresh[5]}"""\n',
        "d.py": f'"""{fresh[0]}"""',
        "e.py": f'"""{fresh[5]}""" is not Python',
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(docs_corpus, "_module_files", lambda source: sorted(tmp_path.glob("*.py")))
    expected = [f"{fresh[0]}\n\n{fresh[1]}", f"{fresh[2]}\n\n{fresh[3]}", fresh[4]]
    assert list(docs_documents(["anything"])) == expected


def test_standard_library_is_read_without_site_packages_and_tests():
    names = [path.as_posix() for path in docs_corpus._module_files("python")]
    assert any(name.endswith("/asyncio/tasks.py") for name in names)
    assert not [name for name in names if "site-packages" in name or "/test/" in name]
