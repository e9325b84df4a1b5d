"""The inputs of one measurement, and the float64 truth that every variant has to meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustgate.bench.benchmark import Argument, Benchmark, Function, Shape
from robustgate.bench.measure import Call, Result, without_preparation

Arguments = tuple[Argument, ...]


@dataclass(frozen=True)
class Case:
    """Inputs on a device, what is differentiated, and what should come out.

    Attributes:
        mode: what :meth:`call` times, a name of :data:`robustgate.bench.benchmark.MODES`.
        arguments: of every variant.
        leaves: the tensors that ``mode`` differentiates; empty for ``forward``.
        upstream: the gradient of a value that is not a scalar.
        truth: float64, of one block of rows where a tensor has one entry per row.
        gradient_scale: by what a block's gradients exceed those of all rows: a mean is taken.
    """

    mode: str
    arguments: Arguments
    leaves: tuple[Tensor, ...]
    upstream: Tensor | None
    truth: Result
    gradient_scale: float

    def call(self, function: Function) -> Call:
        """Return what is timed of a variant."""

        def forward() -> Result:
            with torch.no_grad():
                return (function(*self.arguments),)

        def value() -> Tensor:
            return function(*self.arguments)

        def backward(value: Tensor) -> Result:
            return torch.autograd.grad(value, self.leaves, self.upstream)

        if self.mode == "forward":
            return without_preparation(forward)
        if self.mode == "backward":
            return Call(value, backward)
        return without_preparation(lambda: backward(value()))

    def error(self, result: Result) -> float:
        """Return the largest relative L2 error of the tensors of a result."""
        return max(self._error(*pair) for pair in zip(result, self.truth, strict=True))

    def _error(self, got: Tensor, want: Tensor) -> float:
        if not got.dim():
            return float((got.double() - want).abs() / want.abs().clamp_min(1e-300))
        blocks = got.detach().split(len(want))
        scale = self.gradient_scale if self.leaves and got.shape != want.shape else 1.0
        square = sum(float((b.double() * scale - want).square().sum()) for b in blocks)
        norm = float(want.square().sum()) * len(blocks)
        return math.sqrt(square / max(norm, 1e-300))


def make_case(
    benchmark: Benchmark, shape: Shape, dtype: torch.dtype, mode: str, device: torch.device
) -> Case:
    """Draw the inputs of a measurement and compute their truth.

    A block of rows is drawn and repeated until there are N: each is a row of its own in memory,
    and the block's truth is that of the whole, so that variants are checked at the size at which
    they are timed.
    """
    generator = torch.Generator().manual_seed(0)
    largest = min(benchmark.block, shape.rows)
    block = next(rows for rows in range(largest, 0, -1) if shape.rows % rows == 0)
    drawn = benchmark.inputs(replace(shape, rows=block), dtype, generator)
    upstream, truth = _truth(benchmark, _map(_exact, drawn), mode, generator)
    repeats = shape.rows // block

    def whole(values: Tensor) -> Tensor:
        return values.to(device).repeat(repeats, *[1] * (values.dim() - 1))

    arguments = tuple(
        _map(whole if by_row else lambda values: values.to(device), (argument,))[0]
        for argument, by_row in zip(drawn, benchmark.by_row, strict=True)
    )
    return Case(
        mode=mode,
        arguments=arguments,
        leaves=_leaves(benchmark, mode, arguments),
        upstream=None if upstream is None else whole(upstream.float()),
        truth=tuple(tensor.to(device) for tensor in truth),
        gradient_scale=repeats if upstream is None else 1.0,
    )


def _truth(
    benchmark: Benchmark, exact: Arguments, mode: str, generator: torch.Generator
) -> tuple[Tensor | None, Result]:
    """Return the gradient of the value (None for a scalar) and what ``mode`` should give."""
    leaves = _leaves(benchmark, mode, exact)
    value = benchmark.formulations[benchmark.truth](*exact)
    upstream = None
    if value.dim():
        upstream = torch.randn(value.shape, generator=generator).double()
    if not leaves:
        return upstream, (value,)
    return upstream, torch.autograd.grad(value, leaves, upstream)


def _leaves(benchmark: Benchmark, mode: str, arguments: Arguments) -> tuple[Tensor, ...]:
    """Return the tensors that a mode differentiates, which now require a gradient."""
    if mode == "forward":
        return ()
    pick = benchmark.gate if mode == "frozen" else benchmark.trained
    if pick is None:
        raise ValueError(f"{benchmark.op}: there is no gate to differentiate")
    return tuple(leaf.requires_grad_() for leaf in pick(*arguments))


def _exact(values: Tensor) -> Tensor:
    return values.detach().double() if values.is_floating_point() else values


def _map(function: Callable[[Tensor], Tensor], arguments: Sequence[Argument]) -> Arguments:
    return tuple(
        [function(x) for x in argument] if isinstance(argument, list) else function(argument)
        for argument in arguments
    )
