"""The gate that holds the same weights for every document."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustgate.game.certificate import check_distribution


class ConstantGate(nn.Module):
    """The same weights for every document: ``log g_k(x) = log w_k``.

    Its mixture ``sum_k w_k pi_k`` is normalised as it stands, and its exact causal form is the
    :class:`BayesGate` of the same prior.

    Args:
        prior: ``w``, ``[K]``, non-negative, sums to 1.

    Other:
        trainable: whether ``w`` is a parameter (as logits) of an optimiser.

    Raises:
        TypeError: ``prior`` is not a tensor.
        ValueError: ``prior`` is not a distribution ``[K]``.

    Example:
        >>> import torch
        >>> from robustgate.game import ConstantGate
        >>> ConstantGate(torch.tensor([0.25, 0.75]))(torch.zeros(2, 5)).exp()
        tensor([[0.2500, 0.7500],
                [0.2500, 0.7500]], dtype=torch.float64)
    """

    def __init__(
        self,
        prior: Tensor,  # [K]
        *,
        trainable: bool = False,
    ) -> None:
        """Keep ``log prior`` as float64 logits."""
        super().__init__()
        size = prior.numel() if isinstance(prior, Tensor) else 0
        logits = check_distribution("prior", prior, size).log()
        self.logits = nn.Parameter(logits, requires_grad=trainable)

    def forward(
        self,
        inputs: Tensor,  # [..., F]
    ) -> Tensor:  # [..., K]
        """Return ``log w`` for each row of ``inputs``, which are not looked at."""
        weights = torch.log_softmax(self.logits, dim=-1)
        return weights.expand(*inputs.shape[:-1], -1)
