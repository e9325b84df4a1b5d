"""Why combine experts, in numbers: conflict within one model, divergence between several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustgate.game.bounds import Bounds, bounds
from robustgate.game.documents import Documents
from robustgate.game.robust_prior import RobustPrior, robust_prior
from robustgate.ops.jsd import jsd


@dataclass(frozen=True, eq=False)
class GradientConflict:
    """How far the domains' gradients of one model pull apart.

    Attributes:
        domains: names, in the order of the rows below.
        cosine: ``[D, D]`` float64; 0 with a gradient that vanishes.
        norm: ``[D]`` float64.
    """

    domains: tuple[str, ...]
    cosine: Tensor
    norm: Tensor

    @property
    def negative_share(self) -> float:
        """Share of the pairs of domains with a negative cosine; 0 for a single domain."""
        pairs = torch.triu_indices(len(self.domains), len(self.domains), offset=1)
        values = self.cosine[pairs[0], pairs[1]]
        return float((values < 0).double().mean()) if len(values) else 0.0


def gradient_conflict(
    losses: Mapping[str, Tensor],  # D x []
    parameters: Iterable[Tensor],
) -> GradientConflict:
    """Return the cosines between the gradients of one model's losses on several domains.

    A negative cosine means that a step for one domain undoes progress on the other. Experts trained
    apart have no such pairs: their gradients never meet.

    Args:
        losses: for each domain a scalar loss of the same model, its graph alive.
        parameters: of the model; those that need no gradient are passed over.

    Raises:
        ValueError: no domain, a loss that is no scalar, has no graph or no finite gradient, or no
            parameter that needs one.

    Example:
        >>> import torch
        >>> from robustgate.game import gradient_conflict
        >>> w = torch.zeros(2, requires_grad=True)
        >>> losses = {"a": w[0] + w[1], "b": w[0] - w[1], "c": -w[0]}
        >>> conflict = gradient_conflict(losses, [w])
        >>> round(float(conflict.cosine[0, 2]), 4), round(conflict.negative_share, 4)
        (-0.7071, 0.6667)

    Source: docs/theory.md, "Diagnostics".
    """
    wanted = [p for p in parameters if p.requires_grad]
    if not losses:
        raise ValueError("losses: expected at least one domain, got an empty mapping")
    if not wanted:
        raise ValueError("parameters: expected some that need a gradient, got none")
    gradients = []
    for name, loss in losses.items():
        if loss.dim() != 0:
            raise ValueError(f"losses[{name!r}]: expected a scalar, got {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise ValueError(f"losses[{name!r}]: expected a loss with its graph, got a constant")
        parts = torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True)
        gradient = torch.cat([part.detach().flatten().double() for part in parts])
        if not bool(gradient.isfinite().all()):
            raise ValueError(f"losses[{name!r}]: expected a finite gradient, got inf or NaN")
        gradients.append(gradient)
    matrix = torch.stack(gradients)  # [D, P]
    norm = matrix.norm(dim=1)
    unit = matrix / norm.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)
    cosine = (unit @ unit.T).clamp(-1.0, 1.0)
    return GradientConflict(tuple(losses), cosine.cpu(), norm.cpu())


@dataclass(frozen=True, eq=False)
class Interference:
    """How far the experts are from each other.

    Attributes:
        pairwise: for each domain, the mean JSD between next-token distributions of two experts,
            ``[K, K]`` float64, nats per token, at most ``log 2``.
        together: for each domain, the mean JSD of all K experts, at most ``log K``.
        capacity: of the channel from expert to document, from samples; None without them.
        bounds: floor, value and ceiling of the game on a finite space; None without one.
    """

    pairwise: dict[str, Tensor]
    together: dict[str, float]
    capacity: RobustPrior | None
    bounds: Bounds | None


def interference(
    logits: Mapping[str, Sequence[Tensor]],  # D x K x [..., V]
    *,
    samples: Sequence[Documents] | None = None,  # K
    space: tuple[Tensor, Tensor] | None = None,  # [D, X], [K, X]
) -> Interference:
    """Measure how much the experts differ: what a single model would have to average away.

    Near 0 on a domain, the experts agree there and any gate will do; near ``log K`` the choice of
    weights is all that matters.

    Args:
        logits: for each domain, the K experts' logits at the same tokens, ``[..., V]`` each.

    Other:
        samples: documents drawn from each expert, for :func:`expert_capacity`.
        space: ``p_d(x)`` and ``pi_k(x)`` of a finite game, for :func:`bounds`.

    Raises:
        ValueError: no domain; otherwise as the functions named.

    Example:
        >>> import torch
        >>> from robustgate.game import interference
        >>> apart = [torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])]
        >>> report = interference({"same": [apart[0], apart[0]], "apart": apart})
        >>> [round(value, 3) for value in report.together.values()]  # the second is near log 2
        [0.0, 0.692]

    Source: docs/theory.md, "Diagnostics".
    """
    if not logits:
        raise ValueError("logits: expected at least one domain, got an empty mapping")
    return Interference(
        pairwise={name: _pairwise(experts) for name, experts in logits.items()},
        together={name: float(jsd(list(experts))) for name, experts in logits.items()},
        capacity=None if samples is None else expert_capacity(samples),
        bounds=None if space is None else bounds(*space),
    )


def _pairwise(experts: Sequence[Tensor]) -> Tensor:  # K x [..., V] -> [K, K]
    table = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for i, first in enumerate(experts):
        for j in range(i):
            table[i, j] = table[j, i] = float(jsd([first, experts[j]]))
    return table


def expert_capacity(
    samples: Sequence[Documents],  # K
) -> RobustPrior:
    """Estimate the capacity of the channel from expert to document, from samples of the experts.

        max_w JSD_w(pi) = min_w max_k E_{x ~ pi_k}[ log pi_k(x) - log pi_w(x) ]

    The robust prior of a game whose domains are the experts themselves and whose baselines are
    their entropies. In ``[0, log K]``: the nats by which documents tell their expert, and the
    worst regret of a constant gate that need not know it. Fitted to the samples, it errs below.

    Args:
        samples: K sets of documents, the k-th drawn from expert k.

    Returns:
        The :class:`RobustPrior`: ``value`` is the estimate, ``prior`` the weights.

    Raises:
        ValueError: not one set per expert; otherwise as :func:`robust_prior`.

    Example:
        >>> import torch
        >>> from robustgate.game import Documents, expert_capacity
        >>> far = torch.tensor([[0.0, -50.0]])  # each document all but excludes the other expert
        >>> drawn = [Documents(torch.zeros(1, 1), far), Documents(torch.zeros(1, 1), far.flip(1))]
        >>> round(expert_capacity(drawn).value, 4)  # log 2
        0.6931
    """
    if not samples or samples[0].log_probs.shape[1] != len(samples):
        experts = samples[0].log_probs.shape[1] if samples else 0
        raise ValueError(f"samples: expected one set per expert, got {len(samples)} for {experts}")
    log_probs = {str(k): drawn.log_probs for k, drawn in enumerate(samples)}
    entropy = {
        str(k): -float(drawn.log_probs[:, k].double().mean()) for k, drawn in enumerate(samples)
    }
    return robust_prior(log_probs, baseline=entropy)


def generalisation_gap(
    weight_norm: float,
    feature_norm: float,
    *,
    experts: int,
    documents: int,
    domains: int = 1,
    confidence: float = 0.95,
) -> float:
    """Bound the gap between a linear gate's training loss and its expected loss, on every domain.

        B R / sqrt(n) ( 4 sqrt(K) + 2 sqrt(log(2 D / delta)) )   nats per document

    With probability ``confidence`` = 1 - delta over n documents from each of D domains it holds at
    once for all domains and all gates ``softmax(log w + W phi(x))`` with ``|W|_F <= B``, where
    ``|phi(x)| <= R``; the loss is ``-log pi_g(x) + log pi_w(x)``, relative to the constant gate w
    (whose own mean has nothing fitted). It says how the gap falls with n and grows with the gate,
    not how large it is: it is loose. What to trust is held-out loss.

    A bound in the spirit of the paper's Theorem 9 (a gate generalises by its own size, not by that
    of the experts); derived in docs/theory.md with constants of its own.

    Args:
        weight_norm: B, the Frobenius norm of W.
        feature_norm: R, the largest norm of a document's features.

    Other:
        experts, documents, domains: K, n (of the smallest domain) and D.
        confidence: in (0, 1).

    Raises:
        ValueError: a number out of range.

    Example:
        >>> from robustgate.game import generalisation_gap
        >>> round(generalisation_gap(1.0, 1.0, experts=4, documents=10_000), 3)
        0.118

    Source: Maurer, "A vector-contraction inequality for Rademacher complexities" (2016);
        docs/theory.md, "Diagnostics".
    """
    if not (weight_norm >= 0 and feature_norm >= 0):
        raise ValueError(f"norms: expected numbers >= 0, got {weight_norm}, {feature_norm}")
    if min(experts, documents, domains) < 1:
        raise ValueError(
            f"counts: expected at least 1 of each, got {experts=}, {documents=}, {domains=}"
        )
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    deviation = 2 * math.sqrt(math.log(2 * domains / (1 - confidence)))
    scale = weight_norm * feature_norm / math.sqrt(documents)
    return scale * (4 * math.sqrt(experts) + deviation)
