"""Causal networks of a token gate: over whole sequences and one token at a time."""

from __future__ import annotations

from torch import Tensor, nn

from robustgate.game.transformer import Block, Memory


class Pointwise(nn.Module):
    """A network that looks at each token's features alone.

    Args:
        layers: maps ``[..., F]`` to ``[..., W]``.
    """

    def __init__(self, layers: nn.Module) -> None:
        """Wrap the layers."""
        super().__init__()
        self.layers = layers

    def forward(
        self,
        features: Tensor,  # [B, T, F]
        real: Tensor,  # bool [B, T]
    ) -> Tensor:  # [B, T, W]
        """Return the layers' output for each token."""
        out: Tensor = self.layers(features)
        return out

    def step(
        self,
        features: Tensor,  # [B, 1, F]
        memory: tuple[Memory, ...],
    ) -> tuple[Tensor, tuple[Memory, ...]]:  # [B, 1, W]
        """Return the output for one token; there is nothing to remember."""
        return self.layers(features), memory


class CausalTransformer(nn.Module):
    """A transformer in which a token looks at itself and at the real tokens before it.

    It has no position embedding: what is looked at grows with the document, and its features say
    how far their averages have come. Padding on either side therefore shifts nothing.

    Args:
        features: F.
        width, heads, hidden, layers: of the transformer.
    """

    def __init__(self, features: int, width: int, heads: int, hidden: int, layers: int) -> None:
        """Make the network with torch's default initialisation."""
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        features: Tensor,  # [B, T, F]
        real: Tensor,  # bool [B, T]
    ) -> Tensor:  # [B, T, W]
        """Return one vector per token, of the tokens up to it."""
        x = self.embed(features)
        for block in self.blocks:
            x = block(x, real, causal=True)
        out: Tensor = self.norm(x)
        return out

    def step(
        self,
        features: Tensor,  # [B, 1, F]
        memory: tuple[Memory, ...],
    ) -> tuple[Tensor, tuple[Memory, ...]]:  # [B, 1, W]
        """Return the vector of one more token and the memory with it."""
        x = self.embed(features)
        known = memory or (None,) * len(self.blocks)
        grown = []
        for block, past in zip(self.blocks, known, strict=True):
            assert isinstance(block, Block)  # nn.ModuleList does not say so
            x, present = block.step(x, past)
            grown.append(present)
        return self.norm(x), tuple(grown)
