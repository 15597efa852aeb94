"""Reading documents, removing repetition and splitting; the BPE that is trained on them."""

import ast
import hashlib
import importlib.metadata
import json
import random
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from prime_v2.data import documents as corpus
from prime_v2.data.documents import (
    corpus_fingerprint,
    deduplicate,
    docs_documents,
    docs_versions,
    read_documents,
    split_of,
)
from prime_v2.tokenization.bpe import train_bpe

SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody minds. "


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# Files


def test_small_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo é\n".encode())
    assert list(read_documents(tmp_path / "a.txt")) == ["one\n\ntwo é\n"]


def test_large_text_file_is_cut_at_blank_lines_only_and_loses_nothing(tmp_path):
    generator = random.Random(0)
    text = "\n\n".join(SENTENCE * generator.randint(1, 30) for _ in range(200))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    documents = list(read_documents(tmp_path / "a.txt"))
    assert "".join(documents) == text
    assert len(documents) > 10
    assert all(len(document) >= 4096 and document.endswith("\n\n") for document in documents[:-1])
    # A paragraph has at most 30 sentences, so a document ends within one of them after 4 KiB.
    assert max(map(len, documents)) <= 4096 + 30 * len(SENTENCE) + 2


def test_large_text_file_without_blank_lines_is_cut_at_line_ends(tmp_path):
    text = (SENTENCE + "\n") * 5000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    documents = list(read_documents(tmp_path / "a.txt"))
    assert "".join(documents) == text
    assert [document.endswith("\n") for document in documents] == [True] * 5


def test_jsonl_parquet_and_folders_give_their_texts_in_order(tmp_path):
    texts = ["first", "second line\nwith another", "", "  ", "é 漢 🙂"]
    write_jsonl(tmp_path / "b.jsonl", [{"id": i, "body": text} for i, text in enumerate(texts)])
    write_parquet(tmp_path / "a.PARQUET", {"id": [0, 1], "body": ["x", "y"]})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("last")
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")
    assert list(read_documents(tmp_path, text_field="body")) == ["x", "y", *texts[:2], texts[4], "last"]
    assert list(read_documents(str(tmp_path), text_field="body", max_documents=3)) == ["x", "y", "first"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty: it holds no text"),
        ("a.txt", b" \n \n", "a.txt is empty: it holds no text"),
        ("a.txt", b"text\nabc\0def", r"a.txt is not a UTF-8 text file: byte 8 is 0x00"),
        ("a.txt", b"text\nab\xff\0", r"a.txt is not a UTF-8 text file: byte 7 is 0xff"),
        ("a.jsonl", b"\n", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y", "id": 1}\n', "a.jsonl line 2 has no field 'text'; .* body, id"),
        ("a.jsonl", b'{"text": "x"}\n\n{}\n', "a.jsonl line 3 has no field 'text'; its fields are none"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl line 1: the field 'text' is int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl line 1: the field 'text' holds half of a surrogate pair"),
        ("a.jsonl", b'["text"]\n', "a.jsonl line 1 is not a JSON object with the field 'text'"),
        ("a.jsonl", b'{"text": "x"\n', "a.jsonl line 1 is not JSON: .* at column"),
        ("a.parquet", b"text", "a.parquet is not a parquet file"),
        ("a.csv", b"text", r"a.csv has the suffix '.csv', but only .txt, .jsonl, .parquet can be read"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_documents(tmp_path / name))
    assert "\n" not in str(error.value)


def test_bad_parquet_columns_are_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"id": [1], "body": [None]})
    with pytest.raises(ValueError, match="has no column 'text'; its columns are id, body"):
        list(read_documents(path))
    with pytest.raises(ValueError, match="row 1: the field 'body' is NoneType, not text"):
        list(read_documents(path, text_field="body"))


def test_bad_sources_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(
        ValueError, match="none.txt does not exist; give a file, a folder, a hub data set name, or docs"
    ):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="none.txt does not exist"):
        read_documents("none.txt")
    with pytest.raises(ValueError, match="holds no file that ends in .txt, .jsonl, .parquet"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="max_documents=0 must be at least 1"):
        read_documents("docs", max_documents=0)


