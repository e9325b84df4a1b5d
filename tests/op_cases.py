"""Inputs and the float64 truth shared by the op tests.

The truth is torch in float64 on the same rounded inputs, through autograd, written here a second
time and independently of robustgate.ops.reference and robustgate.ops.divergence_reference.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import robustgate as rg
from robustgate.ops.library import serving

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What runs on a CPU; test_instruction_sets.py reruns "native" for each instruction set.
BACKENDS = os.environ.get("ROBUSTGATE_TEST_BACKENDS", "native,eager").split(",")
# Kernels for GPUs read 16 bytes at once from the first boundary in a row, so that the order of a
# sum depends on where the row starts; those for CPUs sum every row in one order.
ONE_ORDER = "CUDA_ON_CPU_EXTENSION" not in os.environ and "triton" not in BACKENDS


@contextmanager
def on_backend(name: str, *raw_ops: str):
    """Run a block on a backend; skip the test where native kernels of ``raw_ops`` are missing."""
    served = serving("cpu")
    missing = [op for op in raw_ops if name not in served[op]]
    if missing:
        pytest.skip(f"no {name} CPU kernel is registered for {', '.join(missing)}")
    with rg.backend(name):
        yield


def backend_fixture(*raw_ops: str):
    """Return an autouse fixture that runs every test of a module on each backend."""

    @pytest.fixture(params=BACKENDS, autouse=True)
    def backend(request):
        with on_backend(request.param, *raw_ops):
            yield request.param

    return backend


def assert_same(got: Tensor, want: Tensor) -> None:
    """The same arithmetic on rows that lie elsewhere: bit for bit, or float32 rounding on GPUs."""
    if ONE_ORDER:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=3e-6, atol=3e-6)


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

    def to(self, device: str) -> "Case":
        moved = [z.to(device) for z in self.logits]
        return Case(moved, self.gate.to(device), self.target.to(device), self.vocab_size)

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


def simplex(*shape: int, seed: int = 0) -> Tensor:  # [..., K]
    """Positive weights, multiples of 2^-12 that sum to exactly 1 in any floating dtype but half."""
    experts = shape[-1]
    g = torch.Generator().manual_seed(seed)
    rest = torch.softmax(torch.randn(*shape, generator=g), -1)[..., 1:] * (4096 - experts)
    rest = (rest.floor() + 1) / 4096
    return torch.cat([1 - rest.sum(-1, keepdim=True), rest], -1)


def leaves(tensors, dtype=torch.float64) -> list[Tensor]:
    """Copies that require gradients, in float64 for the truth."""
    return [x.detach().clone().to(dtype).requires_grad_() for x in tensors]


def gradients(value: Tensor, tensors, upstream: Tensor | None = None, **options) -> list[Tensor]:
    """Gradients of ``(upstream * value).sum()``."""
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return list(torch.autograd.grad(value, tensors, upstream, **options))


def true_log_probs(logits, vocab_size=None, temperature=1.0, softcap=None) -> Tensor:
    """The experts' log-probs of every column, [..., V, K]."""
    columns = []
    for z in logits:
        z = z.double() if vocab_size is None else z[..., :vocab_size].double()
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        columns.append(torch.log_softmax(z / temperature, -1))
    return torch.stack(columns, -1)


def true_expert_log_prob(case: Case, temperature=1.0, softcap=None, ignore_index=-100) -> Tensor:
    ignored = case.target == ignore_index
    index = case.target.masked_fill(ignored, 0)[..., None, None]
    log_p = true_log_probs(case.logits, case.vocab_size, temperature, softcap)
    index = index.expand(*index.shape[:-1], log_p.shape[-1])
    return torch.where(ignored.unsqueeze(-1), 0.0, log_p.gather(-2, index).squeeze(-2))


def true_mixture_nll(case: Case, **kwargs) -> Tensor:
    ignored = case.target == kwargs.get("ignore_index", -100)
    log_prob = true_expert_log_prob(case, **kwargs)
    nll = -torch.logsumexp(torch.log_softmax(case.gate.double(), -1) + log_prob, -1)
    return torch.where(ignored, 0.0, nll)


def true_mixture_log_softmax(logits, gate: Tensor, **options) -> Tensor:  # [..., V]
    """-inf, with gradient 0, in columns that no expert contributes to."""
    log_gate = torch.log_softmax(gate.double(), -1).unsqueeze(-2)
    joint = log_gate + true_log_probs(logits, **options)
    nothing = torch.isneginf(joint).all(-1, keepdim=True)
    log_m = torch.logsumexp(joint.masked_fill(nothing, 0.0), -1)
    return log_m.masked_fill(nothing.squeeze(-1), -torch.inf)


def _xlogy_ratio(p: Tensor, log_p: Tensor, m: Tensor) -> Tensor:
    """``p log(p / m) - p + m``, with gradients; m where p = 0, +inf where m = 0 < p."""
    counted = (p > 0) & (m > 0)
    log_m = torch.log(torch.where(m > 0, m, 1.0))
    terms = torch.where(counted, p * (torch.where(counted, log_p, 0.0) - log_m), 0.0) - p + m
    return torch.where((p > 0) & (m == 0), torch.inf, terms)


def true_kl(logits, weights: Tensor, **options) -> Tensor:  # [..., K]
    """KL(p_k || m); its gradient for raw weights is that of sum_v p log(p/m) - p + m."""
    log_p = true_log_probs(logits, **options)
    p = torch.exp(log_p)
    m = (weights.double().unsqueeze(-2) * p).sum(-1, keepdim=True)
    return _xlogy_ratio(p, log_p, m).sum(-2)


