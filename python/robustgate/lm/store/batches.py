"""Reading a log-prob store a run of documents at a time, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustgate.lm.store.features import FeatureSpec, assemble
from robustgate.lm.store.log_probs import LogProbStore
from robustgate.lm.store.shards import Shard
from robustgate.lm.store.tensorfile import DamagedFileError


@dataclass(frozen=True, eq=False)
class Batch:
    """Some documents of a corpus, end to end.

    Attributes:
        log_probs: Log-probability that each expert gives each token, float32 ``[T, K]``.
        offsets: Where each document starts, int64 ``[n + 1]``, from 0 to T.
        features: What is known before each token, float32 ``[T, F]``; ``None`` if not asked for.
    """

    log_probs: Tensor
    offsets: Tensor
    features: Tensor | None

    def sum(self, values: Tensor) -> Tensor:  # [T, ...] -> [n, ...]
        """Return the sum of each document's tokens, float64."""
        lengths = self.offsets.diff()
        document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # [T]
        out = torch.zeros(len(lengths), *values.shape[1:], dtype=torch.float64)
        return out.index_add_(0, document, values.double())

    def first(self, documents: int) -> Batch:
        """Return the batch of the first documents."""
        offsets = self.offsets[: documents + 1]
        end = int(offsets[-1])
        return Batch(
            self.log_probs[:end], offsets, None if self.features is None else self.features[:end]
        )


def read_batches(
    store: LogProbStore,
    corpus: str,
    experts: Sequence[str],
    features: FeatureSpec | None = None,
    *,
    among: int | None = None,
) -> Iterator[Batch]:
    """Read a corpus one slice of the store at a time.

    Args:
        store: The store.
        corpus: Name of a corpus in it.
        experts: Names in the store, in the order of the columns.
        features: What to read for each token besides the log-probabilities.

    Other:
        among: How many of ``experts``, from the first, the features are of; all if left out.

    Yields:
        The documents, in their order; a batch has the tokens of one slice.

    Raises:
        ValueError: An unknown name, or scores that are missing or damaged.
    """
    known = _features(store, corpus, experts[:among], features)
    columns = [store.shards(name, corpus) for name in experts]
    for slices in zip(*columns, strict=True):
        log_probs = torch.stack([_read(shard) for shard in slices], dim=1)
        offsets = slices[0].offsets - slices[0].rows.start
        yield Batch(log_probs, offsets, None if known is None else next(known))


def _features(
    store: LogProbStore,
    corpus: str,
    experts: Sequence[str],
    spec: FeatureSpec | None,
) -> Iterator[Tensor] | None:  # [T, F] each
    """Return the features of one slice after the other; ``None`` if none are asked for."""
    if spec is None or not spec.width(len(experts)):
        return None
    own = [[store.shards(name, corpus, kind) for kind in spec.kinds] for name in experts]
    joint = store.joint_shards(experts, corpus) if spec.jsd else None
    return (
        assemble(
            spec,
            [{shards[i].kind: _read(shards[i]) for shards in kinds} for kinds in own],
            None if joint is None else _read(joint[i]),
            (place.tokens,),
        )
        for i, place in enumerate(store.shards(experts[0], corpus))
    )


def _read(shard: Shard) -> Tensor:
    try:
        return shard.read()
    except (FileNotFoundError, DamagedFileError) as error:
        raise ValueError(
            f"{error}; score {', '.join(shard.experts)} on corpus {shard.corpus!r} again, which "
            "fills in what is missing or damaged and keeps the rest"
        ) from error


def first_documents(
    store: LogProbStore,
    corpus: str,
    experts: Sequence[str],
    documents: int,
    features: FeatureSpec | None = None,
) -> Batch:
    """Read the first documents of a corpus, all of them if it has fewer.

    Args:
        store: The store.
        corpus: Name of a corpus in it.
        experts: Names in the store, in the order of the columns.
        documents: How many, at least 1.
        features: As for ``read_batches``.
    """
    parts: list[Batch] = []
    missing = documents
    for batch in read_batches(store, corpus, experts, features):
        parts.append(batch.first(missing))
        missing -= len(parts[-1].offsets) - 1
        if missing == 0:
            break
    known = [part.features for part in parts if part.features is not None]
    lengths = torch.cat([part.offsets.diff() for part in parts])
    return Batch(
        torch.cat([part.log_probs for part in parts]),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        torch.cat(known) if known else None,
    )
