"""The matrix of document log-probabilities, prepared for many passes over it.

Shape letters: D domains, K experts, ``n_d`` documents of domain d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

Baseline = str | Mapping[str, float] | Tensor

# Rows are processed in blocks, so that all products of a block are formed while it is in cache:
# 2^18 doubles are 2 MiB. One core is equally fast from 2^16 to 2^18; fewer blocks mean fewer
# waits where several cores share the work.
BLOCK_ELEMENTS: Final = 2**18


class Moments(NamedTuple):
    """What one pass over the data yields at a prior w; ``rho_k = e^{L_k} / sum_j w_j e^{L_j}``."""

    losses: Tensor  # [D]        l_d = E_d[-log sum_k w_k e^{L_k}] - b_d
    ratios: Tensor  # [D, K]     A_dk = E_d[rho_k] = -dl_d/dw_k
    gram: Tensor  # [D, K, K]    E_d[rho rho^T], the Hessian of l_d


def check_log_probs(log_probs: Mapping[str, Tensor]) -> dict[str, Tensor]:  # D x [n_d, K]
    """Return the log-probabilities as float64 CPU tensors, or say what is wrong with them.

    Args:
        log_probs: for each domain, ``[n_d, K]`` floating point log-probabilities of its documents
            under every expert. ``-inf`` is allowed where some other expert is finite.

    Raises:
        TypeError: not a mapping from names to floating point tensors.
        ValueError: no domain, an empty domain, differing K, NaN, ``+inf``, or a document to which
            every expert gives probability 0 (its loss is infinite under every prior).
    """
    if not isinstance(log_probs, Mapping):
        raise TypeError(
            f"log_probs: expected a mapping from domain name to tensor [n_d, K], "
            f"got {type(log_probs).__name__}"
        )
    if not log_probs:
        raise ValueError("log_probs: expected at least one domain, got an empty mapping")
    checked: dict[str, Tensor] = {}
    experts: int | None = None
    for name, matrix in log_probs.items():
        where = f"log_probs[{name!r}]"
        if not isinstance(name, str):
            raise TypeError(f"log_probs: expected domain names of type str, got {name!r}")
        if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
            kind = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
            raise TypeError(f"{where}: expected a floating point tensor [n_d, K], got {kind}")
        if matrix.dim() != 2 or matrix.shape[0] == 0 or matrix.shape[1] == 0:
            raise ValueError(
                f"{where}: expected shape [n_d, K] with n_d >= 1 and K >= 1, "
                f"got {tuple(matrix.shape)}"
            )
        experts = matrix.shape[1] if experts is None else experts
        if matrix.shape[1] != experts:
            first = next(iter(checked))
            raise ValueError(
                f"{where}: expected K = {experts} experts as in {first!r}, got {matrix.shape[1]}"
            )
        checked[name] = _check_documents(where, matrix.detach().to("cpu", torch.float64))
    return checked


def _check_documents(where: str, matrix: Tensor) -> Tensor:  # [n_d, K]
    top = matrix.amax(dim=1)  # [n_d]; NaN if any entry is NaN
    if bool(top.isfinite().all()):
        return matrix
    document = int((~top.isfinite()).nonzero()[0])
    if bool(top[document].isnan()):
        found = "NaN"
    elif top[document] > 0:
        found = "+inf"
    else:
        found = "-inf from every expert (probability 0 under every prior, so the value is infinite)"
    raise ValueError(
        f"{where}, document {document}: expected log-probabilities below +inf "
        f"with at least one finite, got {found}"
    )


def baseline_values(log_probs: Mapping[str, Tensor], baseline: Baseline) -> Tensor:  # [D]
    """Return ``b_d``, subtracted from the losses of domain d.

    Args:
        log_probs: checked log-probabilities, ``[n_d, K]`` for each domain.
        baseline: ``"excess"`` for the mean NLL of the best single expert on each domain,
            ``"hindsight"`` for that of the best expert of each document, ``"raw"`` for 0, a mapping
            from every domain name to a number, or a tensor ``[D]``.

    Raises:
        TypeError: ``baseline`` is none of these.
        ValueError: unknown word, wrong names or shape, a number that is not finite, or
            ``"excess"`` on a domain where every single expert has infinite NLL.
    """
    names = list(log_probs)
    if isinstance(baseline, str):
        if baseline == "raw":
            return torch.zeros(len(names), dtype=torch.float64)
        if baseline == "hindsight":
            return torch.stack([-matrix.amax(dim=1).mean() for matrix in log_probs.values()])
        if baseline != "excess":
            raise ValueError(
                f'baseline: expected "excess", "hindsight", "raw" or numbers, got {baseline!r}'
            )
        best = torch.stack([-matrix.mean(dim=0).amax() for matrix in log_probs.values()])  # [D]
        if bool(best.isinf().any()):
            name = names[int(best.isinf().nonzero()[0])]
            raise ValueError(
                f"baseline: every expert gives some document of domain {name!r} probability 0, so "
                f'no single expert has a finite NLL there; pass baseline="raw" or numbers'
            )
        return best
    if isinstance(baseline, Mapping):
        if set(baseline) != set(names):
            raise ValueError(f"baseline: expected the domains {names}, got {list(baseline)}")
        values = torch.tensor([float(baseline[name]) for name in names], dtype=torch.float64)
    elif isinstance(baseline, Tensor):
        values = baseline.detach().to("cpu", torch.float64)
        if values.shape != (len(names),):
            raise ValueError(f"baseline: expected shape [{len(names)}], got {tuple(values.shape)}")
    else:
        raise TypeError(
            f'baseline: expected "excess", "hindsight", "raw", a mapping or a tensor [D], '
            f"got {type(baseline).__name__}"
        )
    if not bool(values.isfinite().all()):
        raise ValueError(f"baseline: expected finite numbers, got {values.tolist()}")
    return values


class DocumentLikelihoods:
    """Likelihoods of all documents, each scaled so that its best expert has likelihood 1.

    ``P_xk = exp(L_k(x) - max_j L_j(x))`` in float64. With the scale kept apart the losses are exact
    down to log-probabilities of any size, and a pass is matrix-vector products and one Gram matrix.

    Args:
        log_probs: checked log-probabilities, ``[n_d, K]`` for each domain.
        baseline: ``[D]`` float64.
        weights: for each domain, ``[n_d]`` float64 probabilities of its documents; equal if absent.
    """

    def __init__(
        self,
        log_probs: Mapping[str, Tensor],  # D x [n_d, K]
        baseline: Tensor,  # [D]
        weights: Sequence[Tensor] | None = None,  # D x [n_d]
    ) -> None:
        """Exponentiate once; the passes reuse it."""
        if weights is None:
            sizes = [len(matrix) for matrix in log_probs.values()]
            weights = [torch.full((n,), 1.0 / n, dtype=torch.float64) for n in sizes]
        self._weights = weights
        self._scaled: list[Tensor] = []  # D x [n_d, K]
        offsets = []
        for matrix, weight in zip(log_probs.values(), weights, strict=True):
            top = matrix.amax(dim=1)  # [n_d]
            self._scaled.append((matrix - top.unsqueeze(1)).exp_())
            offsets.append(-(weight @ top))
        self._offset = torch.stack(offsets) - baseline  # [D]
        self.domains = len(self._scaled)
        self.experts = self._scaled[0].shape[1]

    def moments(
        self,
        prior: Tensor,  # [K]
    ) -> Moments:
        """Return losses, their gradients and Hessians at ``prior``, in one pass over the data."""
        losses = self._offset.clone()  # [D]
        gram = prior.new_zeros(self.domains, self.experts, self.experts)  # [D, K, K]
        rows = max(1, BLOCK_ELEMENTS // self.experts)
        for d, (scaled, weights) in enumerate(zip(self._scaled, self._weights, strict=True)):
            for block, weight in zip(scaled.split(rows), weights.split(rows), strict=True):
                mix = block @ prior  # [rows]
                rho = block * (weight.sqrt() / mix).unsqueeze(1)  # [rows, K], root of the weight in
                gram[d].addmm_(rho.T, rho)
                losses[d] -= weight @ mix.log_()
        # sum_k w_k rho_k = 1 for every document, so the gradients are the Gram matrices times w.
        return Moments(losses, gram @ prior, gram)