def test_hub_names_are_loaded_with_their_configuration(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return [{"text": "a"}, {"text": ""}, {"body": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read_documents("owner/name-1.0:config", split="validation", streaming=True)
    assert next(documents) == "a"
    assert calls == [(("owner/name-1.0", "config"), {"split": "validation", "streaming": True})]
    with pytest.raises(ValueError, match="owner/name-1.0:config row 3 has no field 'text'; its fields are body"):
        next(documents)


def test_hub_name_that_cannot_be_reached_is_refused_in_one_sentence(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"'no_such_set' is neither a file nor a hub data set that can be loaded \(ConnectionError: Couldn't reach it"
    )
    with pytest.raises(ValueError, match=message) as error:
        next(read_documents("no_such_set"))
    assert "\n" not in str(error.value)


# Documentation of the installed packages


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
        "from prime_v2.data.documents import *\n"
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
    monkeypatch.setattr(corpus, "_module_files", lambda source: sorted(tmp_path.glob("*.py")))
    expected = [f"{fresh[0]}\n\n{fresh[1]}", f"{fresh[2]}\n\n{fresh[3]}", fresh[4]]
    assert list(docs_documents(["anything"])) == expected


def test_standard_library_is_read_without_site_packages_and_tests():
    names = [path.as_posix() for path in corpus._module_files("python")]
    assert any(name.endswith("/asyncio/tasks.py") for name in names)
    assert not [name for name in names if "site-packages" in name or "/test/" in name]


# Repetition, split, fingerprint


def test_deduplicate_keeps_the_first_of_equal_texts():
    documents = ["One two", "three", "one  TWO\n", "", " ", "Three", "three."]
    assert list(deduplicate(documents)) == ["One two", "three", "", "three."]


def test_split_is_a_function_of_text_and_seed_with_the_asked_shares():
    documents = [f"Document {i}" for i in range(20000)]
    sides = [split_of(document, seed=3, dev_share=0.1, test_share=0.2) for document in documents]
    # Standard deviations are at most 57 documents: seven of them, a false alarm in 10^11 for a random hash.
    assert abs(sides.count("dev") - 2000) < 400 and abs(sides.count("test") - 4000) < 400
    assert sides == [split_of(f" document\n{i}", seed=3, dev_share=0.1, test_share=0.2) for i in range(20000)]
    other_dev_share = [split_of(document, seed=3, dev_share=0.5, test_share=0.2) for document in documents]
    assert [side == "test" for side in sides] == [side == "test" for side in other_dev_share]
    both = sum(
        side == "test" == split_of(text, seed=4, test_share=0.2) for text, side in zip(documents, sides, strict=True)
    )
    assert abs(both - 800) < 200  # the seeds are independent: 20,000 x 0.2 x 0.2


def test_split_is_the_same_for_ever():
    """Blake2b, 16 bytes, of "seed\\ntext"; the first 8 of them as a fraction: test below its share, dev at the top."""
    for i in range(100):
        digest = hashlib.blake2b(b"5\ntext %d" % i, digest_size=16).hexdigest()
        fraction = int(digest[:16], 16) / 16**16
        expected = "test" if fraction < 0.3 else "dev" if fraction >= 0.75 else "train"
        assert split_of(f"TEXT\n{i}", seed=5, dev_share=0.25, test_share=0.3) == expected


@pytest.mark.parametrize("shares", [(0.5, 0.5), (-0.1, 0.1), (0.1, 1.0), (float("nan"), 0.1)])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match="dev_share=.* must be at least 0 and leave a share for training"):
        split_of("text", dev_share=shares[0], test_share=shares[1])


def test_fingerprint_is_sha256_of_lengths_and_texts():
    expected = hashlib.sha256(b"\0\0\0\0\0\0\0\2\xc3\xa9" + b"\0\0\0\0\0\0\0\1a").hexdigest()
    assert corpus_fingerprint(["é", "a"]) == expected
    assert len({corpus_fingerprint(x) for x in ([], [""], ["ab"], ["a", "b"], ["b", "a"])}) == 5


# BPE


def test_bpe_gives_every_text_back_and_has_the_asked_size():
    tokenizer = train_bpe([SENTENCE * 3, "some other text about foxes"], 280)
    assert tokenizer.get_vocab_size() == 280
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    for text in ["", SENTENCE, " two  spaces\n\n\ttab ", "é 漢字 🙂 \u200d\x00\x7f", "a <|endoftext|> b"]:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert 0 not in ids
    assert len(tokenizer.encode(SENTENCE).ids) < len(SENTENCE)


def test_bpe_is_deterministic():
    documents = [f"{SENTENCE} number {i}" for i in range(50)]
    assert train_bpe(documents, 300).to_str() == train_bpe(iter(documents), 300).to_str()


def test_bpe_of_an_impossible_size_is_refused():
    with pytest.raises(ValueError, match="vocab_size=257 leaves no room for merges .* use at least 258"):
        train_bpe([SENTENCE], 257)
    with pytest.raises(ValueError, match="fewer than the 5000 of the vocabulary; use more text, or") as error:
        train_bpe([SENTENCE], 5000)
    size_that_works = int(re.search(r"--bpe_vocab_size (\d+)", str(error.value))[1])
    assert train_bpe([SENTENCE], size_that_works).get_vocab_size() == size_that_works
