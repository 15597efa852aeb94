"""Reading documents from files, folders and hub data sets."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from prime_v2.data.documents import read_documents

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


def test_a_file_of_a_folder_that_is_no_text_is_named_and_not_skipped(tmp_path):
    """Which files were read decides what a number is about."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_bytes(b"\x89PNG")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    sentence = (
        r"b.txt is not a UTF-8 text file: byte 0 is 0x89; convert it to UTF-8, or move it out .* all .txt, .jsonl"
    )
    with pytest.raises(ValueError, match=sentence):
        list(read_documents(tmp_path))
    (tmp_path / "b.txt").rename(tmp_path / "b.bin")
    assert list(read_documents(tmp_path)) == ["text"]


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
