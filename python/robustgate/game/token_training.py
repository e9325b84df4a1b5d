"""Robust training of a token gate, kept only where it helps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustgate.game.documents import TokenDocuments
from robustgate.game.iterate import Iterate
from robustgate.game.primal_dual import PrimalDual
from robustgate.game.token_gate import TokenGate

TokenBatch = Mapping[str, TokenDocuments]


@dataclass(frozen=True, eq=False)
class TokenTraining:
    """The better of a token gate's start and what it learned, on validation documents.

    Attributes:
        gate: the one to use.
        kept: ``"start"``, ``"last"`` (the trained gate) or ``"ema"`` (the moving average of its
            parameters).
        validation: the record of each of the three.
        mixture: ``lambda`` after training, ``[D]``.
    """

    gate: TokenGate
    kept: str
    validation: dict[str, Iterate]
    mixture: Tensor


def train_token_gate(
    gate: TokenGate,
    batches: Callable[[int], TokenBatch],
    validation: TokenBatch,
    steps: int,
    *,
    baseline: Mapping[str, float] | None = None,
    log: Callable[[str, float, int], object] | None = None,
    **options: Any,
) -> TokenTraining:
    """Train a token gate against the worst mixture of domains; keep it only if that pays.

        min_gamma max_{lambda in Lambda} sum_d lambda_d ( E_d[-log sum_k gamma_k pi_k] - b_d )

    Means are per token. The mixture of experts is normalised whatever the gate, so there is no
    multiplier; lambda moves as in :class:`PrimalDual`. Of the start, the last gate and the moving
    average, the one with the least worst case on ``validation`` is returned: an untrained gate is
    the Bayes gate, so that the result is never worse there.

    Args:
        gate: left as it is; a copy is trained.
        batches: called with the step, 0 to ``steps - 1``.
        validation: other documents, of every domain.
        steps: of training.

    Other:
        baseline: ``b_d``, nats per token; by default the loss of ``gate`` itself on ``validation``,
            so that the worst case is that of the gain.
        log: as in :meth:`PrimalDual.fit`.
        options: of :class:`PrimalDual`.

    Returns:
        A :class:`TokenTraining`.

    Raises:
        ValueError: as :class:`PrimalDual`.

    Example:
        >>> import torch
        >>> from robustgate.game import BayesGate, TokenDocuments, TokenGate, train_token_gate
        >>> log_probs = torch.randn(4, 9, 2) - 3  # four documents of nine tokens, two experts
        >>> documents = {"wiki": TokenDocuments(log_probs)}
        >>> gate = TokenGate.linear(BayesGate(torch.tensor([0.5, 0.5])))
        >>> found = train_token_gate(gate, lambda step: documents, documents, 10)
        >>> best = min(record.upper_bound for record in found.validation.values())
        >>> found.validation[found.kept].upper_bound == best <= 0.0  # 0 is the Bayes gate
        True

    Source: docs/theory.md, "Learned gates".
    """
    if baseline is None:
        baseline = {name: float(part.loss(gate).detach()) for name, part in validation.items()}
    trained = copy.deepcopy(gate)
    trainer = PrimalDual(trained, baseline, **options)
    records = {"start": trainer.evaluate(validation)}
    trainer.fit(batches, steps, log=log)
    averaged = trainer.ema_gate()
    assert isinstance(averaged, TokenGate)
    records["last"] = trainer.evaluate(validation)
    records["ema"] = trainer.evaluate(validation, gate=averaged)
    kept = min(records, key=lambda name: records[name].upper_bound)  # the start wins a tie
    best = {"start": copy.deepcopy(gate), "last": trained, "ema": averaged}[kept]
    return TokenTraining(best, kept, records, trainer.mixture)
