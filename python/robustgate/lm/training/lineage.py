"""Which data went into a checkpoint and into its tokenizer, as their training records say.

``train`` and ``train_tokenizer`` leave ``robustgate.json`` beside what they make: name, hash and
sketch of every corpus, and the record of the seed checkpoint. From two such records one can tell
whether one model has seen the other's data, long after the data are gone.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustgate.lm.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from robustgate.lm.corpus import Corpus

MANIFEST = "robustgate.json"
"""Name of the training record in the folder of a checkpoint or of a tokenizer."""

RUN_SETTINGS = "settings.json"
"""Name of what ``train`` leaves in the folder of a run that is not finished."""

SKETCH = 64
"""Documents that a sketch remembers."""


@dataclass(frozen=True)
class Data:
    """A corpus that something was trained on.

    Attributes:
        name: its name.
        sha256: ``Corpus.sha256``.
        sketch: the ``SKETCH`` smallest hashes of single documents, of 16 hexadecimal digits; all
            of them for a smaller corpus, none in a record that has no sketch.
    """

    name: str
    sha256: str
    sketch: tuple[str, ...] = ()

    @classmethod
    def of(cls, corpus: Corpus) -> Data:
        """Describe a corpus."""
        hashes = {hashlib.sha256(text.encode()).hexdigest()[:16] for text in corpus.documents}
        return cls(corpus.name, corpus.sha256, tuple(heapq.nsmallest(SKETCH, hashes)))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Data:
        """Return what ``to_json`` wrote, or the older form without a sketch."""
        return cls(content["name"], content["sha256"], tuple(content.get("sketch", ())))

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a JSON object."""
        return {"name": self.name, "sha256": self.sha256, "sketch": list(self.sketch)}

    def share_in(self, other: Data) -> float | None:
        """Estimate which share of these documents another corpus holds, to the letter.

        The smallest hashes of a corpus are a random sample of its documents. Those of this corpus
        that are not larger than the other sketch reaches stand in that sketch exactly if the other
        corpus holds them.

        Args:
            other: the other corpus.

        Returns:
            0 to 1, or ``None`` if the sketches cannot tell.

        Source:
            A. Z. Broder, On the resemblance and containment of documents, 1997.
        """
        if self.sha256 == other.sha256:
            return 1.0
        reach = max(other.sketch, default="")
        sample = [x for x in self.sketch if x <= reach or len(other.sketch) < SKETCH]
        if not sample or not other.sketch:
            return None
        return len(set(sample) & set(other.sketch)) / len(sample)


@dataclass(frozen=True)
class Origin:
    """What a training record says of one checkpoint; its seed checkpoint has an own ``Origin``.

    Attributes:
        data: the corpora it was trained on; ``None`` if there is no record.
        init: hash of the checkpoint that it started from, if any.
        tokenizer: the corpora that its tokenizer was trained on; ``None`` if there is no record.
    """

    data: tuple[Data, ...] | None
    init: str | None
    tokenizer: tuple[Data, ...] | None


def run_folder(checkpoint: Path) -> Path:
    """Return the hidden folder beside a checkpoint that ``train`` keeps until it is finished."""
    return checkpoint.with_name(f".{checkpoint.name}.run")


def origins(checkpoint: str | os.PathLike[str]) -> list[Origin]:
    """Return where a checkpoint comes from: itself, then its seed, the seed's seed, and so on.

    Args:
        checkpoint: its folder, or that of an unfinished run; nothing but the training record, or
            the settings of the run, is read.

    Returns:
        At least one ``Origin``; the last one has ``data=None`` where the records end before the
        model with random weights.
    """
    return list(_walk(_record(Path(checkpoint))))


def tokenizer_data(
    tokenizer: PreTrainedTokenizerFast | str | os.PathLike[str],
) -> list[dict[str, Any]] | None:
    """Return which corpora a tokenizer was trained on, as JSON; ``None`` if there is no record.

    Args:
        tokenizer: loaded from a folder, or the folder; that of a checkpoint will do.
    """
    folder = tokenizer if isinstance(tokenizer, (str, os.PathLike)) else tokenizer.name_or_path
    if not str(folder):
        return None
    known: list[dict[str, Any]] | None = _record(Path(folder)).get("tokenizer_data")
    return known


def describe(corpora: Sequence[Corpus]) -> list[dict[str, Any]]:
    """Return what a training record says of the corpora, as JSON."""
    return [Data.of(corpus).to_json() for corpus in corpora]


def _record(folder: Path) -> Mapping[str, Any]:
    """Return the training record in a folder; an empty one if there is none that can be read."""
    if folder.match(run_folder(Path("*")).name):
        return {"settings": read_object(folder / RUN_SETTINGS)}
    return read_object(folder / MANIFEST)


def read_object(file: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file; an empty one if the file is missing or something else."""
    try:
        return _object(read_json(file))
    except (OSError, ValueError):
        return {}


def _walk(record: Mapping[str, Any]) -> Iterator[Origin]:
    settings = _object(record.get("settings"))
    data, init = record.get("data", settings.get("data")), settings.get("init")
    init = str(init) if init else None
    yield Origin(_parse(data), init, _parse(record.get("tokenizer_data")))
    if init:
        yield from _walk(_object(record.get("ancestor")))


def _object(content: Any) -> Mapping[str, Any]:
    return content if isinstance(content, dict) else {}


def _parse(data: Any) -> tuple[Data, ...] | None:
    """Return the corpora of a record; ``None`` where it says nothing usable."""
    try:
        corpora = tuple(map(Data.from_json, data)) if isinstance(data, list) else None
    except (KeyError, TypeError, AttributeError):
        return None
    words = [word for part in corpora or () for word in (part.name, part.sha256, *part.sketch)]
    return corpora if all(isinstance(word, str) for word in words) else None
