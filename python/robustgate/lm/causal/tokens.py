"""New tokens of a batch of documents, with what a cache knows of those before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustgate.lm.causal.cache import GateLayer


@dataclass(frozen=True, eq=False)
class NewTokens:
    """Tokens that no expert has read yet.

    Attributes:
        ids: int64 ``[B, m]``.
        real: false for padding, ``[B, m]``.
        positions: int64 ``[B, m]``.
        padded: whether there is padding among these tokens or those before them.
    """

    ids: Tensor
    real: Tensor
    positions: Tensor
    padded: bool

    @classmethod
    def of(
        cls,
        layer: GateLayer,
        ids: Tensor,  # [B, m]
        attention_mask: Tensor | None,  # [B, n + m]
        position_ids: Tensor | None,  # [1 or B, >= m]
    ) -> NewTokens:
        """Complete what a caller gave by what a cache knows of the n tokens before.

        Raises:
            ValueError: a mask or positions of a wrong shape, or tokens that do not come after
                those in the cache.
        """
        batch, new = ids.shape
        past = layer.get_seq_length()
        before = layer.history.get("real", ids.new_empty((batch, 0), dtype=torch.bool))
        if len(before) != batch:
            raise ValueError(f"input_ids: expected a batch of {len(before)}, got {batch}")
        if attention_mask is None:
            real = torch.ones_like(ids, dtype=torch.bool)
        elif attention_mask.shape != (batch, past + new):
            raise ValueError(
                f"attention_mask: expected shape {(batch, past + new)}, tokens in the cache "
                f"included, got {tuple(attention_mask.shape)}"
            )
        else:
            real = attention_mask[:, past:].bool()
        if position_ids is None:
            counts = torch.cat([before, real], dim=1).long().cumsum(dim=1) - 1
            positions = counts[:, past:].clamp(min=0)
        elif position_ids.dim() != 2 or position_ids.shape[1] < new:
            raise ValueError(
                f"position_ids: expected shape {(batch, new)}, got {tuple(position_ids.shape)}"
            )
        else:
            positions = position_ids[:, -new:].expand(batch, -1)
            _go_on(layer, real, positions)
        padded = not bool(before.all()) or (attention_mask is not None and not bool(real.all()))
        return cls(ids, real, positions, padded)

    def slice(self, start: int, end: int) -> NewTokens:
        """Return the tokens from ``start`` to ``end - 1``."""
        return NewTokens(
            self.ids[:, start:end],
            self.real[:, start:end],
            self.positions[:, start:end],
            self.padded,
        )


def _go_on(
    layer: GateLayer,
    real: Tensor,  # [B, m]
    positions: Tensor,  # [B, m]
) -> None:
    """Refuse positions that are not behind the last real token in the cache."""
    if layer.get_seq_length() == 0:
        return
    last = layer.history["positions"].masked_fill(~layer.history["real"], -1).amax(dim=1)  # [B]
    first = positions.masked_fill(~real, torch.iinfo(positions.dtype).max).amin(dim=1)  # [B]
    if bool((first <= last).any()):
        row = int((first <= last).nonzero()[0])
        raise ValueError(
            f"position_ids: document {row} goes on at position {int(first[row])}, but the cache "
            f"has read it up to position {int(last[row])}; pass the new tokens alone, crop the "
            "cache, or start with an empty one"
        )


def chunks(layer: GateLayer, new: NewTokens, past: int, logits: int) -> list[int]:
    """Return where to cut the new tokens, the end included.

    Args:
        layer: knows where the prompt ends, if experts are chosen there.
        new: m tokens.
        past: how many tokens came before.
        logits: how many rows of logits may be held at once.
    """
    batch, tokens = new.ids.shape
    size = max(1, logits // batch)
    ends = {*range(size, tokens, size), tokens}
    if layer.top_k_experts and 0 < layer.prompt_length - past < tokens:
        ends.add(layer.prompt_length - past)
    return sorted(ends)
