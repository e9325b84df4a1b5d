"""Sampling from a gated mixture of experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from robustgate.game.constant_gate import ConstantGate
from robustgate.game.documents import Documents, concatenate

Sampler = Callable[[int, torch.Generator], Documents]

_CANDIDATES_PER_DRAW: Final = 4  # of sampling-importance-resampling, unless asked otherwise
_ROUNDS: Final = 1000  # in a row without one accepted document before giving up


@dataclass(frozen=True, eq=False)
class Sample:
    """Documents drawn from a gated mixture, and what they cost.

    Attributes:
        documents: the draws, without weights.
        experts: which expert each was drawn from, int64 ``[n]``.
        candidates: documents drawn from experts in all.
        acceptance_rate: share of candidates accepted; ``Z_g / K`` in expectation for rejection, 1
            for a constant gate, and 1 for ``"sir"``, where every candidate is weighed.
        effective_sample_size: of the candidates; ``(sum w)^2 / sum w^2`` for ``"sir"``, the number
            of draws where they are exact and independent.
    """

    documents: Documents
    experts: Tensor
    candidates: int
    acceptance_rate: float
    effective_sample_size: float


def sample(
    gate: nn.Module,
    samplers: Sequence[Sampler],  # K
    count: int,
    *,
    method: Literal["rejection", "sir"] = "rejection",
    candidates: int | None = None,
    seed: int = 0,
) -> Sample:
    """Draw documents from ``pi_g / Z_g``, ``pi_g(x) = sum_k g(x, k) pi_k(x)``.

    ``"rejection"`` is exact: draw k uniformly and x from expert k, accept with probability
    ``g(x, k)``. Of all candidates ``Z_g / K`` are accepted. A :class:`ConstantGate` draws k from
    its weights instead and accepts everything.

    ``"sir"`` (sampling, importance resampling) is approximate: draw ``candidates`` documents,
    equally many from each expert, and choose among them, with replacement, in proportion to
    ``w = pi_g / q``, ``q = mean_k pi_k``. As ``w <= K``, no few candidates take it all; the
    effective sample size says how many independent draws they are worth.

    Args:
        gate: maps inputs to normalised log-weights ``[..., K]``.
        samplers: for each expert, a function of a number of documents and a ``torch.Generator``
            that returns so many :class:`Documents` drawn from it, with their log-probabilities
            under all experts. See :func:`finite_samplers` for finite spaces.
        count: documents to draw.

    Other:
        method: see above.
        candidates: for ``"sir"``, rounded up to a multiple of K; ``4 count`` by default.
        seed: of the generator; the result is deterministic for a seed.

    Returns:
        A :class:`Sample`.

    Raises:
        ValueError: ``count``, ``method`` or ``candidates`` out of range, another number of samplers
            than of experts, or a sampler that returns other documents than asked for.
        RuntimeError: nothing accepted in a thousand rounds in a row.

    Example:
        >>> import torch
        >>> from robustgate.game import Documents, SequenceGate, finite_samplers, sample
        >>> probs = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])  # two experts, three points
        >>> space = Documents(torch.eye(3), probs.log().T)
        >>> drawn = sample(SequenceGate.linear(3, 2), finite_samplers(space), 1000)
        >>> len(drawn.documents), 0.45 < drawn.acceptance_rate < 0.55  # Z = 1, K = 2
        (1000, True)

    Source: docs/theory.md, "Sampling".
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if not samplers:
        raise ValueError("samplers: expected one per expert, got none")
    generator = torch.Generator().manual_seed(seed)
    if method == "rejection":
        if isinstance(gate, ConstantGate):
            return _choose_experts(gate, samplers, count, generator)
        return _reject(gate, samplers, count, generator)
    if method != "sir":
        raise ValueError(f'method: expected "rejection" or "sir", got {method!r}')
    total = _CANDIDATES_PER_DRAW * count if candidates is None else candidates
    if total < 1:
        raise ValueError(f"candidates: expected at least 1, got {candidates}")
    return _resample(gate, samplers, count, math.ceil(total / len(samplers)), generator)


