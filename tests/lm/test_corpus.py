"""Corpora: three formats, one content, and errors that name the place."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustgate.lm.corpus import Corpus, read_corpus, write_corpus

DOCUMENTS = ["one\ntwo", "späte Übung\u2028not a line end", "three\f four\r\n", "\n\nlast\n"]


def write_parquet(path: Path, **columns: list[object]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_three_formats_have_one_content(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.txt", DOCUMENTS)
    lines = [json.dumps({"id": 1, "text": document}) for document in DOCUMENTS]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n")
    write_parquet(tmp_path / "c.parquet", text=DOCUMENTS)
    read = [read_corpus(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.parquet")]
    assert [corpus.documents for corpus in read] == [tuple(DOCUMENTS)] * 3
    assert len({corpus.sha256 for corpus in read}) == 1
    assert [corpus.name for corpus in read] == ["a", "b", "c"]
    assert read_corpus(tmp_path / "a.txt", "wiki").name == "wiki"


def test_hash_sees_where_documents_end() -> None:
    hashes = {Corpus.of("x", given).sha256 for given in (["ab", "c"], ["a", "bc"], ["abc"])}
    assert len(hashes) == 3


def test_the_reading_rule_of_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"first\nline \x0c two\n\x0c\nsecond\n\x0c\n\n\x0c\nthird\n\n\x0c\n")
    corpus = read_corpus(path)
    assert corpus.documents == ("first\nline \f two", "second", "third\n")
    assert corpus.dropped == 1
    path.write_bytes(b"no line end")
    assert read_corpus(path).documents == ("no line end",)


@given(st.lists(st.text(st.sampled_from("a \n\f\r\u2028"), min_size=1), min_size=1))
def test_what_can_be_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.txt"
    lines = [line for document in documents for line in document.split("\n")]
    if "\f" in lines or "\f\r" in lines or not all(map(str.strip, documents)):
        with pytest.raises(ValueError, match=r"form feed|blank"):
            write_corpus(path, documents)
    else:
        write_corpus(path, documents)
        assert read_corpus(path).documents == tuple(documents)


def test_writing_refuses_what_would_not_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(ValueError, match=r"documents\[1\] has a line holding one form feed"):
        write_corpus(path, ["a", "b\n\f\nc"])
    with pytest.raises(ValueError, match=r"documents\[0\] has a line holding one form feed"):
        write_corpus(path, ["ends with one\n\f"])
    with pytest.raises(ValueError, match=r"documents\[1\] is blank"):
        write_corpus(path, ["a", " \n"])
    with pytest.raises(ValueError, match=r"expected the extension \.txt, got '\.md'"):
        write_corpus(tmp_path / "a.md", ["a"])
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_corpus(path, ["old"])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full; no half-written file was kept") as caught:
        write_corpus(path, ["new"])
    assert caught.value.filename == str(path)
    assert [child.name for child in tmp_path.iterdir()] == ["a.txt"]
    assert read_corpus(path).documents == ("old",)


BAD_FILES = {
    "latin.txt": (b"good\n\x0c\nsch\xf6n\n", r"line 3: byte 10 \(0xf6\) is not valid UTF-8.*iconv"),
    "latin.jsonl": (
        b'{"text": "a"}\n{"text": "\xe9t\xe9"}\n',
        r"line 2: byte 24 \(0xe9\) is not valid UTF-8",
    ),
    "empty.txt": (b"", r"empty\.txt.*corpus 'empty' is empty"),
    "blank.txt": (b"\n \n\x0c\n\t\n", "corpus 'blank' is empty: 2 documents, none with any text"),
    "empty.jsonl": (b"\n\n", "corpus 'empty' is empty"),
    "windows.txt": (b"a\r\n\x0c\r\nb\r\n", "line 2: a form feed with a CR LF.*dos2unix"),
    "field.jsonl": (b'{"text": "a"}\n\n{"body": 1, "id": 2}\n', "line 3: no text field.*body, id"),
    "list.jsonl": (b"[1]\n", r"line 1: no text field \(found: list\)"),
    "null.jsonl": (b'{"text": null}\n', "line 1: text is NoneType, expected a string"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    "surrogate.jsonl": (b'{"text": "a\\ud800"}\n', r"document 0: character 1.*U\+D800"),
    "not.parquet": (b"PAR1 no more", "not a readable Parquet file"),
    "a.csv": (b"text\n", r"unknown extension '\.csv'; expected \.txt"),
    "bad name.txt": (b"a\n", "corpus name 'bad name': expected 1 to 100 letters"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_with_the_place_and_the_remedy(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_corpus(path)
    assert str(path) in str(caught.value)


def test_bad_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, body=["a"], id=[1])
    with pytest.raises(ValueError, match=r"a\.parquet: no text column \(found: body, id\)"):
        read_corpus(path)
    write_parquet(path, text=["a", None])
    with pytest.raises(ValueError, match="row 1: text is NoneType"):
        read_corpus(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.txt: no such file"):
        read_corpus(tmp_path / "gone.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match="is a folder; give one of its files"):
        read_corpus(tmp_path / "folder.txt")


def test_one_document_is_a_corpus() -> None:
    assert len(Corpus.of("x", ["only"])) == 1


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "robustgate\[lm\]"'):
        read_corpus(tmp_path / "a.parquet")
