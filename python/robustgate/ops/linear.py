"""Language-model heads in tiles: what the linear ops share.

The logits of expert k are ``hidden_k @ lm_head_k^T (+ bias_k)``, [N, V]; they are never held whole.
A tile is a block of rows and of columns, its logits in float32 whatever the inputs are (float64 for
float64): products rounded to bfloat16 cost a divergence's gradient several per cent. Sums over
tiles (log-sum-exps, gradients of hidden states and heads) are float32 or better too. On CUDA the
operands of 16 bits go to the tensor cores as they are, which add their exact products in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows and columns of a tile: large enough for a GEMM's full speed, and on a GPU for the launches
# around it to go unnoticed.
_CPU_TILE = 512, 2048  # 4 MiB of float32
_GPU_TILE = 4096, 8192  # 128 MiB

# In a raw op's schema; the biases are none or K.
HEADS = "Tensor[] hidden, Tensor[] lm_head, Tensor[] bias"

Needs = tuple[bool, bool, bool]  # whether hidden states, weight and bias need a gradient
HeadGradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def split(tensors: Sequence[Tensor], experts: int) -> tuple[list[Tensor], ...]:
    """Return hidden states, heads and biases from their concatenation."""
    return (
        list(tensors[:experts]),
        list(tensors[experts : 2 * experts]),
        list(tensors[2 * experts :]),
    )


def needs_of(needs_grad: Sequence[bool], experts: int) -> list[Needs]:
    """Return per expert what :func:`split` says of the concatenation."""
    padded = [*needs_grad, *[False] * (3 * experts - len(needs_grad))]
    return [(padded[k], padded[experts + k], padded[2 * experts + k]) for k in range(experts)]


def collect(per_head: Sequence[HeadGradients]) -> list[Tensor]:
    """Return the gradients that exist: all hidden states', then all heads', then all biases'."""
    return [x for kind in zip(*per_head, strict=True) for x in kind if x is not None]


@dataclass(frozen=True)
class Rows:
    """The rows of a batch that count, in order.

    On a CPU ignored rows are left out; elsewhere looking for them would wait for the device, so
    that every row is computed and the ignored ones are zeroed at the end.
    """

    total: int
    index: Tensor | None  # [count] flat positions; None: every row

    @staticmethod
    def counted(target: Tensor | None, total: int, ignore_index: int) -> Rows:
        """Return the rows whose target is not ``ignore_index``."""
        if target is None or target.device.type != "cpu":
            return Rows(total, None)
        index = (target.flatten() != ignore_index).nonzero().flatten()
        return Rows(total, None if len(index) == total else index)

    @property
    def count(self) -> int:
        """The number of rows that count."""
        return self.total if self.index is None else len(self.index)

    def pick(self, values: Tensor) -> Tensor:
        """Return the rows that count of [N, ...]."""
        return values if self.index is None else values[self.index]

    def spread(self, values: Tensor) -> Tensor:
        """Return [count, ...] as [N, ...], 0 in the other rows."""
        if self.index is None:
            return values
        out = values.new_zeros((self.total, *values.shape[1:]))
        return out.index_copy_(0, self.index, values)

    def store(self, out: Tensor, block: slice, values: Tensor) -> None:
        """Write a block of the rows that count into [N, ...]."""
        if self.index is None:
            out[block] = values
        else:
            out.index_copy_(0, self.index[block], values.to(out.dtype))


