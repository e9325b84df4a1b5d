"""Learned gates of a whole document."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustgate.game.certificate import check_distribution
from robustgate.game.priors import uniform_prior
from robustgate.game.transformer import Block


class SequenceGate(nn.Module):
    """One set of weights per document, from what the document looks like.

        log g(x, .) = log softmax( W encoder(x) + b )

    W starts at 0 and b at ``log prior``: an untrained gate is the constant gate of the prior, whose
    mixture is normalised. A trained one is in general not (:class:`PrimalDual` holds it near) and
    not causal: it reads the document before it weighs the experts on it.

    Use :meth:`linear`, :meth:`mlp` or :meth:`transformer`, or an encoder of your own.

    Args:
        encoder: maps inputs ``[..., F]`` to ``[..., width]``.
        width: of the encoder's output.
        prior: ``[K]``, positive, sums to 1.

    Raises:
        TypeError: ``prior`` is not a tensor.
        ValueError: ``prior`` is not a distribution ``[K]`` without zeros.

    Example:
        >>> import torch
        >>> from robustgate.game import SequenceGate
        >>> gate = SequenceGate.mlp(8, torch.tensor([0.25, 0.75]))
        >>> gate(torch.randn(2, 8)).exp()  # two documents
        tensor([[0.2500, 0.7500],
                [0.2500, 0.7500]], grad_fn=<ExpBackward0>)

    Source: docs/theory.md, "Learned gates".
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        prior: Tensor,  # [K]
    ) -> None:
        """Put a head of zeros on the encoder."""
        super().__init__()
        size = prior.numel() if isinstance(prior, Tensor) else 0
        weights = check_distribution("prior", prior, size)
        if not bool((weights > 0).all()):
            raise ValueError(f"prior: expected positive weights, got {weights.tolist()}")
        self.encoder = encoder
        self.head = nn.Linear(width, size)
        nn.init.zeros_(self.head.weight)
        with torch.no_grad():
            self.head.bias.copy_(weights.log())

    @classmethod
    def linear(cls, features: int, prior: Tensor | int) -> SequenceGate:
        """Make a softmax-linear gate on ``features`` numbers per document.

        Args:
            features: F.
            prior: ``[K]``, or K for the uniform one.
        """
        return cls(nn.Identity(), features, _as_prior(prior))

    @classmethod
    def mlp(cls, features: int, prior: Tensor | int, *, hidden: int = 64) -> SequenceGate:
        """Make a gate with one hidden layer on ``features`` numbers per document.

        Args:
            features: F.
            prior: ``[K]``, or K for the uniform one.

        Other:
            hidden: width of the hidden layer.
        """
        return cls(nn.Sequential(nn.Linear(features, hidden), nn.GELU()), hidden, _as_prior(prior))

    @classmethod
    def transformer(
        cls,
        vocab_size: int,
        prior: Tensor | int,
        *,
        context: int,
        width: int = 32,
        heads: int = 2,
        hidden: int = 64,
        layers: int = 1,
    ) -> SequenceGate:
        """Make a gate on token ids ``[..., T]``: a transformer encoder, averaged over tokens.

        Args:
            vocab_size: token ids lie in ``[0, vocab_size)``; negative ids are padding.
            prior: ``[K]``, or K for the uniform one.
            context: the largest T.

        Other:
            width, heads, hidden, layers: of the encoder.
        """
        encoder = TokenEncoder(vocab_size, context, width, heads, hidden, layers)
        return cls(encoder, width, _as_prior(prior))

    def forward(
        self,
        inputs: Tensor,  # [..., F]
    ) -> Tensor:  # [..., K]
        """Return normalised log-weights, ``[..., K]``, in the dtype of the parameters."""
        return torch.log_softmax(self.head(self.encoder(inputs)), dim=-1)


class TokenEncoder(nn.Module):
    """Token ids to one vector per document: a transformer encoder, averaged over real tokens.

    Args:
        vocab_size: token ids lie in ``[0, vocab_size)``; negative ids are padding.
        context: the largest T.
        width, heads, hidden, layers: of the transformer.
    """

    def __init__(
        self, vocab_size: int, context: int, width: int, heads: int, hidden: int, layers: int
    ) -> None:
        """Make the encoder with torch's default initialisation."""
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        ids: Tensor,  # int [..., T]
    ) -> Tensor:  # [..., width]
        """Return the mean output vector; 0 for a document of padding alone."""
        if ids.is_floating_point() or ids.shape[-1] > self.positions.num_embeddings:
            raise ValueError(
                f"ids: expected integers [..., T] with T <= {self.positions.num_embeddings}, "
                f"got {ids.dtype} {tuple(ids.shape)}"
            )
        flat = ids.reshape(-1, ids.shape[-1])  # [B, T]
        real = flat >= 0
        place = (real.cumsum(dim=1) - 1).clamp(min=0)  # padding on the left shifts nothing
        x = self.tokens(flat.clamp(min=0)) + self.positions(place)
        for block in self.blocks:
            x = block(x, real, causal=False)
        counted = real.unsqueeze(-1).to(x.dtype)
        mean = (self.norm(x) * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1.0)
        out: Tensor = mean.reshape(*ids.shape[:-1], -1)
        return out


def _as_prior(prior: Tensor | int) -> Tensor:  # [K]
    return uniform_prior(prior) if isinstance(prior, int) else prior
