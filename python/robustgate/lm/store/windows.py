"""How documents are cut into slices, windows and batches: pure functions of their lengths.

A shard must come out bit for bit the same whatever was scored before it, so nothing here depends
on anything but the lengths of the documents in its own slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def slice_documents(
    offsets: Tensor,  # [n_docs + 1]
    slice_tokens: int,
) -> list[tuple[int, int]]:
    """Divide a corpus into runs of documents, each closed once it has ``slice_tokens`` tokens.

    Args:
        offsets: where each document starts, int64 [n_docs + 1].
        slice_tokens: at least 1.

    Returns:
        For each slice its first document and one behind its last.

    Example:
        >>> slice_documents(torch.tensor([0, 4, 6, 7]), slice_tokens=5)
        [(0, 2), (2, 3)]
    """
    count = len(offsets) - 1
    slices = []
    first = 0
    while first < count:
        enough = int(torch.searchsorted(offsets, int(offsets[first]) + slice_tokens))
        last = min(enough, count)
        slices.append((first, last))
        first = last
    return slices


def plan_windows(
    lengths: Tensor,  # [n_docs]
    window: int,
    stride: int,
) -> Tensor:  # [n_windows, 4]
    """Cut documents into windows so that every token is scored once.

    Window i of a document reads its inputs ``[i * stride, i * stride + window)``. The first window
    scores all its positions; the others score what their predecessor did not reach, so that each
    token sees at least ``window - stride`` tokens of its past, or all of it.

    Args:
        lengths: number of scored tokens of each document, int64 [n_docs]; input t predicts
            token t.
        window: how many tokens a model reads at once.
        stride: from 1 to ``window``.

    Returns:
        int64 [n_windows, 4]: document, start, end, first scored position.

    Example:
        >>> plan_windows(torch.tensor([5]), window=4, stride=2)
        tensor([[0, 0, 4, 0],
                [0, 2, 5, 4]])
    """
    rows = []
    for document, length in enumerate(lengths.tolist()):
        start, scored = 0, 0
        while scored < length:
            end = min(start + window, length)
            rows.append((document, start, end, scored))
            start, scored = start + stride, end
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


def plan_batches(
    lengths: Tensor,  # [n_windows]
    batch_tokens: int,
) -> list[Tensor]:
    """Gather windows of similar length, the longest first.

    Args:
        lengths: inputs of each window, int64 [n_windows].
        batch_tokens: the most inputs in a batch, padding included; a single longer window makes
            a batch of its own.

    Returns:
        Indices of windows, one int64 tensor for each batch.

    Example:
        >>> [batch.tolist() for batch in plan_batches(torch.tensor([3, 1, 3, 2]), batch_tokens=6)]
        [[0, 2], [3, 1]]
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    batches = []
    first = 0
    while first < len(order):
        count = max(1, batch_tokens // int(lengths[order[first]]))
        batches.append(order[first : first + count])
        first += count
    return batches


def plan_share(sizes: Sequence[int], part: int, parts: int) -> list[int]:
    """Choose the pieces of work that fall to one of several processes.

    Pieces stay in their order and each goes to exactly one process: neighbours, which need the
    same model, mostly to the same.

    Args:
        sizes: how long each piece takes, in any unit.
        part: which process, from 1 to ``parts``.
        parts: how many processes there are.

    Returns:
        Indices of pieces, ascending.

    Example:
        >>> [plan_share([4, 1, 1, 4, 2], part, parts=3) for part in (1, 2, 3)]
        [[0], [1, 2], [3, 4]]
    """
    total = sum(sizes)
    chosen, start = [], 0
    for index, size in enumerate(sizes):
        if (2 * start + size) * parts // (2 * total) == part - 1:  # where its middle lies
            chosen.append(index)
        start += size
    return chosen
