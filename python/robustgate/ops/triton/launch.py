"""What launchers share: rows by address, the logits' transform, block sizes, the device.

A launch never waits for the device, and copies logits only where their columns are not next to
each other. The kernels name what follows the batch (rows, rows in a block) ``do_not_specialize``:
Triton would compile them once more for 1, and for multiples of 16. The heuristics are explained in
docs/triton.md.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

# Fused multiply-adds by name: no process-wide setting is touched, and Triton 3.9 does not warn.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Rows:
    """K tensors of rows, each with its own strides, and what they share."""

    tensors: tuple[Tensor, ...]  # K x [..., V_k]
    outer: tuple[int, ...]  # K, elements from one block of rows to the next
    inner: tuple[int, ...]  # K, elements from row to row within a block
    inner_rows: int  # rows in a block

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The kernels' arguments (tensors, outer, inner, inner_rows)."""
        return self.tensors, self.outer, self.inner, self.inner_rows

    def row_bytes(self, vocab_size: int) -> int:
        """Return the bytes of one row of every expert."""
        return len(self.tensors) * vocab_size * self.tensors[0].element_size()


def address_rows(logits: Sequence[Tensor]) -> Rows:
    """Address [V], [N, V] and [B, T, V] rows in place; other layouts are copied."""
    tensors, outer, inner = [], [], []
    for z in logits:
        z = z.detach()
        if z.dim() > 3:
            z = z.flatten(0, -3)
        if z.stride(-1) != 1 and z.shape[-1] != 1:
            z = z.contiguous()
        strides = z.stride()
        tensors.append(z)
        outer.append(strides[0] if len(strides) == 3 else 0)
        inner.append(strides[-2] if len(strides) >= 2 else 0)
    first = tensors[0]
    inner_rows = first.shape[-2] if first.dim() >= 2 else 1
    return Rows(tuple(tensors), tuple(outer), tuple(inner), max(inner_rows, 1))


def fresh_gradients(
    logits: Sequence[Tensor], needs_grad: Sequence[bool], vocab_size: int
) -> tuple[list[Tensor], Rows, int]:
    """Return gradients of the experts that need one, all experts' rows, and who needs one as bits.

    Columns beyond the vocabulary are zeroed here. Where no gradient is needed the logits' own first
    column stands in its place, and the kernel, compiled for these bits, does not touch it.
    """
    grads, places, bits = [], [], 0
    for k, (z, needed) in enumerate(zip(logits, needs_grad, strict=True)):
        if not needed:
            places.append(z[..., :1])  # whatever the layout, there is nothing to copy
            continue
        grad = torch.empty_like(z, memory_format=torch.contiguous_format)
        if z.shape[-1] > vocab_size:
            grad[..., vocab_size:] = 0
        grads.append(grad)
        places.append(grad)
        bits |= 1 << k
    return grads, address_rows(places), bits


@dataclass(frozen=True)
class Settings:
    """The scalars of an op over logits, as the raw ops take them."""

    vocab_size: int
    ignore_index: int
    temperature: float
    softcap: float | None

    @property
    def transform(self) -> tuple[float, ...]:
        """What the kernels call ``transform``."""
        return transform(self.temperature, self.softcap)

    @property
    def flags(self) -> dict[str, bool]:
        """Compile-time facts: is there a softcap, is there a part of a vector at a row's end."""
        return {"CAP": self.softcap is not None, "TAIL": self.vocab_size % 16 != 0}


@lru_cache(maxsize=64)  # a temperature may be annealed
def transform(temperature: float, softcap: float | None) -> tuple[float, ...]:
    """Return the numbers that algebra.py reads ``z' = softcap tanh(z / softcap) / temperature`` by.

    float64 values come as two float32 parts: Triton passes floats as float32.
    """
    cap = softcap or 1.0
    unit = cap / temperature
    scale = _float32(unit * math.log2(math.e))
    return (
        1.0 / cap,
        scale,
        *_two_parts(unit),
        *_two_parts(1.0 / unit),
        unit * math.log2(math.e) / scale - 1.0,
        1.0 / temperature,
    )


def _float32(x: float) -> float:
    return ctypes.c_float(x).value


def _two_parts(x: float) -> tuple[float, float]:
    return _float32(x), x - _float32(x)


def block_of(columns: int, limit: int) -> int:
    """Return the power of two that covers the columns, between 16 and a limit."""
    return max(16, min(limit, 1 << (columns - 1).bit_length()))


def row_block(vocab_size: int) -> int:
    """Return the columns a step of a pass over one expert's row: 16 a thread of 256."""
    return block_of(vocab_size, 4096)


def column_block(vocab_size: int, experts: int, values: int) -> int:
    """Return the columns of a step over every expert: so many values, at least 128 columns."""
    return block_of(vocab_size, max(128, values // (1 << (experts - 1).bit_length())))


def resident_programs(like: Tensor, row_bytes: int, rows: int) -> int:
    """Return how many programs take the rows of a two-pass kernel, one row after another.

    As many as have their rows in the L2 cache, so that the second pass finds them there; at least
    one a multiprocessor, for below that no device draws its memory's full rate, and at most four.
    """
    if like.device.type == "cpu":
        return rows
    multiprocessors, cache_bytes = _device(*_place(like))
    fitting = cache_bytes * 3 // 4 // max(row_bytes, 1)
    return min(rows, max(multiprocessors, min(fitting, 4 * multiprocessors)))


def parts_of(like: Tensor, row_blocks: int, tiles: int, per_processor: int) -> int:
    """Return how many programs share the columns of a block of rows, to fill the device."""
    multiprocessors = 1 if like.device.type == "cpu" else _device(*_place(like))[0]
    wanted = -(-per_processor * multiprocessors // row_blocks)
    return max(1, min(wanted, tiles))


def _place(like: Tensor) -> tuple[str, int]:
    return like.device.type, like.device.index or 0


@cache
def _device(device_type: str, index: int) -> tuple[int, int]:
    """Return multiprocessors and bytes of L2 cache; assumed where a device does not say."""
    properties = torch.get_device_module(device_type).get_device_properties(index)
    multiprocessors = getattr(properties, "multi_processor_count", None)
    multiprocessors = multiprocessors or getattr(properties, "gpu_subslice_count", None) or 64
    return multiprocessors, getattr(properties, "L2_cache_size", None) or 8 << 20


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels run on the tensor's device."""
    if tensor.device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(tensor.device)
    guard: AbstractContextManager[Any] = module.device(tensor.device)
    return guard