def finite_samplers(space: Documents) -> list[Sampler]:  # K
    """Return samplers of experts on a finite space.

    Args:
        space: every document once, with its log-probabilities ``[X, K]``: column k, exponentiated,
            sums to 1.

    Returns:
        For each expert a function of a number and a ``torch.Generator``, as :func:`sample` takes.

    Raises:
        ValueError: a column that does not sum to 1.

    Example:
        >>> import torch
        >>> from robustgate.game import Documents, finite_samplers
        >>> probs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # each expert knows one document
        >>> first, second = finite_samplers(Documents(torch.eye(2), probs.log().T))
        >>> second(3, torch.Generator()).inputs[:, 1]
        tensor([1., 1., 1.])
    """
    probs = space.log_probs.to(torch.float64).exp().T  # [K, X]
    total = probs.sum(dim=1)
    if not bool(((total - 1.0).abs() <= 1e-5).all()):  # float32 columns pass
        raise ValueError(f"space: expected columns that sum to 1, got {total.tolist()}")

    def sampler(expert: Tensor) -> Sampler:  # [X]
        def draw(count: int, generator: torch.Generator) -> Documents:
            return space[torch.multinomial(expert, count, replacement=True, generator=generator)]

        return draw

    return [sampler(expert) for expert in probs]


def _choose_experts(
    gate: ConstantGate, samplers: Sequence[Sampler], count: int, generator: torch.Generator
) -> Sample:
    weights = torch.softmax(gate.logits.detach(), dim=0).cpu()
    _check_experts(weights, samplers)
    experts = torch.multinomial(weights, count, replacement=True, generator=generator)
    documents = _draw(samplers, experts, generator)
    return Sample(documents, experts, count, 1.0, float(count))


def _reject(
    gate: nn.Module, samplers: Sequence[Sampler], count: int, generator: torch.Generator
) -> Sample:
    accepted: list[Documents] = []
    experts: list[Tensor] = []
    found = candidates = barren = 0
    while found < count:
        proposed = torch.randint(len(samplers), (count,), generator=generator)  # [count]
        documents = _draw(samplers, proposed, generator)
        with torch.no_grad():
            log_weights = gate(documents.inputs).cpu()  # [count, K]
        _check_experts(log_weights, samplers)
        chosen = log_weights.gather(1, proposed.unsqueeze(1)).squeeze(1).exp()  # [count]
        kept = (torch.rand(count, generator=generator) < chosen).nonzero().flatten()
        candidates += count
        barren = 0 if len(kept) else barren + 1
        if barren == _ROUNDS:
            raise RuntimeError(f"sample: {found} documents accepted among {candidates}")
        if len(kept):
            accepted.append(documents[kept])
            experts.append(proposed[kept])
            found += len(kept)
    first = torch.arange(count)
    drawn = concatenate(accepted)[first]
    return Sample(drawn, torch.cat(experts)[first], candidates, found / candidates, float(count))


def _resample(
    gate: nn.Module, samplers: Sequence[Sampler], count: int, each: int, generator: torch.Generator
) -> Sample:
    experts = torch.arange(len(samplers)).repeat_interleave(each)
    documents = _draw(samplers, experts, generator)
    with torch.no_grad():
        weights = documents.ratio(gate).cpu()  # [K each]
    size = float(weights.sum() ** 2 / weights.square().sum())
    rows = torch.multinomial(weights, count, replacement=True, generator=generator)
    return Sample(documents[rows], experts[rows], len(experts), 1.0, size)


def _check_experts(weights: Tensor, samplers: Sequence[Sampler]) -> None:  # [..., K]
    if weights.shape[-1] != len(samplers):
        raise ValueError(
            f"samplers: expected one for each of the gate's {weights.shape[-1]} experts, "
            f"got {len(samplers)}"
        )


def _draw(
    samplers: Sequence[Sampler],
    experts: Tensor,  # int [n]
    generator: torch.Generator,
) -> Documents:
    """Draw one document from each expert listed, in the order listed."""
    parts, rows = [], []
    for k, sampler in enumerate(samplers):
        row = (experts == k).nonzero().flatten()
        if len(row) == 0:
            continue
        part = sampler(len(row), generator)
        if len(part) != len(row):
            raise ValueError(f"samplers[{k}]: asked for {len(row)} documents, got {len(part)}")
        if part.log_probs.shape[1] != len(samplers):
            raise ValueError(
                f"samplers[{k}]: expected log-probabilities under {len(samplers)} experts, one for "
                f"each sampler, got {part.log_probs.shape[1]}"
            )
        parts.append(part)
        rows.append(row)
    return concatenate(parts)[torch.cat(rows).argsort()]
