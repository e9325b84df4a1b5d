"""Cut the demo's text into documents and split them by source into train, valid and test."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from robustgate.demo.text import DOMAINS, Reader

SHARES = {"train": 0.5, "valid": 0.25, "test": 0.25}
"""How the text of a domain is divided among the splits, until one has enough."""

LARGEST_SOURCE = 16_000
"""Characters taken from one source at most, so that no split hangs on a few."""


@dataclass(frozen=True)
class DomainText:
    """The documents of one domain, by split.

    Attributes:
        name: Domain.
        documents: Split (``train``, ``valid``, ``test``) to its documents.
        sources: Split to the sources its documents come from; no source is in two splits.
    """

    name: str
    documents: Mapping[str, tuple[str, ...]]
    sources: Mapping[str, frozenset[str]]


def read_domains(
    characters: Mapping[str, int],
    *,
    seed: int = 0,
    document_size: int = 1200,
    readers: Mapping[str, Reader] = DOMAINS,
) -> tuple[DomainText, ...]:
    """Read every domain this installation carries, without duplicates.

    Sources are taken in an order drawn from ``seed`` until a domain has enough. Each goes as a
    whole to the split that is furthest behind its share, the same split in every domain that
    uses it. A paragraph that occurred before, in any domain, is dropped. Where text is scarce the
    splits for validation and test are filled before the one for training.

    Args:
        characters: Characters wanted per domain, by split. A domain with less than an eighth of
            them in any split is left out.
        seed: Order of the sources.
        document_size: Characters at which a document ends, at the next end of a paragraph.
        readers: Domain to reader.

    Returns:
        At least three domains.

    Raises:
        RuntimeError: The installation carries fewer than three domains.

    Example:
        >>> domains = read_domains({"train": 9_000, "valid": 3_000, "test": 3_000})
        >>> [domain.name for domain in domains]
        ['python', 'docstrings', 'manual', 'unicode', 'cpp']
    """
    seen: set[bytes] = set()
    split_of: dict[str, str] = {}
    domains = []
    for name, reader in readers.items():
        domain = _read_domain(name, reader, characters, seed, document_size, seen, split_of)
        found = {split: sum(map(len, texts)) for split, texts in domain.documents.items()}
        if all(found[split] >= wanted / 8 for split, wanted in characters.items()):
            domains.append(domain)
    if len(domains) < 3:
        names = ", ".join(domain.name for domain in domains) or "none"
        raise RuntimeError(
            f"the demo needs text of three domains, and this Python installation carries {names}; "
            "install the complete standard library, or train on files of your own with "
            "`robustgate train`"
        )
    return tuple(domains)


def cut(text: str, size: int) -> Iterator[str]:
    """Cut a text into documents of about ``size`` characters.

    A document ends at the first blank line after ``size`` characters, or at the first line after
    a quarter more. A remainder below a quarter of ``size`` is dropped.
    """
    lines: list[str] = []
    length = 0
    for line in text.split("\n"):
        if length >= (size if not line.strip() else 1.25 * size):
            yield "\n".join(lines).strip("\n")
            lines, length = [], 0
        lines.append(line)
        length += len(line) + 1
    if length > size / 4:
        yield "\n".join(lines).strip("\n")


def _read_domain(
    name: str,
    reader: Reader,
    characters: Mapping[str, int],
    seed: int,
    document_size: int,
    seen: set[bytes],
    split_of: dict[str, str],
) -> DomainText:
    documents: dict[str, list[str]] = {split: [] for split in SHARES}
    sources: dict[str, set[str]] = {split: set() for split in SHARES}
    taken = dict.fromkeys(SHARES, 0)
    for source, text in reader(random.Random(seed)):
        missing = {split: characters[split] - taken[split] for split in SHARES}
        open_splits = [split for split in SHARES if missing[split] > 0]
        if not open_splits:
            break
        split = split_of.get(source) or min(open_splits, key=lambda s: taken[s] / SHARES[s])
        room = min(missing[split], LARGEST_SOURCE)
        for document in cut(_unseen(text, seen), document_size):
            if room <= 0:
                break
            room -= len(document)
            taken[split] += len(document)
            documents[split].append(document)
            sources[split].add(source)
            split_of[source] = split
    return DomainText(
        name,
        {split: tuple(found) for split, found in documents.items()},
        {split: frozenset(found) for split, found in sources.items()},
    )


def _unseen(text: str, seen: set[bytes]) -> str:
    """Return the paragraphs of ``text`` that are not in ``seen``, and add them to it."""
    fresh = []
    for paragraph in text.replace("\f", "").split("\n\n"):
        key = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
        if paragraph.strip() and key not in seen:
            seen.add(key)
            fresh.append(paragraph.strip("\n"))
    return "\n\n".join(fresh)
