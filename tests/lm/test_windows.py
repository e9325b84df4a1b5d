"""Slices, windows and batches cover everything once, and nothing depends on anything else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from robustgate.lm.store.windows import plan_batches, plan_windows, slice_documents

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(lengths, st.integers(1, 50))
def test_slices_cover_the_documents(lengths: list[int], slice_tokens: int) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    slices = slice_documents(offsets, slice_tokens)
    assert [first for first, _ in slices] == [0, *(last for _, last in slices[:-1])]
    assert slices[-1][1] == len(lengths)
    for first, last in slices[:-1]:  # enough tokens, and not without the last document
        assert offsets[last] - offsets[first] >= slice_tokens > offsets[last - 1] - offsets[first]


@given(lengths, st.integers(2, 12), st.data())
def test_windows_score_each_token_once_with_its_past(
    lengths: list[int], window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    scored = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    for document, start, end, first in plan_windows(torch.tensor(lengths), window, stride).tolist():
        assert 0 <= start <= first < end <= min(start + window, lengths[document])
        assert start == 0 or first - start >= window - stride
        scored[document][first:end] += 1
    assert all((count == 1).all() for count in scored)


@given(lengths, st.integers(1, 60))
def test_batches_hold_each_window_once_within_the_limit(
    lengths: list[int], batch_tokens: int
) -> None:
    sizes = torch.tensor(lengths)
    batches = plan_batches(sizes, batch_tokens)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * int(sizes[batch].max()) <= batch_tokens


def test_equal_lengths_keep_their_order() -> None:
    (batch,) = plan_batches(torch.full((100,), 3), 1000)
    assert batch.tolist() == list(range(100))