def true_jsd(logits, weights: Tensor, **options) -> Tensor:  # [...]
    w = weights.double()
    kl = true_kl(logits, weights, **options)
    # torch.where has gradient 0 for a weight of 0; the gradient there is still KL_k.
    return (w * torch.where(torch.isinf(kl), 0.0, kl)).sum(-1)


def true_mixture_kl(logits, teacher: Tensor, student: Tensor, **options) -> Tensor:  # [...]
    p = torch.exp(true_log_probs(logits, **options))
    g = torch.softmax(teacher.double().detach(), -1).unsqueeze(-2)
    gamma = torch.softmax(student.double(), -1).unsqueeze(-2)
    m, q = (g * p).sum(-1), (gamma * p).sum(-1)
    return _xlogy_ratio(m, torch.log(torch.where(m > 0, m, 1.0)), q).sum(-1)


def _phi(t: Tensor) -> Tensor:
    """(1 + t) log(1 + t) - t; the series' first missing term is below 1e-13 of the value."""
    series = t * t * (1 / 2 - t * (1 / 6 - t * (1 / 12 - t * (1 / 20 - t / 30))))
    return torch.where(t.abs() < 1e-3, series, torch.xlogy(1 + t, 1 + t) - t)


def exact_jsd(logits, weights: Tensor, **options) -> Tensor:
    """The JSD of near-equal experts, from differences that do not cancel.

    sum_k w_k sum_v m phi(p_k / m - 1), p_k - m = sum_j w_j p_j expm1(l_k - l_j). Probabilities
    of 0 are e^-300 here.
    """
    log_p = true_log_probs(logits, **options).detach().clamp_min(-300.0)
    w = weights.double().unsqueeze(-2)
    w = w / w.sum(-1, keepdim=True)
    wp = w * torch.exp(log_p)
    m = wp.sum(-1)
    value = 0.0
    for k in range(len(logits)):
        t = (wp * torch.expm1(log_p[..., k : k + 1] - log_p)).sum(-1) / m
        value = value + (w[..., k] * m * _phi(t)).sum(-1)
    return value


def exact_mixture_kl(logits, teacher: Tensor, student: Tensor, **options) -> Tensor:
    """KL(m_g || m_gamma) from sum_k (g_k - gamma_k) (p_k - p_0), which does not cancel."""
    log_p = true_log_probs(logits, **options).detach().clamp_min(-300.0)
    g, gamma = (torch.softmax(a.double(), -1).unsqueeze(-2) for a in (teacher, student))
    q = (gamma * torch.exp(log_p)).sum(-1)
    relative = (g - gamma) * torch.expm1(log_p - log_p[..., :1])
    return (q * _phi(torch.exp(log_p[..., 0]) * relative.sum(-1) / q)).sum(-1)


def true_heads(hidden, lm_head, bias=None) -> list[Tensor]:  # K x [..., V]
    """Logits of language-model heads."""
    logits = [h.double() @ w.double().mT for h, w in zip(hidden, lm_head, strict=True)]
    return logits if bias is None else [z + b.double() for z, b in zip(logits, bias, strict=True)]


def make_heads(shape=(5,), widths=(24, 16), vocab=97, dtype=torch.float32, padding=0, seed=0):
    """Hidden states, heads and biases, K of each; logits of size 3 or so, garbage in the padding.

    Returns (hidden K x [..., H_k], lm_head K x [V_k, H_k], bias K x [V_k]).
    """
    g = torch.Generator().manual_seed(seed)
    hidden, lm_head, bias = [], [], []
    for k, width in enumerate(widths):
        rows = vocab + padding * k
        hidden.append(torch.randn(*shape, width, generator=g).to(dtype))
        weight = torch.randn(rows, width, generator=g) * 3 / width**0.5
        weight[vocab:] = 1e3  # would dominate if it were read
        lm_head.append(weight.to(dtype))
        bias.append(torch.randn(rows, generator=g).to(dtype))
    return hidden, lm_head, bias


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Relative L2 error; 0 where both are 0."""
    got, truth = got.detach().double(), truth.detach().double()
    norm, error = truth.norm(), (got - truth).norm()
    return float(error / norm) if norm > 0 else float(error)


def rounding(dtype: torch.dtype) -> float:
    """Relative L2 error that rounding a gradient to ``dtype`` causes: at most half an ulp."""
    return torch.finfo(dtype).eps / 2


def assert_gradient(got: Tensor, truth: Tensor, relative: float, scale: float = 0.0) -> None:
    """The gradient is right to ``relative`` in L2, and to its dtype's rounding.

    ``scale`` is the L2 norm of the factors of a difference of log-probs that the gradient holds.
    Where they cancel, the error of a float32 log-prob stays: 1e-6 (float64: 1e-14 for |z| < 50).
    float16 rounds small numbers to multiples of 2^-24.
    """
    bound = (relative + rounding(got.dtype)) * float(truth.norm())
    bound += (1e-14 if got.dtype == torch.float64 else 1e-6) * scale
    if got.dtype == torch.float16:
        bound += 2.0**-25 * got.numel() ** 0.5
    error = float((got.double() - truth).norm())
    assert error <= bound, f"error {error:.3g} of {float(truth.norm()):.3g}, allowed {bound:.3g}"
