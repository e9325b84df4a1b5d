"""How the gate moves along one document that changes its topic."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from robustgate.game import SequenceGate
from robustgate.lm.corpus import Corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import read_json, write_json
from robustgate.lm.gates.weigh import gate_weights, sequence_weights
from robustgate.lm.modular import ModularModel
from robustgate.lm.scoring.score import score
from robustgate.lm.store.batches import first_documents

_FILE = "trace.json"


@dataclass(frozen=True)
class Piece:
    """A stretch of one domain in a mixed document.

    Attributes:
        domain: Where it is from.
        first: Its first token.
        last: One behind its last token.
    """

    domain: str
    first: int
    last: int


@dataclass(frozen=True)
class Trace:
    """Gate weights before every token of a document.

    Attributes:
        experts: Names of the K experts.
        pieces: The document's stretches.
        tokens: Text of its T tokens, the last being the end of the document.
        weights: Gate weights before each token, ``[T][K]``.
    """

    experts: tuple[str, ...]
    pieces: tuple[Piece, ...]
    tokens: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]

    def save(self, folder: Path) -> None:
        """Write ``trace.json`` into the folder of a modular model."""
        write_json(folder / _FILE, asdict(self))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Trace:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: The model was not evaluated.
            ValueError: The file is damaged.
        """
        file = Path(folder) / _FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing; run `robustgate evaluate` first")
        data = read_json(file)
        try:
            return cls(
                tuple(data["experts"]),
                tuple(Piece(**piece) for piece in data["pieces"]),
                tuple(data["tokens"]),
                tuple(tuple(row) for row in data["weights"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); evaluate again") from error


def mixed_document(
    corpora: Sequence[Corpus], *, lengths: Sequence[int] = (300, 600, 1200)
) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Paste the beginnings of documents of several domains together.

    Args:
        corpora: One corpus per domain.

    Other:
        lengths: Characters of each piece, which ends with a line. They double, because a Bayes
            gate must outweigh all its evidence for the piece before.

    Returns:
        The document, and the domain and first character of each piece; the domains are taken at
        equal distances from ``corpora``.
    """
    last = min(len(lengths), len(corpora)) - 1
    text, starts = "", []
    for i, length in enumerate(lengths[: last + 1]):
        corpus = corpora[round(i * (len(corpora) - 1) / max(last, 1))]
        document = max(corpus.documents[:20], key=len)
        end = document.find("\n", length)
        starts.append((corpus.name, len(text)))
        text += (document if end < 0 else document[:end]).strip("\n") + "\n\n"
    return text, tuple(starts)


def trace_gate(
    model: ModularModel, experts: ExpertSet, corpora: Sequence[Corpus], *, progress: bool = True
) -> Trace:
    """Return the weights of a model's gate along a document that changes its topic.

    Args:
        model: The model; a sequence gate's weights are the same at every token.
        experts: Its experts.
        corpora: One corpus per domain, to take the document from.

    Other:
        progress: Show a bar for what takes longer than two seconds.

    Returns:
        The trace; a token belongs to the piece its first character is in.
    """
    text, starts = mixed_document(corpora)
    gate, spec = model.gate(), model.spec
    with TemporaryDirectory() as folder:
        mixed = Corpus.of("mixed", [text])
        store = score(experts, [mixed], folder, features=spec.features, progress=progress)
        batch = first_documents(store, "mixed", experts.names, 1, spec.features)
    if isinstance(gate, SequenceGate):
        weights = sequence_weights(gate, batch, spec.span).expand(len(batch.log_probs), -1).exp()
    else:
        weights = gate_weights(gate, batch).exp()  # [T, K]
    spans = experts.tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )["offset_mapping"]
    begins = [begin for begin, _ in spans] + [len(text)]  # the end of the document is a token too
    edges = [bisect_left(begins, start) for _, start in starts] + [len(begins)]
    pieces = zip(starts, pairwise(edges), strict=True)
    return Trace(
        experts.names,
        tuple(Piece(domain, first, last) for (domain, _), (first, last) in pieces),
        (*(text[begin:end] for begin, end in pairwise(begins)), ""),
        tuple(tuple(row) for row in weights.tolist()),
    )
