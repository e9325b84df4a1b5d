"""Primal-dual interior-point method for the robust prior (Newton, Mehrotra predictor-corrector).

The program, with one constraint per candidate mixture ``m_j`` (for the simplex: per domain),

    min t   subject to   c_j(w) = m_j . l(w) <= t,   w >= 0,   sum_k w_k = 1,

is convex. With slacks ``s_j = t - c_j(w)``, multipliers ``q_j`` of the constraints, ``z_k`` of
``w_k >= 0`` and ``y`` of the sum, the central path of barrier parameter ``mu`` solves

    y - sum_j q_j m_j^T A(w) - z = 0,   sum_j q_j = 1,   c_j(w) + s_j = t,   sum_k w_k = 1,
    w_k z_k = mu,   s_j q_j = mu,

where ``A_dk = -dl_d/dw_k``. One pass over the data gives l, A and the Hessians; a Newton step is
one dense solve of size K + J + 2. The adversary's mixture is ``lambda = sum_j q_j m_j / sum_j
q_j``. On the central path the certified gap is at most ``(K + J) mu``.

Source: Mehrotra (1992); Nocedal and Wright, Numerical Optimization (2006), chapter 19.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from robustgate.game.certificate import Certificate, two_sided
from robustgate.game.likelihoods import DocumentLikelihoods, Moments
from robustgate.game.mixtures import MixtureSet

_BOUNDARY_FRACTION: Final = 0.995  # how much of the way to the boundary a step may go
_NEIGHBOURHOOD: Final = 0.01  # every product stays above this share of their mean
_BACKTRACK: Final = 0.8  # a step that leaves the neighbourhood is shortened by this factor
_SHORT_STEP: Final = 0.5  # below it the predictor-corrector step is replaced by plain centring
_CENTRING: Final = 0.5  # share of mu aimed at by a plain centring step
_BARRIER_FLOOR: Final = 0.3  # mu never aims below this share of tol / (K + J): enough for the gap
_START_SLACK: Final = 1e-2  # nats of slack of the worst constraint at the start, at least


class _Point(NamedTuple):
    """An iterate; for a direction, each field is the change of that unknown."""

    prior: Tensor  # w [K]; a direction holds the relative change dw / w
    bound_dual: Tensor  # z [K]
    slack: Tensor  # s [J]
    weight: Tensor  # q [J]
    level: Tensor  # t []
    sum_dual: Tensor  # y []


def interior_point(
    likelihoods: DocumentLikelihoods,
    mixtures: MixtureSet,
    tol: float,
) -> Iterator[Certificate]:
    """Yield a certificate after each pass over the data; the caller stops at the gap it wants.

    The constraints start from the mixtures that are worst for a single domain, all vertices in the
    case of the simplex. For any other convex set the mixture that is worst for the solution found
    becomes one more constraint and the program is solved again (cutting planes), until no mixture
    of the set does more harm than those already present.

    Args:
        likelihoods: the documents.
        mixtures: the set Lambda.
        tol: the gap in nats the caller wants.

    Yields:
        Certificates of the iterates. The iteration ends when nothing more can be gained in float64.
    """
    unit = torch.eye(likelihoods.domains, dtype=torch.float64)  # [D, D]
    candidates = torch.stack([mixtures.support(loss)[1] for loss in unit]).unique(dim=0)  # [J, D]
    while True:
        for iterate in _fixed_candidates(likelihoods, candidates, mixtures, tol / 2):
            yield iterate
        value, worst = mixtures.support(iterate.losses)
        if value - float((candidates @ iterate.losses).amax()) <= tol / 4:
            return
        candidates = torch.cat([candidates, worst.unsqueeze(0)])


def _fixed_candidates(
    likelihoods: DocumentLikelihoods,
    candidates: Tensor,  # [J, D]
    mixtures: MixtureSet,
    tol: float,
) -> Iterator[Certificate]:
    """Solve with J fixed candidate mixtures; end at a gap of ``tol`` over those, or at a stall."""
    experts, constraints = likelihoods.experts, len(candidates)
    floor = _BARRIER_FLOOR * tol / (experts + constraints)
    prior = torch.full((experts,), 1.0 / experts, dtype=torch.float64)
    moments = likelihoods.moments(prior)
    point = _start(prior, candidates @ moments.losses)
    while True:
        mixture = point.weight @ candidates / point.weight.sum()  # [D]
        proof = two_sided(moments.losses, moments.ratios, mixture, mixtures)
        yield Certificate(point.prior, mixture, moments.losses, *proof)
        if float((candidates @ moments.losses).amax()) - proof[0] <= tol:
            return
        moved = _newton_step(point, moments, candidates, floor)
        if moved is None:
            return
        point = moved
        moments = likelihoods.moments(point.prior)


def _start(prior: Tensor, constraints: Tensor) -> _Point:  # [K], [J]
    """Uniform prior, every constraint slack, weights on the constraints that are least slack."""
    worst = constraints.amax()
    spread = float(worst - constraints.mean()) / len(constraints)
    level = worst + max(_START_SLACK, spread)
    slack = level - constraints
    weight = slack.reciprocal()
    one = torch.ones((), dtype=torch.float64)
    return _Point(prior, torch.ones_like(prior), slack, weight / weight.sum(), level, one)


def _newton_step(
    point: _Point,
    moments: Moments,
    candidates: Tensor,  # [J, D]
    floor: float,
) -> _Point | None:
    """Return the next iterate, or None where the linear system is singular in float64.

    The unknowns are ``(dw / w, dq, dt, dy)``; dz and ds follow. Scaling by w keeps the matrix
    bounded however small a weight becomes.
    """
    w, z, s, q, t, y = point
    experts, constraints = len(w), len(q)
    gradient = -(candidates @ moments.ratios) * w  # [J, K], of c in the scaled unknowns
    hessian = torch.einsum("d,dkl->kl", q @ candidates, moments.gram) * w * w.unsqueeze(1)
    size = experts + constraints
    matrix = w.new_zeros(size + 2, size + 2)
    matrix[:experts, :experts] = hessian + torch.diag(z * w)
    matrix[:experts, experts:size] = gradient.T
    matrix[:experts, -1] = w
    matrix[experts:size, :experts] = gradient
    matrix[experts:size, experts:size] = -torch.diag(s / q)
    matrix[experts:size, -2] = -1.0
    matrix[-2, experts:size] = -1.0
    matrix[-1, :experts] = w
    factors, pivots, singular = torch.linalg.lu_factor_ex(matrix)
    if bool(singular) or not bool(factors.isfinite().all()):
        return None
    dual_residual = w * (z - y) - q @ gradient  # [K]
    primal_residual = t - s - candidates @ moments.losses  # [J]

    def direction(wz: Tensor | float, sq: Tensor | float) -> _Point:
        """Solve for the products aimed at: ``w z + z dw + w dz = wz``, ``s q + ... = sq``."""
        wz, sq = wz - w * z, sq - s * q
        right = torch.cat(
            [
                dual_residual + wz,
                primal_residual - sq / q,
                (q.sum() - 1.0).unsqueeze(0),
                (1.0 - w.sum()).unsqueeze(0),
            ]
        )
        x = torch.linalg.lu_solve(factors, pivots, right.unsqueeze(1)).squeeze(1)
        du, dq = x[:experts], x[experts:size]
        return _Point(du, wz / w - z * du, (sq - s * dq) / q, dq, x[-2], x[-1])

    mean = _mean_product(point)
    affine = direction(0.0, 0.0)
    after = _mean_product(_advance(point, affine, *_longest_steps(point, affine, 1.0)))
    target = max(mean * min(1.0, (after / mean) ** 3), floor)
    second_order = (w * affine.prior * affine.bound_dual, affine.slack * affine.weight)
    chosen = direction(target - second_order[0], target - second_order[1])
    steps = _neighbourhood_steps(point, chosen)
    if min(steps) < _SHORT_STEP:
        target = max(_CENTRING * mean, floor)
        centring = direction(target, target)
        centring_steps = _neighbourhood_steps(point, centring)
        if min(centring_steps) > min(steps):
            chosen, steps = centring, centring_steps
    return _advance(point, chosen, *steps)


def _advance(point: _Point, change: _Point, primal: float, dual: float) -> _Point:
    """Take a step; the prior is renormalised against rounding."""
    prior = point.prior * (1.0 + primal * change.prior)
    return _Point(
        prior / prior.sum(),
        point.bound_dual + dual * change.bound_dual,
        point.slack + primal * change.slack,
        point.weight + dual * change.weight,
        point.level + primal * change.level,
        point.sum_dual + dual * change.sum_dual,
    )


def _products(point: _Point) -> Tensor:  # [K + J]
    return torch.cat([point.prior * point.bound_dual, point.slack * point.weight])


def _mean_product(point: _Point) -> float:
    return float(_products(point).mean())


def _longest_steps(point: _Point, change: _Point, fraction: float) -> tuple[float, float]:
    """Return the longest primal and dual steps, at most 1, that keep every unknown positive."""
    primal = torch.cat([change.prior, change.slack / point.slack])
    dual = torch.cat([change.bound_dual / point.bound_dual, change.weight / point.weight])
    steepest_primal, steepest_dual = -float(primal.amin()), -float(dual.amin())
    return (
        min(1.0, fraction / steepest_primal) if steepest_primal > 0 else 1.0,
        min(1.0, fraction / steepest_dual) if steepest_dual > 0 else 1.0,
    )


def _neighbourhood_steps(point: _Point, change: _Point) -> tuple[float, float]:
    """Shorten both steps until no product is far below the mean; a stray one would block later."""
    primal, dual = _longest_steps(point, change, _BOUNDARY_FRACTION)
    while min(primal, dual) > 1e-10:
        products = _products(_advance(point, change, primal, dual))
        if bool((products >= _NEIGHBOURHOOD * products.mean()).all()):
            break
        primal, dual = _BACKTRACK * primal, _BACKTRACK * dual
    return primal, dual
