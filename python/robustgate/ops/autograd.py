"""Backward passes through opaque kernels: first derivatives only, and never wrong in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_REFUSAL = (
    "robustgate: second derivatives are not supported (its backward kernels are opaque to autograd,"
    " once_differentiable)"
)


Gradients = Sequence[Tensor | None]
Backward = Callable[..., Gradients]


def _raising(gradient: Tensor) -> Tensor:
    """Return a gradient whose own differentiation raises."""
    delayed: Callable[[Tensor], Tensor] = torch._C._functions.DelayedError(_REFUSAL, 1)
    return delayed(gradient.detach().requires_grad_())


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
        return tuple(None if x is None else _raising(x) for x in results)

    return run
