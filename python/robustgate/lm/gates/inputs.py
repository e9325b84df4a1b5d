"""What a token gate reads of documents, worked out once: training then touches its network alone.

A token gate is ``log softmax(log w(t) + head(network(features(t))))``. The Bayes weights ``w`` and
the features do not change in training, and knowing them at every token, a network of single tokens
can be trained on tokens in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from robustgate.game import TokenGate
from robustgate.lm.store.batches import read_batches
from robustgate.lm.store.features import FeatureSpec
from robustgate.lm.store.log_probs import LogProbStore
from robustgate.ops.mixture_log_prob import mixture_log_prob

HELD_OUT: Final = 0.25
"""Share of each domain's documents that judges the gate."""

TOKENS: Final = 1 << 19
"""Tokens of a domain that a gate is trained on and judged by, at most."""

LONGEST: Final = 1 << 12
"""Tokens of one document that a token gate is trained on or judged by, from its start."""

_PADDED: Final = 1 << 18  # tokens in one padded batch
_PAIRS: Final = 1 << 25  # pairs of tokens in one padded batch, for networks with attention


@dataclass(frozen=True, eq=False)
class Packed:
    """Documents of one domain, one behind the other.

    Attributes:
        log_probs: of the experts, float32 ``[N, K]``.
        context: features, float32 ``[N, F]``; F may be 0.
        offsets: document i has the rows ``offsets[i]`` to ``offsets[i + 1]``, int64 ``[n + 1]``.
    """

    log_probs: Tensor
    context: Tensor
    offsets: Tensor

    @classmethod
    def read(
        cls,
        store: LogProbStore,
        corpus: str,
        experts: Sequence[str],
        features: FeatureSpec,
        *,
        tokens: int,
        longest: int,
        seed: int = 0,
    ) -> Packed:
        """Read documents of a corpus from a store, one slice of it in memory at a time.

        Args:
            store: holds scores and features.
            corpus: its name.
            experts: K names.
            features: which.
            tokens: read whole documents, chosen at random, until there are so many, and two
                documents at least.
            longest: tokens that are kept of a document, from its start.
            seed: of the choice.
        """
        lengths = store.offsets(corpus).diff()  # [n]
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
        within = int((lengths[order].clamp(max=longest).cumsum(0) <= tokens).sum())
        chosen = order[: max(2, within)].sort().values
        parts, first = [], 0
        for batch in read_batches(store, corpus, experts, features):
            count = len(batch.offsets) - 1
            here = chosen[(chosen >= first) & (chosen < first + count)] - first
            context = batch.log_probs[:, :0] if batch.features is None else batch.features
            parts.append(cls(batch.log_probs, context, batch.offsets).choose(here, longest))
            first += count
        return cls.join(parts)

    @classmethod
    def join(cls, parts: Sequence[Packed]) -> Packed:
        """Return the documents of several domains as one."""
        sizes = torch.tensor([0, *(len(part.log_probs) for part in parts)]).cumsum(0)
        ends = [part.offsets[1:] + sizes[d] for d, part in enumerate(parts)]
        return cls(
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.context for part in parts]),
            torch.cat([sizes[:1], *ends]),
        )

    def choose(
        self,
        documents: Tensor,  # int64 [m]
        longest: int,
    ) -> Packed:
        """Return some of the documents, the first ``longest`` tokens of each."""
        lengths = self.offsets.diff()[documents].clamp(max=longest)  # [m]
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
        rows = ragged_rows(self.offsets[:-1][documents], lengths)
        return Packed(self.log_probs[rows], self.context[rows], offsets)

    def split(self, seed: int) -> tuple[Packed, Packed]:
        """Split documents at random into those to train on and the quarter that is held out.

        Raises:
            ValueError: fewer than two documents.
        """
        count = len(self.offsets) - 1
        if count < 2:
            raise ValueError(f"domains: expected at least 2 documents of each, got {count}")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        held_out = max(1, round(HELD_OUT * count))
        longest = int(self.offsets.diff().amax())
        first, last = order[held_out:].sort().values, order[:held_out].sort().values
        return self.choose(first, longest), self.choose(last, longest)


