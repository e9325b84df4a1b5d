"""Sums of token log-probabilities within documents: what a causal gate has seen so far.

Shape letters: N tokens of all documents in one row after the other, K experts.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_CHUNK: Final = 16  # tokens summed one after the other; chunks are then joined by doubling


def document_starts(log_probs: Tensor, offsets: Tensor | None) -> Tensor:  # bool [N]
    """Mark the first token of every document among all N tokens."""
    tokens = log_probs.shape[:-1].numel()
    starts = torch.zeros(tokens, dtype=torch.bool, device=log_probs.device)
    if offsets is None:
        starts[:: max(1, log_probs.shape[-2])] = True
        return starts
    offsets = offsets.to(log_probs.device)
    if log_probs.dim() != 2:
        raise ValueError(
            f"log_probs: expected shape [T, K] with offsets, got {tuple(log_probs.shape)}"
        )
    check_offsets(offsets, tokens)
    first = offsets[:-1]
    starts[first[first < tokens]] = True  # an empty document at the end starts nowhere
    return starts


def check_offsets(
    offsets: Tensor,  # [n + 1]
    tokens: int,
) -> None:
    """Raise ValueError unless the offsets cut so many tokens into documents."""
    if (
        offsets.dim() != 1
        or len(offsets) == 0
        or int(offsets[0]) != 0
        or int(offsets[-1]) != tokens
        or bool((offsets[1:] < offsets[:-1]).any())
    ):
        raise ValueError(
            f"offsets: expected [n + 1] non-decreasing from 0 to {tokens}, "
            f"got {tuple(offsets.shape)} with ends {offsets[:1].tolist()} and "
            f"{offsets[-1:].tolist()}"
        )


def centred(log_values: Tensor) -> Tensor:  # [N, K]
    """Subtract each row's largest entry; a row of -inf stays -inf."""
    top = log_values.amax(dim=1, keepdim=True)
    return log_values - top.clamp(min=torch.finfo(log_values.dtype).min)  # -inf - -inf is NaN


def position_in_document(starts: Tensor) -> Tensor:  # bool [N] -> int64 [N]
    """Return each entry's distance from the last start at or before it."""
    index = torch.arange(len(starts), device=starts.device)
    return index - torch.where(starts, index, 0).cummax(dim=0).values


def evidence_before(
    log_probs: Tensor,  # [N, K]
    starts: Tensor,  # bool [N]
) -> Tensor:  # [N, K]
    """Return ``sum_{s<t} l_k(s)`` within each document, up to a constant shared by the experts.

    Documents are cut in chunks. Sums run token by token inside a chunk, and the chunks' totals are
    joined by doubling. Everything is centred on the best expert, so that numbers keep the size of
    the log-odds, not of the document's log-probability: that holds the error near 1e-13 however
    long the document. The additions behind a token's sum depend on its position in its own
    document alone, so results are bitwise the same alone, in a batch or packed.
    """
    experts = log_probs.shape[1]
    position = position_in_document(starts)  # [N]
    opens = position % _CHUNK == 0  # the first token of each of M chunks
    chunk = opens.cumsum(dim=0) - 1  # [N]
    slot = chunk * _CHUNK + position % _CHUNK  # [N], the token's row in the padded layout
    chunks = int(opens.sum())
    padded = log_probs.new_zeros(chunks * _CHUNK, experts).index_copy(0, slot, centred(log_probs))
    sums = padded.view(chunks, _CHUNK, experts).cumsum(dim=1)  # [M, chunk, K]
    carried = _totals_before(sums[:, -1], starts[opens]).unsqueeze(1)  # [M, 1, K]
    before = torch.cat([carried, carried + sums[:, :-1]], dim=1)  # [M, chunk, K]
    return before.view(-1, experts).index_select(0, slot)


def _totals_before(
    totals: Tensor,  # [M, K]
    starts: Tensor,  # bool [M]
) -> Tensor:  # [M, K]
    """Return the sum of all earlier rows of the same document, up to a constant per row.

    By doubling: after round r a row holds the sum over the 2^r rows before it.
    """
    position = position_in_document(starts)  # [M]
    longest = int(position.amax()) if len(starts) else 0
    before = torch.nn.functional.pad(totals[:-1], (0, 0, 1, 0))
    before = before.masked_fill(starts.unsqueeze(1), 0.0)
    shift = 1
    while shift <= longest:
        before = centred(before)
        inside = (position[shift:] >= shift).unsqueeze(1)
        earlier = torch.where(inside, before[:-shift], 0.0)
        before = torch.cat([before[:shift], before[shift:] + earlier])
        shift *= 2
    return centred(before)  # also where a longer neighbour asked for more rounds


def evidence_in_window(
    log_probs: Tensor,  # [N, K]
    starts: Tensor,  # bool [N]
    window: int,
) -> Tensor:  # [N, K]
    """Return the sum over the last ``window`` tokens of the document, up to a constant per row.

    A difference of two sums of :func:`evidence_before`, and equal to it bitwise where the window
    reaches back to the document's start and no log-probability is ``-inf``. Those are kept out of
    the sums and counted, so that an expert is ruled out only while such a token is in its window.
    """
    lost = log_probs == -torch.inf  # [N, K]
    top = log_probs.amax(dim=1, keepdim=True).clamp(min=torch.finfo(log_probs.dtype).min)
    sums = evidence_before(torch.where(lost, top, log_probs), starts)
    row = torch.arange(len(starts), device=starts.device)
    first = row - position_in_document(starts).clamp(max=window)  # [N], where the window opens
    lost_before = torch.nn.functional.pad(lost.cumsum(dim=0), (0, 0, 1, 0))[:-1]  # [N, K]
    ruled_out = lost_before > lost_before[first]
    return (sums - sums[first]).masked_fill(ruled_out, -torch.inf)
