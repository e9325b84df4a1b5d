"""Corpora: a name and its documents, read from text, JSON lines or Parquet.

Plain text is UTF-8; documents are separated by a line that holds one form feed (``\\n\\f\\n``).
JSON lines and Parquet carry the document in a ``text`` field or column.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from robustgate.lm.files import check_name, require, write_atomic

SEPARATOR = "\n\f\n"
"""What stands between two documents of a plain-text corpus."""


@dataclass(frozen=True)
class Corpus:
    """Documents of one domain.

    Attributes:
        name: the domain's name.
        documents: the texts, none of them blank.
        sha256: hash of the documents in order; the file format and the name do not enter.
        dropped: how many blank documents (white space only) were left out.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str
    dropped: int = 0

    @classmethod
    def of(cls, name: str, documents: Iterable[str]) -> Corpus:
        """Build a corpus from texts in memory; blank ones are left out and counted.

        Args:
            name: the domain's name.
            documents: the texts.

        Returns:
            The corpus.

        Raises:
            ValueError: no document is left, or one holds a lone surrogate (not encodable).

        Example:
            >>> Corpus.of("greetings", ["hello", " ", "good morning"]).dropped
            1
        """
        given = tuple(documents)
        kept = tuple(document for document in given if document.strip())
        if not kept:
            raise ValueError(
                f"corpus {name!r} is empty: {len(given)} documents, none with any text"
            )
        digest = hashlib.sha256()
        for index, document in enumerate(kept):
            try:
                content = document.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"corpus {name!r}, document {index}: character {error.start} is the lone "
                    f"surrogate U+{ord(document[error.start]):04X}, which UTF-8 cannot hold"
                ) from error
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return cls(check_name(name, "corpus"), kept, digest.hexdigest(), len(given) - len(kept))

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.documents)


def read_corpus(path: str | os.PathLike[str], name: str | None = None) -> Corpus:
    """Read a corpus from a ``.txt``, ``.jsonl`` or ``.parquet`` file.

    Args:
        path: the file. Line ends other than ``\\n`` are text, not line ends.
        name: the domain's name; the file's name without its extension if left out.

    Returns:
        The corpus; blank documents are left out and counted in ``dropped``.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: unknown extension, invalid UTF-8, no ``text``, or nothing to read; the message
            names the file, the byte, line or row, and the remedy.

    Example:
        >>> corpus = read_corpus("wiki/valid.txt", "wiki")        # doctest: +SKIP
        >>> len(corpus), corpus.sha256[:8]                        # doctest: +SKIP
        (57, '8c0f7a52')
    """
    path = Path(path)
    readers = {".txt": _read_text, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: unknown extension {path.suffix!r}; expected .txt (documents separated by a "
            "line holding one form feed), .jsonl or .parquet (with a text field)"
        )
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give one of its files")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file (looked in {path.parent.resolve()})")
    try:
        return Corpus.of(path.stem if name is None else name, readers[path.suffix](path))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(f"{path}") else f"{path}: {message}") from (
            error.__cause__
        )


def write_corpus(path: str | os.PathLike[str], documents: Sequence[str]) -> None:
    """Write a plain-text corpus: atomically, and so that ``read_corpus`` returns it unchanged.

    Args:
        path: a ``.txt`` file, replaced if it exists; its folder is made if needed.
        documents: the texts.

    Raises:
        ValueError: a document is blank or has a line that holds one form feed.
        OSError: the file could not be written; nothing half-written stays.
    """
    path = Path(path)
    if path.suffix != ".txt":
        raise ValueError(f"{path}: expected the extension .txt, got {path.suffix!r}")
    for index, document in enumerate(documents):
        if not document.strip():
            raise ValueError(f"documents[{index}] is blank; leave it out")
        if {"\f", "\f\r"}.intersection(document.split("\n")):
            raise ValueError(
                f"documents[{index}] has a line holding one form feed, which separates "
                "documents; remove it, or write JSON lines instead"
            )
    content = (SEPARATOR.join(Corpus.of("documents", documents).documents) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


def _decode(content: bytes, path: Path, offset: int = 0, line: int | None = None) -> str:
    """Decode UTF-8, or name the file, the line and the byte that is not."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        at = content.count(b"\n", 0, error.start) + 1 if line is None else line
        raise ValueError(
            f"{path}: line {at}: byte {offset + error.start} (0x{content[error.start]:02x}) is not "
            f"valid UTF-8; convert the file, for example: iconv -f latin1 -t utf-8 {path}"
        ) from error


def _read_text(path: Path) -> Iterator[str]:
    """Yield the runs of lines between lines that hold one form feed."""
    lines = _decode(path.read_bytes(), path).removesuffix("\n").split("\n")
    if "\f\r" in lines:
        raise ValueError(
            f"{path}: line {lines.index(chr(12) + chr(13)) + 1}: a form feed with a CR LF line "
            f"end does not separate documents; convert the file, for example: dos2unix -f {path}"
        )
    for is_separator, run in groupby(lines, lambda line: line == "\f"):
        if not is_separator:
            yield "\n".join(run)


def _read_json_lines(path: Path) -> Iterator[str]:
    """Yield the ``text`` of every line that is not blank."""
    offset = 0
    for number, content in enumerate(path.read_bytes().split(b"\n"), start=1):
        if content.strip():
            try:
                record = json.loads(_decode(content, path, offset, number))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}: line {number}: not JSON ({error.msg} at column {error.colno}); "
                    "expected one object a line"
                ) from error
            yield _text_field(record, path, f"line {number}")
        offset += len(content) + 1


def _text_field(record: Any, path: Path, place: str) -> str:
    """Return ``record["text"]``, or say what stands there instead."""
    if not isinstance(record, dict) or "text" not in record:
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{path}: {place}: no text field (found: {found or 'nothing'})")
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError(f"{path}: {place}: text is {type(text).__name__}, expected a string")
    return text


def _read_parquet(path: Path) -> Iterator[str]:
    """Yield the rows of the ``text`` column."""
    require("pyarrow")
    parquet = require("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise ValueError(f"{path}: no text column (found: {', '.join(columns)})")
            rows = file.read(columns=["text"]).column("text").to_pylist()
    except require("pyarrow").ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
    for number, text in enumerate(rows):
        yield _text_field({"text": text}, path, f"row {number}")
