"""A small pre-norm transformer block for gates, over whole sequences and one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        allowed: Tensor,  # bool [B, 1, T, T]: may the row's token look at the column's?
    ) -> Tensor:  # [B, T, W]
        """Return the block's output; every token must be allowed to look at some token."""
        query, key, value = self._heads(x)
        return self._mix(x, query, key, value, allowed)

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
        return self._mix(x, query, key, value, None), (key, value)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # 3 x [B, heads, T, W / heads]
        projected = self.project(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def _mix(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None
    ) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        mixed: Tensor = x + self.out(attended.transpose(1, 2).flatten(2))
        result: Tensor = mixed + self.mlp(mixed)
        return result
