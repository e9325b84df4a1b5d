"""Gates of every kind on packed documents: their weights, and the losses of their mixtures."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustgate.game import BayesGate, SequenceGate, TokenGate
from robustgate.lm.gates.spec import Gate, document_features
from robustgate.lm.store.batches import Batch
from robustgate.lm.store.windows import plan_batches
from robustgate.ops import mixture_log_prob

_PADDED = 1 << 14
"""Tokens of a padded batch that a learned gate reads at once."""


@torch.inference_mode()
def gate_weights(
    gate: BayesGate | TokenGate,
    batch: Batch,
) -> Tensor:  # [T, K]
    """Return a causal gate's log-weights before each token of packed documents.

    Args:
        gate: The gate.
        batch: Documents; its columns are the gate's experts.

    Returns:
        float64 ``[T, K]``.

    Raises:
        ValueError: The gate reads features and the batch has none.
    """
    if isinstance(gate, BayesGate):
        weights: Tensor = gate(batch.log_probs, offsets=batch.offsets)
        return weights
    if gate.context and batch.features is None:
        raise ValueError(f"features: the gate reads {gate.context} for each token, got none")
    out = torch.empty(batch.log_probs.shape, dtype=torch.float64)
    for _, place, mask in _padded(batch):
        context = batch.features[place] if gate.context and batch.features is not None else None
        weights = gate(batch.log_probs[place], context=context, mask=mask)
        out[place[mask]] = weights[mask]
    return out


@torch.inference_mode()
def token_log_probs(
    gate: BayesGate | TokenGate,
    batch: Batch,
) -> Tensor:  # [T]
    """Return the log-probability of each token under a causal gate's mixture, float64 ``[T]``."""
    return mixture_log_prob(batch.log_probs.double(), gate_weights(gate, batch))


@torch.inference_mode()
def document_log_probs(
    gate: Gate,
    batch: Batch,
    *,
    span: int | None = None,
    log_normaliser: float = 0.0,
) -> Tensor:  # [n]
    """Return the log-probability of each document under a gate's mixture.

        BayesGate, TokenGate    sum_t log sum_k gamma_k(x_<t) pi_k(x_t | x_<t)
        SequenceGate            log sum_k g(x, k) pi_k(x) - log Z_g

    Args:
        gate: A gate of any kind.
        batch: Documents; its columns are the gate's experts.

    Other:
        span: Tokens of a document that a sequence gate looks at.
        log_normaliser: ``log Z_g`` of a sequence gate.

    Returns:
        float64 ``[n]``.
    """
    if isinstance(gate, SequenceGate):
        weights = sequence_weights(gate, batch, span)
        return mixture_log_prob(batch.sum(batch.log_probs), weights) - log_normaliser
    if isinstance(gate, BayesGate) and is_exact(gate):
        return mixture_log_prob(batch.sum(batch.log_probs), gate.log_prior)
    return batch.sum(token_log_probs(gate, batch))


@torch.inference_mode()
def sequence_weights(
    gate: SequenceGate,
    batch: Batch,
    span: int | None,
) -> Tensor:  # [n, K]
    """Return the log-weights that a sequence gate gives each document, float64 ``[n, K]``."""
    out = torch.empty(len(batch.offsets) - 1, batch.log_probs.shape[1], dtype=torch.float64)
    for documents, place, mask in _padded(batch, span):
        features = document_features(batch.log_probs[place], mask, mask.shape[1])
        out[documents] = gate(features).double()
    return out


def is_exact(gate: BayesGate) -> bool:
    """Return whether a gate is Bayes without any option, whose mixture has a closed form."""
    everything = gate.top_k in (None, len(gate.log_prior))
    return everything and gate.window is None and gate.share == 0.0 and gate.power == 1.0


def _padded(batch: Batch, span: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield documents ``[b]`` of similar length, their tokens' rows ``[b, W]``, and a mask."""
    lengths = batch.offsets.diff()  # [n]
    lengths = lengths if span is None else lengths.clamp(max=span)
    for documents in plan_batches(lengths, _PADDED):
        position = torch.arange(int(lengths[documents].max()))
        mask = position < lengths[documents].unsqueeze(1)  # [b, W]
        place = (batch.offsets[documents].unsqueeze(1) + position) * mask
        yield documents, place, mask
