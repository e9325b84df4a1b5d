"""Learned causal gates: a correction, token by token, to the Bayes posterior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from robustgate.game.gates import BayesGate
from robustgate.game.token_network import CausalTransformer, Pointwise
from robustgate.ops.mixture_log_prob import mixture_log_prob

_DECAYS: Final = (0.5, 0.9, 0.99)  # running averages over about 2, 10 and 100 tokens
_CLAMP: Final = 20.0  # nats; features beyond say no more, and -inf would say NaN


@dataclass(frozen=True, eq=False)
class TokenState:
    """What a :class:`TokenGate` remembers of a document while decoding.

    Attributes:
        posterior: state of its Bayes gate, ``[..., K]``.
        averages: running averages of relative log-probabilities, ``[..., R, K]``.
        memory: of its network, one entry per layer.
    """

    posterior: Tensor
    averages: Tensor
    memory: tuple[tuple[Tensor, Tensor], ...]


class TokenGate(nn.Module):
    """A causal router that starts as the Bayes router and learns where to depart from it.

        log gamma(x_<t) = log softmax( log w(t) + W network(features(x_<t)) + b )

    ``w(t)`` are the Bayes gate's weights before token t. W and b start at 0: an untrained gate is
    the Bayes gate to rounding. ``prod_t sum_k gamma_k(x_<t) pi_k(x_t | x_<t)`` is normalised
    whatever the network does. Features before token t, of the tokens before it alone:

    - ``log w(t)``, ``[K]``;
    - running averages of ``l_k(s) - max_j l_j(s)``, s < t, at three rates, ``[R K]``;
    - ``context[t]``, ``[F]``, if asked for: whatever the caller knows before token t, such as the
      entropies of the experts' next-token distributions or their hidden states.

    Use :meth:`linear`, :meth:`mlp` or :meth:`transformer`.

    Args:
        bayes: the gate to start from, of any options but ``window``.
        network: maps features ``[B, T, F]`` to ``[B, T, width]``, causally.
        width: of the network's output.
        context: F of the caller's features; 0 for none.

    Raises:
        ValueError: ``bayes`` has a window, which cannot be decoded step by step.

    Example:
        >>> import torch
        >>> from robustgate.game import BayesGate, TokenGate
        >>> bayes = BayesGate(torch.tensor([0.5, 0.5]))
        >>> gate = TokenGate.mlp(bayes)
        >>> log_probs = torch.randn(7, 2) - 3  # one document of seven tokens, two experts
        >>> torch.allclose(gate(log_probs), bayes(log_probs), atol=1e-12)
        True

    Source: docs/theory.md, "Learned gates".
    """

    def __init__(
        self,
        bayes: BayesGate,
        network: Pointwise | CausalTransformer,
        width: int,
        *,
        context: int = 0,
    ) -> None:
        """Put a head of zeros on the network."""
        super().__init__()
        if bayes.window is not None:
            raise ValueError(f"bayes: expected a gate without a window, got {bayes.window}")
        experts = len(bayes.log_prior)
        self.bayes = bayes
        self.network = network
        self.context = context
        self.head = nn.Linear(width, experts)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def linear(cls, bayes: BayesGate, *, context: int = 0) -> TokenGate:
        """Make a gate that is linear in its features."""
        features = _feature_count(bayes, context)
        return cls(bayes, Pointwise(nn.Identity()), features, context=context)

    @classmethod
    def mlp(cls, bayes: BayesGate, *, context: int = 0, hidden: int = 32) -> TokenGate:
        """Make a gate with one hidden layer of width ``hidden``."""
        layers = nn.Sequential(nn.Linear(_feature_count(bayes, context), hidden), nn.GELU())
        return cls(bayes, Pointwise(layers), hidden, context=context)

    @classmethod
    def transformer(
        cls,
        bayes: BayesGate,
        *,
        context: int = 0,
        width: int = 32,
        heads: int = 2,
        hidden: int = 64,
        layers: int = 1,
    ) -> TokenGate:
        """Make a gate whose network is a causal transformer over the tokens' features."""
        network = CausalTransformer(_feature_count(bayes, context), width, heads, hidden, layers)
        return cls(bayes, network, width, context=context)

    def forward(
        self,
        log_probs: Tensor,  # [..., T, K]
        *,
        context: Tensor | None = None,  # [..., T, F]
        mask: Tensor | None = None,  # [..., T]
    ) -> Tensor:  # [..., T, K]
        """Return the normalised log-weights in force before each token.

        Args:
            log_probs: ``l_k(t)`` of the observed tokens, ``[..., T, K]`` floating point; every
                leading index is a document of its own.
            context: the caller's features, ``[..., T, F]``; row t may know tokens before t alone.
            mask: boolean or 0/1, true for real tokens; the others, anywhere, count for nothing.

        Returns:
            ``[..., T, K]`` float64.

        Raises:
            TypeError, ValueError: as :class:`BayesGate`, and for ``context`` of a wrong shape.
        """
        log_weights: Tensor = self.bayes(log_probs, mask=mask)
        self._check(context, log_probs.shape[:-1])
        if log_probs.numel() == 0:
            return log_weights
        shape = (-1, *log_probs.shape[-2:])  # B, T, K
        real = torch.ones_like(log_probs[..., 0]) if mask is None else mask
        real = real.bool().reshape(shape[:2])
        relative = _relative(log_probs).reshape(shape)  # [B, T, K]
        averages = _averages_before(relative, real, relative.new_tensor(_DECAYS))  # [B, T, R, K]
        given = None if context is None else context.reshape(*shape[:2], self.context)
        features = self._features(log_weights.reshape(shape), averages, given)
        correction = self.head(self.network(features, real)).reshape(log_probs.shape)
        return torch.log_softmax(log_weights + correction.to(torch.float64), dim=-1)

    def log_prob(
        self,
        log_probs: Tensor,  # [..., T, K]
        *,
        context: Tensor | None = None,  # [..., T, F]
        mask: Tensor | None = None,  # [..., T]
    ) -> Tensor:  # [..., T]
        """Return the mixture's token log-probabilities, float64; masked tokens get 0."""
        weights = self(log_probs, context=context, mask=mask)
        out = mixture_log_prob(log_probs.to(torch.float64), weights)
        return out if mask is None else out.masked_fill(~mask.bool(), 0.0)

    def start(
        self,
        shape: tuple[int, ...] = (),
        *,
        context: Tensor | None = None,  # [..., F]
    ) -> tuple[Tensor, TokenState]:  # [..., K]
        """Return the log-weights before the first token of documents ``[...]``, and the state.

        Args:
            shape: of the documents decoded together.
            context: the caller's features before the first token, ``[..., F]``.
        """
        prior = self.bayes.log_prior
        averages = prior.new_zeros(*shape, len(_DECAYS), len(prior))
        return self._weigh(prior.expand(*shape, -1), averages, (), context)

    def step(
        self,
        state: TokenState,
        log_probs: Tensor,  # [..., K]
        *,
        context: Tensor | None = None,  # [..., F]
    ) -> tuple[Tensor, TokenState]:  # [..., K]
        """Return the log-weights before the next token, and the state: :meth:`forward` by steps.

        Args:
            state: from :meth:`start` or the last step.
            log_probs: ``l_k`` of the token that came, ``[..., K]``.
            context: the caller's features before the next token, ``[..., F]``.
        """
        posterior = self.bayes.step(state.posterior, log_probs)
        decays = state.averages.new_tensor(_DECAYS).unsqueeze(-1)  # [R, 1]
        news = _relative(log_probs).unsqueeze(-2)  # [..., 1, K]
        averages = decays * state.averages + (1 - decays) * news
        return self._weigh(posterior, averages, state.memory, context)

    def _weigh(
        self,
        posterior: Tensor,  # [..., K]
        averages: Tensor,  # [..., R, K]
        memory: tuple[tuple[Tensor, Tensor], ...],
        context: Tensor | None,  # [..., F]
    ) -> tuple[Tensor, TokenState]:
        self._check(context, posterior.shape[:-1])
        log_weights = self.bayes.weights(posterior)
        features = self._features(log_weights, averages, context)
        hidden, memory = self.network.step(features.reshape(-1, 1, features.shape[-1]), memory)
        correction = self.head(hidden).reshape(posterior.shape)
        weights = torch.log_softmax(log_weights + correction.to(torch.float64), dim=-1)
        return weights, TokenState(posterior, averages, memory)

    def _features(
        self,
        log_weights: Tensor,  # [..., K]
        averages: Tensor,  # [..., R, K]
        context: Tensor | None,  # [..., F]
    ) -> Tensor:  # [..., K + R K + F]
        known = [log_weights.clamp(min=-_CLAMP), averages.flatten(-2)]
        if context is not None:
            known.append(context)
        return torch.cat([part.to(self.head.weight.dtype) for part in known], dim=-1)

    def _check(self, context: Tensor | None, shape: torch.Size) -> None:
        given = 0 if context is None else context.shape[-1]
        if given != self.context or (context is not None and context.shape[:-1] != shape):
            got = None if context is None else tuple(context.shape)
            raise ValueError(f"context: expected shape {(*shape, self.context)}, got {got}")


