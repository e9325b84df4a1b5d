"""What a modular model remembers of its fit: the certificate of the prior, the gate's training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import nn

from robustgate.lm.gates.spec import GateSpec

Baseline = Literal["hindsight", "excess", "raw"]

BASELINES: Final[Mapping[str, str]] = {
    "hindsight": " more than choosing the best expert for every single document with hindsight",
    "excess": " more than the best expert of each document's domain",
    "raw": "",
}
"""What a certificate can measure from, and how its sentence says so."""


@dataclass(frozen=True)
class CertificateRecord:
    """The numbers of a certificate as the manifest keeps them, in nats per document.

    The loss of domain ``d`` is ``l_d(w) = E_x[-log sum_k w_k exp L_k(x)] - b_d``, over the
    documents the prior was fitted on; the worst case is the maximum of
    ``sum_d lambda_d l_d(w)`` over all mixtures ``lambda``.

    Attributes:
        baseline: What ``b_d`` is: ``"hindsight"`` for ``E_x[-max_k L_k(x)]``, the best expert of
            every single document; ``"excess"`` for ``min_k E_x[-L_k(x)]``, the best expert of the
            domain; ``"raw"`` for 0. The first is the smaller of the two, so its certificate holds
            for the second as well.
        documents: Documents the prior was fitted on.
        lower_bound: No prior over these experts has a smaller worst case.
        upper_bound: The solver's prior has no larger worst case.
        worst_case: Worst case of the prior in this model, after its floor.
        delta: The floor: ``w = (1 - delta) w* + delta / K``.
        guarantee: On every document whatsoever this model loses at most so much against every
            expert, ``-log min_k w_k``.
    """

    baseline: str
    documents: int
    lower_bound: float
    upper_bound: float
    worst_case: float
    delta: float
    guarantee: float

    @property
    def gap(self) -> float:
        """Return ``upper_bound - lower_bound``."""
        return self.upper_bound - self.lower_bound


@dataclass(frozen=True)
class TrainingRecord:
    """What training a learned gate found, on documents it was not trained on.

    Losses are excesses over the best single expert of each domain, per ``unit``. The held-out
    documents chose among the gates that training passed through, so that the numbers of the kept
    one are slightly too good: evaluate on other documents.

    Attributes:
        unit: ``"token"`` or ``"document"``.
        domains: D names.
        documents: documents of each domain that the gate was trained on.
        held_out: documents of each domain that judged it.
        kept: ``"start"`` if training did not help: then the gate is the one it started from.
        steps: of training.
        best_step: after how many of them the gate was as it was kept.
        before: held-out loss of each domain with the Bayes gate of the certified prior.
        after: the same with the gate that was kept.
        train_before: as ``before``, on the training documents.
        train_after: as ``after``, on the training documents.
        mixture: of the domains, at the end: the least favourable one that training found.
        seed: of training.
        normaliser: ``Z_g`` of a sequence gate and its standard error, from documents of the
            experts that training did not use.
        gap: of a distilled gate, ``KL(teacher || student)`` in nats per document and its standard
            error, on samples that it was not trained on.
    """

    unit: str
    domains: tuple[str, ...]
    documents: tuple[int, ...]
    held_out: tuple[int, ...]
    kept: str
    steps: int
    best_step: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    train_before: tuple[float, ...]
    train_after: tuple[float, ...]
    mixture: tuple[float, ...]
    seed: int
    normaliser: tuple[float, float] | None = None
    gap: tuple[float, float] | None = None

    @property
    def worst_before(self) -> float:
        """Worst domain of ``before``."""
        return max(self.before)

    @property
    def worst_after(self) -> float:
        """Worst domain of ``after``."""
        return max(self.after)

    def sentence(self) -> str:
        """Return the record in one sentence."""
        if self.gap is not None:
            low, high = (self.gap[0] + sign * 1.96 * self.gap[1] for sign in (-1, 1))
            return (
                f"The token gate is {self.gap[0]:.4f} nats per document from the gate it imitates "
                f"(KL divergence, 95 % interval {low:.4f} to {high:.4f}), on documents drawn anew."
            )
        what = f"worst-domain excess on {sum(self.held_out):,} held-out documents"
        change = f"{self.worst_before:+.4f} to {self.worst_after:+.4f} nats per {self.unit}"
        if self.kept == "start":
            return f"Training did not lower the {what}, so the gate is the one it started from."
        return f"Training lowered the {what} from {change}."

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingRecord:
        """Return a record from its JSON values, whose lists become tuples."""
        lists: dict[str, Any] = {k: tuple(v) for k, v in value.items() if isinstance(v, list)}
        return cls(**{**value, **lists})


@dataclass(frozen=True, eq=False)
class GateFit:
    """A learned gate.

    Attributes:
        spec: What it is made of.
        gate: What ``spec.build`` made, trained, in evaluation mode.
        record: What training found.
    """

    spec: GateSpec
    gate: nn.Module
    record: TrainingRecord