@dataclass(frozen=True)
class Head:
    """One expert's hidden states and language-model head."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [>= V, H]
    bias: Tensor | None  # [>= V]
    vocab: int  # V, rows of the weight beyond it are padding

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits and sums."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def operand(self) -> torch.dtype:
        """The dtype in which hidden states and weight enter the products."""
        same = self.hidden.dtype == self.weight.dtype
        return self.hidden.dtype if same and widens(self.hidden) else self.dtype

    def buffer(self, size: int) -> Tensor:
        """Return memory for tiles of logits."""
        return torch.empty(size, dtype=self.dtype, device=self.hidden.device)

    def hidden_tile(self, rows: Rows, block: slice) -> Tensor:  # [R, H]
        """Return a block of the rows that count; copies no more than that block."""
        width = self.hidden.shape[-1]
        if rows.index is None and self.hidden.is_contiguous():
            return self.hidden.view(-1, width)[block].to(self.operand)
        position = rows.index
        if position is None:
            position = torch.arange(rows.total, device=self.hidden.device)
        where = torch.unravel_index(position[block], self.hidden.shape[:-1])
        return self.hidden[where].to(self.operand)

    def weight_tile(self, columns: slice) -> Tensor:  # [C, H]
        """Return a block of the head's rows."""
        return self.weight[columns].to(self.operand)

    def logits(
        self,
        hidden: Tensor,  # [R, H]
        weight: Tensor,  # [C, H]
        columns: slice,
        out: Tensor,  # [R, C]
    ) -> None:
        """Write a tile of logits."""
        if hidden.dtype == out.dtype:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        if self.bias is not None:
            out.add_(self.bias[columns])


@dataclass(frozen=True)
class Tiling:
    """Sizes of tiles: rows R, columns C, and the rows B whose gradients are summed at a time."""

    rows: int
    columns: int
    block: int