@dataclass(frozen=True, eq=False)
class GateInputs:
    """Documents of one domain as the network of a token gate sees them.

    Attributes:
        log_weights: of the Bayes gate before each token, float64 ``[N, K]``.
        features: all that the network reads, ``[N, F]``.
        log_probs: of the experts, float32 ``[N, K]``.
        offsets: document i has the rows ``offsets[i]`` to ``offsets[i + 1]``, int64 ``[n + 1]``.
    """

    log_weights: Tensor
    features: Tensor
    log_probs: Tensor
    offsets: Tensor

    @classmethod
    def of_each(cls, gate: TokenGate, domains: Mapping[str, Packed]) -> dict[str, GateInputs]:
        """Work out what a gate's network reads of the documents of every domain."""
        joined = cls.of(gate, Packed.join(list(domains.values())))
        sizes = [len(part.log_probs) for part in domains.values()]
        parts = zip(joined.log_weights.split(sizes), joined.features.split(sizes), strict=True)
        return {
            name: cls(log_weights, features, documents.log_probs, documents.offsets)
            for (name, documents), (log_weights, features) in zip(
                domains.items(), parts, strict=True
            )
        }

    @classmethod
    @torch.no_grad()
    def of(cls, gate: TokenGate, documents: Packed) -> GateInputs:
        """Work out what a gate's network reads, whatever the network."""
        probe = TokenGate.linear(gate.bayes, context=gate.context).to(documents.log_probs.device)
        seen: list[Tensor] = []
        hook = probe.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        weights = torch.empty(documents.log_probs.shape, dtype=torch.float64)
        features = torch.empty(len(weights), probe.head.in_features)
        starts, lengths = documents.offsets[:-1], documents.offsets.diff()
        for batch in batches(lengths, pairs=False):
            rows, real = padded_rows(starts[batch], lengths[batch])
            given = documents.context[rows] if gate.context else None
            found = probe(documents.log_probs[rows], context=given, mask=real)
            weights[rows[real]] = found[real]
            features[rows[real]] = seen.pop()[real]
        hook.remove()
        return cls(weights, features, documents.log_probs, documents.offsets)

    def log_prob(
        self,
        gate: TokenGate,
        rows: Tensor,  # int64 [B, T]
        real: Tensor,  # bool [B, T]
    ) -> Tensor:  # [B, T]
        """Return the gate's token log-probabilities on runs of rows, padded."""
        correction = gate.head(gate.network(self.features[rows], real))
        weights = torch.log_softmax(self.log_weights[rows] + correction.double(), dim=-1)
        return mixture_log_prob(self.log_probs[rows].double(), weights)

    def bayes_log_prob(
        self,
        rows: Tensor,  # int64 [...]
    ) -> Tensor:  # [...]
        """Return the token log-probabilities of the Bayes gate within."""
        return mixture_log_prob(self.log_probs[rows].double(), self.log_weights[rows])

    @torch.no_grad()
    def loss(self, gate: TokenGate) -> float:
        """Return the gate's mean NLL per token, whole documents at a time."""
        starts, lengths = self.offsets[:-1], self.offsets.diff()
        total = 0.0
        for batch in batches(lengths, pairs=True):
            rows, real = padded_rows(starts[batch], lengths[batch])
            total -= float(self.log_prob(gate, rows, real)[real].sum())
        return total / len(self.log_probs)


def mean_losses(
    gate: TokenGate, domains: Mapping[str, GateInputs], baseline: Tensor
) -> Tensor:  # [D]
    """Return the mean NLL per token of every domain, less its baseline, float64 ``[D]``."""
    losses = [inputs.loss(gate) for inputs in domains.values()]
    return torch.tensor(losses, dtype=torch.float64) - baseline


def check_baseline(
    names: Iterable[str],  # D
    baseline: Tensor,  # [D]
) -> None:
    """Raise ValueError unless the best single expert has a finite loss on every domain."""
    for name, value in zip(names, baseline.tolist(), strict=True):
        if not math.isfinite(value):
            raise ValueError(
                f"domains: every expert gives some document of domain {name!r} probability 0, so "
                "no single expert has a finite loss there to compare a learned gate with; use "
                'gate="prior"'
            )


def batches(
    lengths: Tensor,  # int64 [n]
    *,
    pairs: bool,
) -> Iterator[Tensor]:  # int64 [B]
    """Yield documents of similar length together, so that no padded batch is large.

    Args:
        lengths: of the documents.
        pairs: bound the pairs of tokens as well, for attention.
    """
    order = lengths.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        room = _PADDED // longest
        if pairs:
            room = min(room, _PAIRS // longest**2)
        yield order[start : start + max(1, room)]
        start += max(1, room)


def ragged_rows(
    starts: Tensor,  # int64 [m]
    lengths: Tensor,  # int64 [m]
) -> Tensor:  # int64 [sum of lengths]
    """Return the rows of runs that start anywhere, one run behind the other."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - before, lengths)


def padded_rows(
    starts: Tensor,  # int64 [B]
    lengths: Tensor,  # int64 [B]
) -> tuple[Tensor, Tensor]:  # int64 [B, T], bool [B, T]
    """Return the rows of runs as a padded batch, and which places are real; padding is row 0."""
    place = torch.arange(int(lengths.amax()))
    real = place < lengths.unsqueeze(1)
    return torch.where(real, starts.unsqueeze(1) + place, 0), real
