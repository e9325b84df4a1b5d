"""The same losses in other packages. Nothing is imported before it is asked for.

Each is called the way its documentation shows; what it needs besides, such as a log-softmax, is
part of what is timed. See benchmarks/README.md for why each mode is or is not compared.
"""

from __future__ import annotations

import os
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from robustgate.bench.benchmark import Function, Peer
from robustgate.bench.ops.tensors import log_softmax

BETA = 0.5  # weight of the teacher in the two-way divergence

_EVERY = ("forward", "backward", "forward_backward")
_TOGETHER = ("forward_backward",)  # gradients are made in the forward pass


def _trl() -> Function:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the loss has no other home
    loss: Function = import_module("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss

    def mean(student: Tensor, teacher: Tensor) -> Tensor:  # [N, V] each
        return loss(student, teacher, beta=BETA, reduction="batchmean")

    return mean


def _trl_float32() -> Function:
    loss = _trl()
    return lambda student, teacher: loss(student.float(), teacher.float())


def _liger_jsd() -> Function:
    loss = import_module("liger_kernel.transformers.jsd").LigerJSD(beta=BETA)

    def with_log_softmax(student: Tensor, teacher: Tensor) -> Tensor:  # [N, V] each
        out: Tensor = loss(*log_softmax([student, teacher]))
        return out

    return with_log_softmax


def _liger_linear_jsd() -> Function:
    chunked = import_module("liger_kernel.chunked_loss")
    loss = chunked.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA)

    def soft(hidden: list[Tensor], heads: list[Tensor], weight_logits: Tensor) -> Tensor:
        labels = torch.zeros(len(hidden[0]), dtype=torch.int64, device=hidden[0].device)
        out: Tensor = loss(hidden[0], heads[0], hidden[1], heads[1], labels)
        return out

    return soft


def _liger_linear_cross_entropy() -> Function:
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

    def one_expert(hidden: list[Tensor], heads: list[Tensor], _: Tensor, target: Tensor) -> Tensor:
        out: Tensor = loss(heads[0], hidden[0], target)
        return out

    return one_expert


def _cce(implementation: str) -> Function:
    linear_cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy

    def one_expert(hidden: list[Tensor], heads: list[Tensor], _: Tensor, target: Tensor) -> Tensor:
        out: Tensor = linear_cross_entropy(hidden[0], heads[0], target, impl=implementation)
        return out

    return one_expert


def _torch_linear_cross_entropy() -> Function:
    try:
        options = torch.nn.LinearCrossEntropyOptions()
    except AttributeError:
        raise ImportError(
            f"torch {torch.__version__} has no chunked linear_cross_entropy"
        ) from None

    def one_expert(hidden: list[Tensor], heads: list[Tensor], _: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden[0], heads[0], target, options=options)

    return one_expert


TRL_JSD = Peer("TRL generalized_jsd_loss", "trl", _trl, _EVERY)
TRL_JSD_FLOAT32 = Peer(
    "TRL generalized_jsd_loss, float32", "trl", _trl_float32, _EVERY, narrow=True
)
LIGER_JSD = Peer("Liger-Kernel JSD", "liger-kernel", _liger_jsd, _TOGETHER, device="cuda")
LIGER_LINEAR_JSD = Peer(
    "Liger-Kernel chunked JSD", "liger-kernel", _liger_linear_jsd, _TOGETHER, experts=2
)
LIGER_LINEAR_CROSS_ENTROPY = Peer(
    "Liger-Kernel linear cross-entropy",
    "liger-kernel",
    _liger_linear_cross_entropy,
    _TOGETHER,
    experts=1,
    device="cuda",
)
CCE_COMPILED = Peer(
    "CCE torch_compile", "cut-cross-entropy", lambda: _cce("torch_compile"), _EVERY, experts=1
)
CCE = Peer("CCE", "cut-cross-entropy", lambda: _cce("cce"), _EVERY, experts=1, device="cuda")
TORCH_LINEAR_CROSS_ENTROPY = Peer(
    "torch linear_cross_entropy, chunked",
    "torch",
    _torch_linear_cross_entropy,
    _TOGETHER,
    experts=1,
)