def _feature_count(bayes: BayesGate, context: int) -> int:
    return (1 + len(_DECAYS)) * len(bayes.log_prior) + context


def _relative(log_probs: Tensor) -> Tensor:  # [..., K]
    """Return ``l_k - max_j l_j`` in float64, at least -20; 0 where no expert is possible."""
    top = log_probs.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(log_probs.dtype).min)
    return (log_probs - top).to(torch.float64).clamp(min=-_CLAMP)


def _averages_before(
    values: Tensor,  # [B, T, K]
    real: Tensor,  # bool [B, T]
    decays: Tensor,  # [R]
) -> Tensor:  # [B, T, R, K]
    """Return ``m_t`` with ``m_0 = 0, m_{t+1} = a m_t + (1 - a) v_t`` for every decay a.

    By doubling, ``log2 T`` rounds. Tokens that are not real leave ``m`` as it is.
    """
    kept = real[:, :, None, None]  # [B, T, 1, 1]
    rates = decays[:, None]  # [R, 1]
    news = torch.where(kept, (1 - rates) * values.unsqueeze(2), 0.0)  # [B, T, R, K]
    decay = torch.where(kept, rates, 1.0)  # [B, T, R, 1]
    shift = 1
    while shift < values.shape[1]:
        carried = news[:, shift:] + decay[:, shift:] * news[:, :-shift]
        news = torch.cat([news[:, :shift], carried], dim=1)
        decay = torch.cat([decay[:, :shift], decay[:, shift:] * decay[:, :-shift]], dim=1)
        shift *= 2
    return nn.functional.pad(news[:, :-1], (0, 0, 0, 0, 1, 0))
