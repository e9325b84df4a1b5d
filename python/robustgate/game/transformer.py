"""A small pre-norm transformer block for gates, over whole sequences and one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PAIRS = 1 << 25
"""Pairs of tokens in one mask, at most, or those of one row of tokens if there are more."""

Memory = tuple[Tensor, Tensor]  # keys and values of the tokens so far, [B, heads, t, W / heads]


class Block(nn.Module):
    """One transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
        width: W, of the tokens' vectors.
        heads: of the attention; divides ``width``.
        hidden: width of the two-layer perceptron.

    Raises:
        ValueError: ``heads`` does not divide ``width``.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        """Make the block with torch's default initialisation."""
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width = {width}, got {heads}")
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )

    def forward(
        self,
        x: Tensor,  # [B, T, W]
        real: Tensor,  # bool [B, T]
        *,
        causal: bool,
    ) -> Tensor:  # [B, T, W]
        """Return the block's output. A token looks at itself and at real ones, if causal before it.

        Without gradients memory is linear in T: long sequences ask in runs of tokens.
        """
        query, key, value = self._heads(x)
        tokens = real.shape[1]
        run = max(1, _PAIRS // max(1, real.numel()))
        parts = []
        for start in range(0, tokens, run) or (0,):
            stop = min(start + run, tokens)
            seen = stop if causal else tokens
            allowed = _allowed(real[:, :seen], start, stop, causal=causal)
            asked = query[:, :, start:stop]
            parts.append(_attend(asked, key[:, :, :seen], value[:, :, :seen], allowed))
        return self._mix(x, torch.cat(parts, dim=2))

    def step(
        self,
        x: Tensor,  # [B, 1, W]
        memory: Memory | None,
    ) -> tuple[Tensor, Memory]:  # [B, 1, W]
        """Return the output for one more token, which looks at all before it, and the memory."""
        query, key, value = self._heads(x)
        if memory is not None:
            key = torch.cat([memory[0], key], dim=2)
            value = torch.cat([memory[1], value], dim=2)
        return self._mix(x, _attend(query, key, value, None)), (key, value)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # 3 x [B, heads, T, W / heads]
        projected = self.project(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def _mix(self, x: Tensor, attended: Tensor) -> Tensor:
        mixed: Tensor = x + self.out(attended.transpose(1, 2).flatten(2))
        result: Tensor = mixed + self.mlp(mixed)
        return result


def _attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)


def _allowed(
    real: Tensor,  # bool [B, S], the columns
    start: int,
    stop: int,
    *,
    causal: bool,
) -> Tensor:  # bool [B, 1, stop - start, S]
    """Return whom the tokens from ``start`` to ``stop`` look at; padding looks at itself."""
    columns = torch.arange(real.shape[1], device=real.device)
    rows = torch.arange(start, stop, device=real.device).unsqueeze(1)
    seen = real.unsqueeze(1)
    if causal:
        seen = seen & (columns <= rows)
    return (seen | (columns == rows)).unsqueeze(1)
