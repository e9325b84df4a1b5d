"""Training rows: encoded documents laid end to end and cut into equal lengths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows in the order they are trained on, as many as asked for.

    Every pass over the data is a new permutation, a function of the seed and the pass alone, so
    that reading the rows in sequence from any place resumes a run exactly.

    Args:
        ids: the documents, each ``[BOS] + tokens + [EOS]``, int64 [tokens].
        context: T, tokens in a row; what does not fill a last row is left out.
        rows: rows to serve.
        seed: of the permutations.

    Raises:
        ValueError: the documents do not fill one row.
    """

    def __init__(self, ids: Tensor, context: int, rows: int, seed: int) -> None:
        """Cut the rows and draw their order."""
        count = len(ids) // context
        if count == 0:
            raise ValueError(
                f"data: {len(ids)} tokens do not fill one row of {context}; give more documents or "
                "a smaller context"
            )
        self._rows = ids[: count * context].view(count, context)  # [count, T]
        passes = [
            torch.randperm(count, generator=torch.Generator().manual_seed((seed << 20) + number))
            for number in range(-(-rows // count))
        ]
        self._order = torch.cat(passes)[:rows]  # [rows]

    def __len__(self) -> int:
        """Return the number of rows served."""
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one row as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch: ``input_ids`` and ``labels``, int64 [len(indices), T]."""
        rows = self._rows[self._order[indices]]
        return {"input_ids": rows, "labels": rows}
