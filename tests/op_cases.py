"""Inputs and the float64 truth shared by the op tests.

The truth is torch in float64 on the same rounded inputs, through autograd, written here a second
time and independently of robustgate.ops.reference.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What runs on a CPU; test_instruction_sets.py reruns "native" for each instruction set.
BACKENDS = ["native", "eager"]


@dataclass
class Case:
    logits: list[Tensor]  # K x [..., V_k]
    gate: Tensor  # [..., K]
    target: Tensor  # [...]
    vocab_size: int

    def clone(self, requires_grad: bool = False) -> "Case":
        return Case(
            [z.detach().clone().requires_grad_(requires_grad) for z in self.logits],
            self.gate.detach().clone().requires_grad_(requires_grad),
            self.target,
            self.vocab_size,
        )

    def double(self) -> "Case":
        return Case(
            [z.double() for z in self.logits], self.gate.double(), self.target, self.vocab_size
        )


def make(
    shape=(5,), experts=3, vocab=97, dtype=torch.float32, scale=3.0, padding=0, seed=0
) -> Case:
    """Logits with outliers (one column in 50 is 4 times larger), ragged padding of garbage."""
    g = torch.Generator().manual_seed(seed)
    logits = []
    for k in range(experts):
        z = torch.randn(*shape, vocab + padding * k, generator=g) * scale
        z = torch.where(torch.rand(z.shape, generator=g) < 0.02, 4 * z, z)
        z[..., vocab:] = 1e4  # would dominate if it were read
        logits.append(z.to(dtype))
    target = torch.randint(0, vocab, shape, generator=g)
    return Case(logits, torch.randn(*shape, experts, generator=g), target, vocab)


def true_expert_log_prob(case: Case, temperature=1.0, softcap=None, ignore_index=-100) -> Tensor:
    case = case.double() if case.logits[0].dtype != torch.float64 else case
    ignored = case.target == ignore_index
    index = case.target.masked_fill(ignored, 0).unsqueeze(-1)
    columns = []
    for z in case.logits:
        z = z[..., : case.vocab_size]
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        columns.append(torch.log_softmax(z / temperature, -1).gather(-1, index).squeeze(-1))
    return torch.where(ignored.unsqueeze(-1), 0.0, torch.stack(columns, -1))


def true_mixture_nll(case: Case, **kwargs) -> Tensor:
    ignored = case.target == kwargs.get("ignore_index", -100)
    log_prob = true_expert_log_prob(case, **kwargs)
    nll = -torch.logsumexp(torch.log_softmax(case.gate.double(), -1) + log_prob, -1)
    return torch.where(ignored, 0.0, nll)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Relative L2 error; 0 where both are 0."""
    norm = truth.double().norm()
    error = (got.double() - truth.double()).norm()
    return float(error / norm) if norm > 0 else float(error)


def rounding(dtype: torch.dtype) -> float:
    """Relative L2 error that rounding a gradient to ``dtype`` causes: at most half an ulp."""
    return torch.finfo(dtype).eps / 2