def plan(
    heads: Sequence[Head],
    count: int,
    workspace: int,
    *,
    gradients: bool = False,
    whole_rows: bool = False,
) -> Tiling:
    """Choose tiles of the heads of a group so that everything allocated fits the workspace.

    Half is left to BLAS, to the raw ops, and to an allocator that keeps what a forward pass freed
    while the backward pass asks for more. Counted per head: tiles of logits (of all columns with
    ``whole_rows``), of their gradients, the copies of hidden states and weights in the dtype of the
    sums, and accumulators of gradients.
    """
    vocab, dtype = heads[0].vocab, heads[0].dtype
    width = max(head.weight.shape[1] for head in heads)
    copied = any(head.weight.dtype != dtype for head in heads)
    split = gradients and any(head.operand != dtype for head in heads)
    tile_rows, tile_columns = _CPU_TILE if heads[0].hidden.device.type == "cpu" else _GPU_TILE
    budget = workspace // 2 // dtype.itemsize // len(heads)
    block = max(count, 1)
    if gradients:
        block = max(1, min(count, budget // 4 // width))  # a quarter for the rows' gradients
        budget -= block * width
    rows, columns = max(1, min(block, tile_rows)), min(vocab, tile_columns)
    # Logits, their gradients, and what leads to them; the gradients' parts of 16 bits.
    tiles_held = 3 + split if gradients else 1
    weights_held = copied * (2 if gradients else 1)

    def used() -> int:
        return tiles_held * rows * columns + weights_held * columns * width + rows * width

    while used() > budget and columns > 1 and copied and columns * width > budget // 4:
        columns = (columns + 1) // 2
    if whole_rows:
        left = budget - weights_held * columns * width
        return Tiling(max(1, min(rows, left // (vocab + width))), columns, block)
    while used() > budget and (rows > 1 or columns > 1):
        if columns > 1 and (columns >= rows or rows == 1):
            columns = (columns + 1) // 2
        else:
            rows = (rows + 1) // 2
    return Tiling(rows, columns, block)


@dataclass(frozen=True)
class Tile:
    """A block of the rows that count and of columns; one entry per head."""

    rows: slice
    columns: slice
    hidden: list[Tensor]  # K x [R, H_k]
    weight: list[Tensor]  # K x [C, H_k]
    logits: list[Tensor]  # K x [R, C], valid until the next tile


def tiles(
    heads: Sequence[Head], rows: Rows, tiling: Tiling, band: slice | None = None
) -> Iterator[Tile]:
    """Yield the tiles of a band of rows (default: all), columns outside, reusing the memory."""
    first, last = (0, rows.count) if band is None else (band.start, band.stop)
    buffers = [head.buffer(tiling.rows * tiling.columns) for head in heads]
    for columns in blocks(0, heads[0].vocab, tiling.columns):
        weights = [head.weight_tile(columns) for head in heads]
        for block in blocks(first, last, tiling.rows):
            shape = (block.stop - block.start, columns.stop - columns.start)
            logits = [buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers]
            states = [head.hidden_tile(rows, block) for head in heads]
            for head, hidden, weight, out in zip(heads, states, weights, logits, strict=True):
                head.logits(hidden, weight, columns, out)
            yield Tile(block, columns, states, weights, logits)


def whole_rows(
    heads: Sequence[Head], rows: Rows, tiling: Tiling
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield (rows, each head's logits [R, V]) block by block, reusing the memory."""
    vocab = heads[0].vocab
    buffers = [head.buffer(tiling.rows * vocab) for head in heads]
    for block in blocks(0, rows.count, tiling.rows):
        size = block.stop - block.start
        out = [buffer[: size * vocab].view(size, vocab) for buffer in buffers]
        for head, tile in zip(heads, out, strict=True):
            hidden = head.hidden_tile(rows, block)
            for columns in blocks(0, vocab, tiling.columns):
                head.logits(hidden, head.weight_tile(columns), columns, tile[:, columns])
        yield block, out


def heads_of(
    hidden: Sequence[Tensor], lm_head: Sequence[Tensor], bias: Sequence[Tensor], vocab_size: int
) -> list[Head]:
    """Return the heads of the lists a raw op takes."""
    return [
        Head(h, w, bias[k] if bias else None, vocab_size)
        for k, (h, w) in enumerate(zip(hidden, lm_head, strict=True))
    ]


def blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of at most ``size``."""
    for first in range(start, stop, size):
        yield slice(first, min(stop, first + size))


def widens(tensor: Tensor) -> bool:
    """Return whether a product of two such tensors can be float32, made of exact products."""
    short = tensor.dtype in (torch.bfloat16, torch.float16)
    return short and tensor.device.type == "cuda" and torch.version.cuda is not None


def add_product(
    total: Tensor,  # [M, N]
    gradient: Tensor,  # [M, C], of the same dtype
    operand: Tensor,  # [C, N]
) -> None:
    """Add ``gradient @ operand`` to a sum.

    A float32 gradient meets an operand in bfloat16 as two bfloat16 parts, 16 bits together: two
    products on tensor cores, several times faster than one in float32.
    """
    if operand.dtype == torch.float16:  # too short a range for the parts of a gradient
        operand = operand.to(total.dtype)
    if operand.dtype == total.dtype:
        total.addmm_(gradient, operand)
        return
    high = gradient.to(operand.dtype)
    for part in (high, (gradient - high).to(operand.dtype)):
        total.add_(torch.mm(part, operand, out_dtype=total.dtype))


def no_autocast(device: torch.device) -> torch.autocast:
    """Return the context in which a matrix product keeps the dtype of its operands."""
    return torch.autocast(device.type, enabled=False)


def log_sum_exp(
    head: Head,
    rows: Rows,
    target: Tensor,  # [count]
    workspace: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # [count], [count] float64
    """Return the raw logit of each row's target and the log-sum-exp of its effective logits."""
    tiling = plan([head], rows.count, workspace)
    device = target.device
    lse = torch.full((rows.count,), -torch.inf, dtype=torch.float64, device=device)
    logit = torch.full((rows.count,), torch.nan, dtype=head.dtype, device=device)
    first = target.new_zeros(tiling.rows)
    for tile in tiles([head], rows, tiling):
        block, (z,) = tile.rows, tile.logits
        _, partial = torch.ops.robustgate.expert_log_prob(
            [z], first[: len(z)], z.shape[1], -1, temperature, softcap
        )
        lse[block] = torch.logaddexp(lse[block], partial[:, 0])
        local, inside = within(target[block], tile.columns)
        found = z.gather(1, local.unsqueeze(1)).squeeze(1)
        logit[block] = torch.where(inside, found, logit[block])
    return logit, lse


def within(target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return the targets relative to a block of columns (0 where outside), and which are inside."""
    inside = (target >= columns.start) & (target < columns.stop)
    return torch.where(inside, target - columns.start, 0), inside
