"""How far experts are apart as distributions of whole documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustgate.game.certificate import check_distribution
from robustgate.game.documents import Documents
from robustgate.game.priors import uniform_prior
from robustgate.ops.mixture_log_prob import mixture_log_prob


@dataclass(frozen=True)
class SequenceDivergence:
    """A Jensen-Shannon divergence of document distributions, estimated from samples.

    Attributes:
        value: in nats per document; between 0 and the entropy of the weights but for sampling.
        standard_error: of ``value``, from the variances within each expert's samples.
    """

    value: float
    standard_error: float


def sequence_jsd(
    samples: Sequence[Documents],  # K
    weights: Tensor | None = None,  # [K]
) -> SequenceDivergence:
    """Estimate the Jensen-Shannon divergence between experts as distributions of documents.

        JSD_w(pi) = sum_k w_k E_{x ~ pi_k}[ log pi_k(x) - log pi_w(x) ],  pi_w = sum_k w_k pi_k

    Between the experts' next-token distributions :func:`robustgate.jsd` is exact; over whole
    documents there is no sum to take, but samples of each expert give an unbiased estimate. The
    largest over all weights is :func:`expert_capacity`.

    Args:
        samples: K sets of documents, the k-th drawn from expert k, each of at least two; of any
            sizes.
        weights: w, ``[K]`` floating point, sums to 1; uniform if left out.

    Returns:
        A :class:`SequenceDivergence`.

    Raises:
        TypeError: ``weights`` is not a tensor.
        ValueError: not one set per expert, fewer than two documents in one, or weights that are no
            distribution.

    Example:
        >>> import torch
        >>> from robustgate.game import Documents, sequence_jsd
        >>> far = torch.tensor([[0.0, -50.0]] * 2)  # each document all but excludes the other
        >>> drawn = [Documents(torch.zeros(2, 1), far), Documents(torch.zeros(2, 1), far.flip(1))]
        >>> round(sequence_jsd(drawn).value, 4)  # log 2
        0.6931

    Source: docs/theory.md, "Diagnostics".
    """
    experts = samples[0].log_probs.shape[1] if samples else 0
    sizes = [len(drawn) for drawn in samples]
    if len(samples) != experts or experts == 0 or min(sizes) < 2:
        raise ValueError(
            "samples: expected one set per expert, each of at least 2 documents, got sizes "
            f"{sizes} for {experts} experts"
        )
    w = (
        uniform_prior(experts)
        if weights is None
        else check_distribution("weights", weights, experts)
    )
    value, variance = 0.0, 0.0
    for k, drawn in enumerate(samples):
        if w[k] == 0:
            continue
        log_probs = drawn.log_probs.detach().to("cpu", torch.float64)  # [n, K]
        ratio = log_probs[:, k] - mixture_log_prob(log_probs, w.log())  # [n]
        value += float(w[k] * ratio.mean())
        variance += float(w[k].square() * ratio.var() / len(ratio))
    return SequenceDivergence(value, math.sqrt(variance))
