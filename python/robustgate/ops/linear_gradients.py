"""Gradients of hidden states, heads and biases, from the gradients of tiles of logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from robustgate.ops.linear import (
    Head,
    HeadGradients,
    Needs,
    Rows,
    Tile,
    Tiling,
    add_product,
    plan,
    tiles,
)

# What a tile's logits receive, per head; None where nothing is needed.
TileGradient = Callable[[Tile], Sequence[Tensor | None]]


def gradients(
    heads: Sequence[Head],
    rows: Rows,
    needs: Sequence[Needs],
    workspace: int,
    tile_gradient: TileGradient,
) -> list[HeadGradients]:
    """Return the gradients that are needed, per head, recomputing the logits tile by tile.

    A head's gradient is summed over the rows of a block of columns, a hidden state's over the
    columns of a band of rows, both in the dtype of the sums. Where one walk over the tiles cannot
    hold both sums within the workspace there are two walks.
    """
    if not any(any(need) for need in needs):
        return [(None, None, None)] * len(heads)
    tiling = plan(heads, rows.count, workspace, gradients=True)
    hidden = [
        h.hidden.new_zeros(rows.total, h.hidden.shape[-1]) if need[0] else None
        for h, need in zip(heads, needs, strict=True)
    ]
    # Per head: weight and bias.
    heads_out = [
        (
            h.weight.new_zeros(h.weight.shape) if need[1] else None,
            h.bias.new_zeros(h.bias.shape) if need[2] and h.bias is not None else None,
        )
        for h, need in zip(heads, needs, strict=True)
    ]
    in_place = rows.index is None and all(h.hidden.dtype == h.dtype for h in heads)
    everything = slice(0, rows.count)
    one_walk = in_place or tiling.block >= rows.count or not any(need[0] for need in needs)
    if one_walk:
        _walk(heads, rows, tiling, everything, tile_gradient, hidden, heads_out)
    else:
        for start in range(0, rows.count, tiling.block):
            band = slice(start, min(rows.count, start + tiling.block))
            _walk(heads, rows, tiling, band, tile_gradient, hidden, [(None, None)] * len(heads))
        if any(need[1] or need[2] for need in needs):
            nothing: list[Tensor | None] = [None] * len(heads)
            _walk(heads, rows, tiling, everything, tile_gradient, nothing, heads_out)
    return [
        (None if h is None else h.view(head.hidden.shape), *out)
        for head, h, out in zip(heads, hidden, heads_out, strict=True)
    ]


def _walk(
    heads: Sequence[Head],
    rows: Rows,
    tiling: Tiling,
    band: slice,
    tile_gradient: TileGradient,
    hidden: Sequence[Tensor | None],  # K x [N, H_k]
    heads_out: Sequence[tuple[Tensor | None, Tensor | None]],  # K x ([V, H_k], [V])
) -> None:
    """Visit every tile of a band of rows and add what it gives to the gradients."""
    states = [_Sum(out, head) for out, head in zip(hidden, heads, strict=True)]
    for total in states:
        total.begin(band, in_place=rows.index is None)
    weights = [
        [_Sum(out, head) for out in outs] for outs, head in zip(heads_out, heads, strict=True)
    ]
    for tile in tiles(heads, rows, tiling, band):
        if tile.rows.start == band.start:
            for weight, bias in weights:
                weight.begin(tile.columns)
                bias.begin(tile.columns)
        part = slice(tile.rows.start - band.start, tile.rows.stop - band.start)
        for k, dz in enumerate(tile_gradient(tile)):
            if dz is None:
                continue
            weight, bias = weights[k]
            if (state := states[k].total) is not None:
                add_product(state[part], dz, tile.weight[k])
            if weight.total is not None:
                add_product(weight.total, dz.t(), tile.hidden[k])
            if bias.total is not None:
                bias.total.add_(dz.sum(0))
        if tile.rows.stop == band.stop:
            for weight, bias in weights:
                weight.end()
                bias.end()
    for total in states:
        total.end(rows)


class _Sum:
    """A sum over tiles of one part of a gradient, in the dtype of the sums.

    Where the gradient has that dtype the sum is a view of it, else it is copied at the end.
    """

    def __init__(self, out: Tensor | None, head: Head) -> None:
        self.out, self.dtype = out, head.dtype
        self.total: Tensor | None = None

    def begin(self, part: slice, *, in_place: bool = True) -> None:
        if self.out is None:
            return
        self.part, self.is_view = part, in_place and self.out.dtype == self.dtype
        if self.is_view:
            self.total = self.out[part]
        else:
            shape = (part.stop - part.start, *self.out.shape[1:])
            self.total = self.out.new_zeros(shape, dtype=self.dtype)

    def end(self, rows: Rows | None = None) -> None:
        """Copy the sum to its part of the gradient, which counts ``rows`` where they are given."""
        if self.out is None or self.total is None or self.is_view:
            return
        if rows is None:
            self.out[self.part] = self.total
        else:
            rows.store(self.out, self.part, self.total)
        self.total = None
