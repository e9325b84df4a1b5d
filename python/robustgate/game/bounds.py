"""What brackets the value of the exact game before it is solved, and what the paper adds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from robustgate.game.capacity import capacity, climb
from robustgate.game.exact_certificate import ExactCertificate
from robustgate.game.likelihoods import DocumentLikelihoods
from robustgate.game.mixtures import FULL_SIMPLEX, MixtureSet
from robustgate.game.robust_prior import play
from robustgate.game.solve_exact import solve_exact
from robustgate.game.threads import one_thread

_MAX_ITERATIONS: Final = 100_000
_MAX_PASSES: Final = 500


@dataclass(frozen=True, eq=False)
class Bounds:
    """Bounds on the value V of the exact game, all in nats.

    They are ordered, up to the tolerance they were computed to:

        floor <= solution.lower_bound <= V <= solution.upper_bound <= constant_gate <= ceiling,
        solution.lower_bound <= theorem3 <= misfit_bound,   ceiling <= misfit_bound

    Attributes:
        floor: capacity of the domains: no normalised model whatever does better.
        solution: the solved game, with the bounds on V itself.
        constant_gate: worst case of ``prior``, the best constant gate.
        ceiling: ``max_lambda [sum_d lambda_d eps_d + JSD_lambda(p)]``, what constant gates are sure
            to reach, known of the experts no more than their misfits.
        theorem3: the paper's Theorem 3 at the least favourable mixture ``lambda*`` of ``solution``,
            ``misfit_bound - sum_d lambda*_d E_{p_d}[-log(sigma_d pi_k(d) / pi_sigma)]``.
        misfit_bound: ``log sum_d e^{eps_d}``.
        misfit: ``eps_d = min_k KL(p_d || pi_k)``, ``[D]``.
        expert: ``k(d)``, the expert that attains it, ``[D]`` int64.
        prior: the constant gate of smallest worst case, ``[K]``.
    """

    floor: float
    solution: ExactCertificate
    constant_gate: float
    ceiling: float
    theorem3: float
    misfit_bound: float
    misfit: Tensor
    expert: Tensor
    prior: Tensor


def bounds(
    data_probs: Tensor,  # [D, X]
    expert_probs: Tensor,  # [K, X]
    *,
    mixtures: MixtureSet = FULL_SIMPLEX,
    tol: float = 1e-6,
) -> Bounds:
    """Compute every known bound on the value of the exact game, and the value between them.

        C = max_lambda JSD_lambda(p)  <=  V  <=  max_lambda [ sum_d lambda_d eps_d + JSD_lambda(p) ]

    Args:
        data_probs: ``p_d(x)``, ``[D, X]`` floating point, each row sums to 1.
        expert_probs: ``pi_k(x)``, ``[K, X]`` floating point, each row sums to 1.
        mixtures: the set Lambda. Where it has listed vertices, these take the place of the domains
            (and D below is their number); otherwise all bounds are those of the linearised game.
        tol: accuracy of every number that is itself a maximum, in nats.

    Returns:
        A :class:`Bounds`. Where no single expert covers some domain, its misfit is infinite and so
        are ``ceiling``, ``theorem3`` and ``misfit_bound``.

    Raises:
        TypeError, ValueError: as :func:`solve_exact`; batches of games are not taken.

    Example:
        >>> import torch
        >>> from robustgate.game import bounds
        >>> data = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
        >>> experts = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.4, 0.6]])
        >>> result = bounds(data, experts)
        >>> round(result.floor, 4), round(float(result.solution.value), 4), round(result.ceiling, 4)
        (0.6931, 0.6931, 0.7475)

    Source: Cortes, Mohri, Zhong (arXiv 2602.17554), Theorem 3; docs/theory.md, "Floor and ceiling".
    """
    for name, probs in (("data_probs", data_probs), ("expert_probs", expert_probs)):
        if isinstance(probs, Tensor) and probs.dim() != 2:
            raise ValueError(f"{name}: expected two dimensions, got shape {tuple(probs.shape)}")
    solution = solve_exact(data_probs, expert_probs, mixtures=mixtures, tol=tol)
    experts = solution.experts  # [K, X]
    data = data_probs.detach().to("cpu", torch.float64)
    data = solution.vertices @ (data / data.sum(dim=1, keepdim=True))  # [J, X]
    choices = mixtures if solution.linearised else FULL_SIMPLEX
    with one_thread():
        misfit, expert = _divergences(data, experts).min(dim=1)
        ceiling = math.inf
        if bool(misfit.isfinite().all()):
            ceiling = float(climb(data, misfit, choices, tol, _MAX_ITERATIONS).upper)
        prior = _best_constant_gate(data, experts, choices, tol)
        attained = _divergences(data, (prior @ experts).unsqueeze(0)).squeeze(1)  # [J]
    return Bounds(
        floor=capacity(data, mixtures=choices, tol=tol).lower_bound,
        solution=solution,
        constant_gate=float(choices.worst_case(attained)[0]),
        ceiling=ceiling,
        theorem3=_theorem3(data, experts, misfit, expert, solution.weights),
        misfit_bound=float(torch.logsumexp(misfit, dim=0)),
        misfit=misfit,
        expert=expert,
        prior=prior,
    )


def _best_constant_gate(
    data: Tensor,  # [D, X]
    experts: Tensor,  # [K, X]
    mixtures: MixtureSet,
    tol: float,
) -> Tensor:  # [K]
    """Solve the robust prior with every point a document and its probability a weight."""
    seen = [row > 0 for row in data]
    log_probs = {str(d): experts[:, points].T.log() for d, points in enumerate(seen)}
    weights = [row[points] for row, points in zip(data, seen, strict=True)]
    entropy = -torch.xlogy(data, data).sum(dim=1)
    likelihoods = DocumentLikelihoods(log_probs, entropy, weights)
    trajectory = play(likelihoods, mixtures, tol, "interior-point", _MAX_PASSES)
    return min(trajectory, key=lambda iterate: iterate.gap).prior


def _theorem3(
    data: Tensor,  # [D, X]
    experts: Tensor,  # [K, X]
    misfit: Tensor,  # [D]
    expert: Tensor,  # [D]
    mixture: Tensor,  # [D]
) -> float:
    """Return the paper's bound with ``sigma = softmax(eps)``, term by term as it is stated."""
    if bool(misfit.isinf().any()):
        return math.inf
    log_sigma = torch.log_softmax(misfit, dim=0)  # [D]; sigma itself may underflow
    joint = log_sigma.unsqueeze(1) + experts[expert].log()  # log sigma_d pi_k(d), [D, X]
    log_share = torch.where(data > 0, joint - torch.logsumexp(joint, dim=0), 0.0)
    conditional_entropy = -(data * log_share).sum(dim=1)  # [D]
    return float(torch.logsumexp(misfit, dim=0) - mixture @ conditional_entropy)


def _divergences(
    data: Tensor,  # [D, X]
    models: Tensor,  # [K, X]
) -> Tensor:  # [D, K]
    """Return ``KL(p_d || m_k)``, infinite where ``m_k = 0 < p_d``."""
    columns = []
    for model in models:
        cross = torch.where(data > 0, data * model.log(), 0.0)
        columns.append((torch.xlogy(data, data) - cross).sum(dim=1).clamp(min=0.0))
    return torch.stack(columns, dim=1)
