"""Structural distillation: a gate of whole documents taught to one that decodes token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from robustgate.game.constant_gate import ConstantGate
from robustgate.game.documents import Documents
from robustgate.game.gates import BayesGate
from robustgate.game.normaliser import Normaliser
from robustgate.game.sample import Sample, Sampler, sample
from robustgate.game.token_gate import TokenGate


@dataclass(frozen=True, eq=False)
class Distillation:
    """A causal student of a gate of whole documents, and how far it is from its teacher.

    Attributes:
        student: the causal gate.
        gap: ``KL(teacher || student)`` in nats per document, measured on documents the student was
            not trained on.
        standard_error: of ``gap``, the error of ``normaliser`` included.
        normaliser: ``Z_g`` of the teacher, from the acceptance rate.
        losses: the student's training loss at each step, nats per document.
    """

    student: BayesGate | TokenGate
    gap: float
    standard_error: float
    normaliser: Normaliser
    losses: tuple[float, ...]

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the normal confidence interval of ``gap``."""
        if not 0.0 < level < 1.0:
            raise ValueError(f"level: expected a number in (0, 1), got {level}")
        margin = NormalDist().inv_cdf((1 + level) / 2) * self.standard_error
        return self.gap - margin, self.gap + margin


def distill(
    teacher: nn.Module,
    student: TokenGate,
    samplers: Sequence[Sampler],  # K
    *,
    documents: int = 1000,
    held_out: int = 1000,
    steps: int = 200,
    batch_size: int = 100,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> Distillation:
    """Train a causal gate on samples of a non-causal one, and measure what that loses.

        student:  min E_{x ~ pi_g / Z_g}[ -sum_t log sum_k gamma_k(x_<t) pi_k(x_t | x_<t) ]
        gap:      KL(pi_g / Z_g || student) = E[ log pi_g(x) - log Z_g - log student(x) ]

    Samples come from the teacher by exact rejection; the experts' token probabilities are computed
    once, when their samplers draw. The gap has two parts: what training left, and what no causal
    gate over these experts can follow; the second is in general not 0.

    A :class:`ConstantGate` needs no training: the :class:`BayesGate` of its weights is the same
    distribution, and the gap is 0.

    Args:
        teacher: maps the inputs of documents to normalised log-weights ``[..., K]``.
        student: trained in place.
        samplers: as for :func:`sample`; the documents they draw must have ``tokens``.

    Other:
        documents: teacher samples to train on.
        held_out: teacher samples to measure the gap on, at least 2.
        steps, batch_size, learning_rate: of AdamW.
        seed: of sampling and batches; the result is deterministic for a seed.

    Returns:
        A :class:`Distillation`.

    Raises:
        ValueError: a number out of range, or documents without tokens.
        RuntimeError: as :func:`sample`.

    Example:
        >>> import torch
        >>> from robustgate.game import BayesGate, ConstantGate, TokenGate, distill
        >>> teacher = ConstantGate(torch.tensor([0.3, 0.7]))
        >>> student = TokenGate.linear(BayesGate(torch.tensor([0.5, 0.5])))
        >>> found = distill(teacher, student, [])  # nothing needs to be drawn
        >>> found.gap, found.student.log_prior.exp()
        (0.0, tensor([0.3000, 0.7000], dtype=torch.float64))

    Source: docs/theory.md, "Structural distillation".
    """
    if isinstance(teacher, ConstantGate):
        prior = torch.softmax(teacher.logits.detach(), dim=0)
        return Distillation(BayesGate(prior), 0.0, 0.0, Normaliser(1.0, 0.0), ())
    numbers = {"documents": documents, "held_out": held_out, "batch_size": batch_size}
    for name, value in numbers.items():
        if value < 2:
            raise ValueError(f"{name}: expected at least 2, got {value}")
    drawn = sample(teacher, samplers, documents + held_out, seed=seed)
    if drawn.documents.tokens is None:
        raise ValueError("samplers: expected documents with tokens, got none")
    rows = torch.arange(documents + held_out)
    training = drawn.documents[rows[:documents]]
    losses = _train(student, training, steps, min(batch_size, documents), learning_rate, seed)
    total = _from_acceptance(drawn, len(samplers))
    gap, error = _gap(teacher, student, drawn.documents[rows[documents:]], total)
    return Distillation(student, gap, error, total, losses)


def _train(
    student: TokenGate,
    documents: Documents,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> tuple[float, ...]:
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(documents), (batch_size,), generator=generator)
        loss = -_student_log_prob(student, documents[rows]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    optimiser.zero_grad()
    return tuple(losses)


def _student_log_prob(student: TokenGate, documents: Documents) -> Tensor:  # [n]
    tokens = documents.tokens
    assert tokens is not None
    log_prob = student.log_prob(tokens.log_probs, context=tokens.context, mask=tokens.mask)
    return log_prob.sum(dim=-1)


def _from_acceptance(drawn: Sample, experts: int) -> Normaliser:
    """Return ``Z_g = K P(accept)`` and its binomial standard error."""
    rate = drawn.acceptance_rate
    return Normaliser(experts * rate, experts * (rate * (1 - rate) / drawn.candidates) ** 0.5)


def _gap(
    teacher: nn.Module, student: TokenGate, documents: Documents, total: Normaliser
) -> tuple[float, float]:
    with torch.no_grad():
        difference = documents.log_prob(teacher) - _student_log_prob(student, documents)
    variance = float(difference.var()) / len(difference)
    relative = total.standard_error / total.value  # of log Z
    gap = float(difference.mean() - torch.tensor(total.value).double().log())
    return gap, (variance + relative**2) ** 0.5
