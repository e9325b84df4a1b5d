"""The manifest of a log-prob store: which tokenizer, corpora and experts it knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from robustgate.lm.files import exclusive, read_json, write_json

FORMAT = "robustgate log-prob store"
VERSION = 1


@dataclass(frozen=True)
class CorpusEntry:
    """What the manifest says about a corpus.

    Attributes:
        sha256: hash of the documents.
        documents: n_docs.
        tokens: number of scored tokens (every token but the BOS of each document).
        window: tokens a model reads at once.
        stride: by how many tokens the window moves along a longer document.
        slice_tokens: tokens in one shard, up to the end of its last document.
    """

    sha256: str
    documents: int
    tokens: int
    window: int
    stride: int
    slice_tokens: int


@dataclass(frozen=True)
class ExpertEntry:
    """What the manifest says about an expert.

    Attributes:
        sha256: hash of its configuration and weights.
        dtype: type its weights were converted to, such as ``"bfloat16"``; ``None`` for their own.
    """

    sha256: str
    dtype: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        tokenizer_sha256: hash of the tokenizer all log-probabilities belong to.
        corpora: by name.
        experts: by name.
        joint: sorted names of experts with features of their own as a set, by the name of the
            folder that holds these.
        compared: which of ``experts`` are models that experts are only compared with, and for each
            the hashes of the experts it was made from, by name: of a soup its members, of a
            monolith none.
    """

    tokenizer_sha256: str
    corpora: dict[str, CorpusEntry]
    experts: dict[str, ExpertEntry]
    joint: dict[str, list[str]]
    compared: dict[str, dict[str, str]] = field(default_factory=dict)

    def corpus(self, name: str) -> CorpusEntry:
        """Return the entry of a corpus, or raise ``ValueError`` with the names there are."""
        if name not in self.corpora:
            known = ", ".join(sorted(self.corpora)) or "none"
            raise ValueError(f"no corpus {name!r} in this store; it has: {known}")
        return self.corpora[name]

    def expert(self, name: str) -> ExpertEntry:
        """Return the entry of an expert, or raise ``ValueError`` with the names there are."""
        if name not in self.experts:
            known = ", ".join(sorted(self.experts)) or "none"
            raise ValueError(f"no expert {name!r} in this store; it has: {known}")
        return self.experts[name]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a store.

    Args:
        folder: the store.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: the folder holds no store.
        ValueError: the manifest is damaged, or of a version this release does not read.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: not a log-prob store (no manifest.json)")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not the manifest of a {FORMAT}")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {content.get('version')}, but this release reads version {VERSION}; "
            "upgrade robustgate, or score into a new store"
        )
    try:
        return Manifest(
            content["tokenizer_sha256"],
            {name: CorpusEntry(**entry) for name, entry in content["corpora"].items()},
            {name: ExpertEntry(**entry) for name, entry in content["experts"].items()},
            {name: list(experts) for name, experts in content.get("joint", {}).items()},
            {name: dict(members) for name, members in content.get("compared", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: damaged ({error}); restore it from a copy, or score into a new store"
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a store atomically."""
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    if not manifest.compared:  # as in stores of earlier versions
        del content["compared"]
    write_json(folder / "manifest.json", content)


@contextmanager
def change_manifest(folder: Path) -> Iterator[Manifest]:
    """Let one process at a time change the manifest.

    Args:
        folder: the store.

    Yields:
        The manifest as it is now; changes to its mappings are written when the block ends
        without an error.
    """
    with exclusive(folder / "manifest.lock"):
        manifest = read_manifest(folder)
        before = asdict(manifest)
        yield manifest
        if asdict(manifest) != before:
            write_manifest(folder, manifest)


def check_same(place: str, what: str, stored: object, given: object, remedy: str) -> None:
    """Raise ``ValueError`` with both values and the remedy unless they are equal."""
    if stored != given:
        raise ValueError(f"{place}: {what} is {stored} in the store but {given} here; use {remedy}")
