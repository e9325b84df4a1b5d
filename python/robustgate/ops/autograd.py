"""Backward passes through opaque kernels: first derivatives only, and never wrong in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]
Backward = Callable[..., Gradients]


class _FirstDerivative(torch.autograd.Function):
    """A gradient that depends on ``inputs`` in a way autograd cannot see."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        raise RuntimeError(
            "robustgate: second derivatives are not supported: the backward kernels are opaque to "
            "autograd (once_differentiable)"
        )


_apply: Callable[..., Tensor] = _FirstDerivative.apply


def once_differentiable(backward: Backward) -> Backward:
    """Make a second differentiation raise.

    torch's decorator of this name raises only where the incoming gradient requires one; a gradient
    penalty, whose incoming gradient is a constant, would lose its term without a word.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Gradients:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return results
        tensors = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        return tuple(None if x is None else _apply(x, *tensors) for x in results)

    return run
