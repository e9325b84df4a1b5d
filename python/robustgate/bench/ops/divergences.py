"""``jsd``, ``generalized_jsd`` and ``mixture_kl``: every column of every expert counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import robustgate as rg
from robustgate.bench.benchmark import Argument, Benchmark, Function, Shape
from robustgate.bench.ops.peers import BETA, LIGER_JSD, TRL_JSD, TRL_JSD_FLOAT32
from robustgate.bench.ops.tensors import (
    draw_gate,
    draw_logits,
    log_softmax,
    log_weights,
    total,
    wide,
)

Logits = list[Tensor]  # K x [N, V]
Form = Callable[[Logits, Tensor], Tensor]


def _jsd(logits: Logits, weight_logits: Tensor) -> Tensor:
    return rg.jsd(logits, torch.softmax(weight_logits, dim=-1))


def _kl_div(logits: Logits, weight_logits: Tensor) -> Tensor:
    log_p = torch.stack(log_softmax(logits))  # [K, N, V]
    log_w = log_weights(weight_logits)  # [K, N, 1]
    log_m = torch.logsumexp(log_p + log_w, dim=0).expand_as(log_p)
    kl = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)  # [K, N]
    return (log_w.squeeze(-1).exp() * kl).sum(0).mean()


def _entropy(p: Tensor) -> Tensor:  # [..., V] -> [...]
    terms: Tensor = torch.special.entr(p)
    return terms.sum(-1)


def _entropies(logits: Logits, weight_logits: Tensor) -> Tensor:
    p = torch.stack([F.softmax(wide(z), dim=-1) for z in logits], dim=1)  # [N, K, V]
    w = F.softmax(weight_logits, dim=-1)  # [N, K]
    mixture = (w.unsqueeze(1) @ p).squeeze(1)  # [N, V]
    return (_entropy(mixture) - (w * _entropy(p)).sum(-1)).mean()


def _probabilities(logits: Logits, weight_logits: Tensor) -> Tensor:
    weights = F.softmax(weight_logits, dim=-1).split(1, dim=-1)  # K x [N, 1]
    log_p = log_softmax(logits)
    weighted = [w * q.exp() for w, q in zip(weights, log_p, strict=True)]  # K x [N, V]
    log_m = total(weighted).log()
    terms = [(wp * (q - log_m)).sum(-1) for wp, q in zip(weighted, log_p, strict=True)]
    return total(terms).mean()


JSD_FORMULATIONS: dict[str, Form] = {
    "kl_div": _kl_div,
    "entropies": _entropies,
    "probabilities": _probabilities,
}


def _two_way(form: Form) -> Function:
    """Return the generalised JSD of a student and a teacher for a way to write the JSD."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        weights = torch.tensor([1 - BETA, BETA], dtype=dtype, device=student.device)
        return form([student, teacher], weights.log().expand(len(student), 2))

    return loss


def _generalized_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    return rg.generalized_jsd(student, teacher, BETA)


def _mixture(logits: Logits, gate: Tensor) -> Tensor:  # [N, V]
    weights = F.softmax(gate, dim=-1).split(1, dim=-1)  # K x [N, 1]
    p = [F.softmax(wide(z), dim=-1) for z in logits]
    return total([w * q for w, q in zip(weights, p, strict=True)])


def _gates_kl_div(logits: Logits, teacher: Tensor, student: Tensor) -> Tensor:
    log_p = torch.stack(log_softmax(logits))  # [K, N, V]
    log_teacher = torch.logsumexp(log_p + log_weights(teacher), dim=0)
    log_student = torch.logsumexp(log_p + log_weights(student), dim=0)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def _gates_probabilities(logits: Logits, teacher: Tensor, student: Tensor) -> Tensor:
    above, below = _mixture(logits, teacher), _mixture(logits, student)
    return (above * (above.log() - below.log())).sum(-1).mean()


def _gates_matmul(logits: Logits, teacher: Tensor, student: Tensor) -> Tensor:
    p = torch.stack([F.softmax(wide(z), dim=-1) for z in logits], dim=1)  # [N, K, V]
    gates = torch.stack([F.softmax(teacher, -1), F.softmax(student, -1)], dim=1)  # [N, 2, K]
    above, below = (gates @ p).unbind(1)
    return (above * torch.log(above / below)).sum(-1).mean()


def _weighted_experts(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Argument, ...]:  # logits, weight logits
    return draw_logits(shape, dtype, generator), draw_gate(shape, generator)


def _student_and_teacher(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Argument, ...]:  # student, teacher
    return tuple(draw_logits(shape, dtype, generator))


def _two_gates(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Argument, ...]:  # logits, teacher's gate logits, student's gate logits
    logits = draw_logits(shape, dtype, generator)
    return logits, draw_gate(shape, generator), draw_gate(shape, generator)


_BYTES = {
    "forward": "K N V e",
    "frozen": "K N V e",
    "backward": "2 K N V e",
    "forward_backward": "3 K N V e",
}

JSD = Benchmark(
    op="jsd",
    ours=_jsd,
    formulations=JSD_FORMULATIONS,
    compiled=("kl_div", "probabilities"),
    truth="probabilities",
    inputs=_weighted_experts,
    by_row=(True, True),
    trained=lambda logits, weight_logits: logits,
    gate=lambda logits, weight_logits: [weight_logits],
    shape=Shape(rows=256, experts=4, vocab=32000),
    bytes=_BYTES,
)

# Distillation: the teacher is frozen, so that one of two gradients is written.
GENERALIZED_JSD = Benchmark(
    op="generalized_jsd",
    ours=_generalized_jsd,
    formulations={name: _two_way(form) for name, form in JSD_FORMULATIONS.items()},
    compiled=("kl_div", "probabilities"),
    truth="probabilities",
    inputs=_student_and_teacher,
    by_row=(True, True),
    trained=lambda student, teacher: [student],
    gate=None,
    shape=Shape(rows=256, experts=2, vocab=32000),
    bytes={
        "forward": "2 N V e",
        "backward": "3 N V e",
        "forward_backward": "5 N V e",
    },
    peers=(TRL_JSD, TRL_JSD_FLOAT32, LIGER_JSD),
)

MIXTURE_KL = Benchmark(
    op="mixture_kl",
    ours=rg.mixture_kl,
    formulations={
        "kl_div": _gates_kl_div,
        "probabilities": _gates_probabilities,
        "matmul": _gates_matmul,
    },
    compiled=("probabilities", "matmul"),
    truth="probabilities",
    inputs=_two_gates,
    by_row=(True, True, True),
    trained=lambda logits, teacher, student: logits,
    gate=lambda logits, teacher, student: [student],
    shape=Shape(rows=256, experts=4, vocab=32000),
    bytes=_BYTES,
)
