"""Priors estimated from posteriors of documents seen before, as published for DEMix.

The robust prior and the maximum-likelihood prior are better founded; these are here to compare
with, and because the updating one needs no pass over data of its own.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
from torch import Tensor

from robustgate.game.certificate import check_distribution

CACHED_DOCUMENTS: Final = 100  # documents behind a cached prior, as published


def uniform_prior(experts: int) -> Tensor:  # [K]
    """Return ``1 / K`` for each expert: within ``log K`` nats of every one of them per document.

    Example:
        >>> from robustgate.game import uniform_prior
        >>> uniform_prior(2)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    if experts < 1:
        raise ValueError(f"experts: expected at least 1, got {experts}")
    return torch.full((experts,), 1.0 / experts, dtype=torch.float64)


def updating_prior(
    log_probs: Tensor,  # [n, K]
    *,
    rate: float = 0.3,
    prior: Tensor | None = None,  # [K]
) -> Tensor:  # [n + 1, K]
    """Return the prior in force before each document: a moving average of posteriors so far.

        posterior_i = softmax(log prior_i + L_i)
        prior_1 = posterior_0,   prior_{i+1} = (1 - rate) prior_i + rate posterior_i

    An exponentially weighted mean that starts at its first value, as ``ewm(alpha=rate,
    adjust=False)`` in pandas. Posteriors are the exact ones, of whole documents; the released DEMix
    code takes that of the last token alone.

    Args:
        log_probs: ``log pi_k(x)`` of the documents, in the order they come, ``[n, K]``.

    Other:
        rate: weight of the newest posterior, in (0, 1].
        prior: before the first document, ``[K]``; uniform by default.

    Returns:
        ``[n + 1, K]`` float64: row i is in force before document i, the last row after all.

    Raises:
        TypeError: ``log_probs`` is not a floating point tensor.
        ValueError: wrong shape, ``rate`` out of range, or a document that is impossible, or NaN,
            under every expert of the prior in force.

    Example:
        >>> import torch
        >>> from robustgate.game import updating_prior
        >>> updating_prior(torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log())[1]
        tensor([0.9000, 0.1000], dtype=torch.float64)

    Source: Gururangan et al., "DEMix Layers" (2022).
    """
    documents = _check(log_probs)
    experts = documents.shape[1]
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"rate: expected a number in (0, 1], got {rate}")
    current = uniform_prior(experts)
    if prior is not None:
        current = check_distribution("prior", prior, experts)
    priors = [current]
    for i, document in enumerate(documents):
        posterior = torch.softmax(current.log() + document, dim=0)
        if bool(posterior.isnan().any()):
            raise ValueError(
                f"log_probs, document {i}: expected a positive probability under the prior in "
                f"force, got log-probabilities {document.tolist()} under {current.tolist()}"
            )
        current = posterior if len(priors) == 1 else torch.lerp(current, posterior, rate)
        priors.append(current)
    return torch.stack(priors)


def cached_prior(
    log_probs: Tensor,  # [n, K]
    *,
    rate: float = 0.3,
    documents: int = CACHED_DOCUMENTS,
    average: Literal["moving", "powers"] = "moving",
) -> Tensor:  # [K]
    """Return the prior of a domain from its first documents, to be kept from then on.

    ``average="moving"`` is the last row of :func:`updating_prior`, what the released code does:
    about six documents count. ``"powers"`` is the published formula to the letter,
    ``sum_i rate^i posterior_i / normaliser`` over documents i = 1, 2, ... with uniform priors: its
    first document has 70% of the weight.

    Args:
        log_probs: ``log pi_k(x)`` of development documents, ``[n, K]``.

    Other:
        rate: as in :func:`updating_prior`.
        documents: how many are read, from the first.
        average: which reading of the published formula.

    Returns:
        ``[K]`` float64.

    Raises:
        TypeError, ValueError: as :func:`updating_prior`, and where there is no document.

    Example:
        >>> import torch
        >>> from robustgate.game import cached_prior
        >>> posteriors = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        >>> cached_prior(posteriors.log(), average="powers")  # (.9 * .3 + .1 * .09) / .39
        tensor([0.7154, 0.2846], dtype=torch.float64)

    Source: as :func:`updating_prior`.
    """
    if average not in ("moving", "powers"):
        raise ValueError(f'average: expected "moving" or "powers", got {average!r}')
    checked = _check(log_probs)
    if documents < 1 or len(checked) == 0:
        raise ValueError(f"documents: expected at least 1, got {documents} of {len(checked)}")
    checked = checked[:documents]
    moving = updating_prior(checked, rate=rate)  # [n + 1, K]; checks the rate too
    if average == "moving":
        return moving[-1]
    steps = torch.arange(len(checked), dtype=torch.float64)
    powers = torch.softmax(steps * math.log(rate), dim=0)
    return powers @ torch.softmax(checked, dim=1)


def _check(log_probs: Tensor) -> Tensor:  # [n, K]
    if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
        kind = log_probs.dtype if isinstance(log_probs, Tensor) else type(log_probs).__name__
        raise TypeError(f"log_probs: expected a floating point tensor [n, K], got {kind}")
    if log_probs.dim() != 2 or log_probs.shape[1] == 0:
        raise ValueError(f"log_probs: expected shape [n, K], got {tuple(log_probs.shape)}")
    return log_probs.detach().to("cpu", torch.float64)
