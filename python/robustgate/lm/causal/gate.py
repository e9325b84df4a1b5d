"""A gate along a document that grows: its log-weights after every new token."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from robustgate.game import BayesGate, SequenceGate, TokenGate
from robustgate.game.token_gate import TokenState
from robustgate.game.token_network import Pointwise
from robustgate.lm.causal.cache import GateLayer
from robustgate.lm.gates.spec import Gate


class Track(Protocol):
    """How a kind of gate goes on from the state in a cache."""

    @property
    def gate(self) -> Gate:
        """The gate that is followed."""

    def advance(
        self,
        layer: GateLayer,
        log_probs: Tensor,  # [B, m, K]
        scored: Tensor,  # bool [B, m]
        real: Tensor,  # bool [B, m]
        context: Tensor | None,  # [B, m, F]
    ) -> Tensor:  # [B, m, K]
        """Return the log-weights in force after each of m new tokens, and remember the state.

        Args:
            layer: of the cache; what it has is of the tokens before.
            log_probs: ``l_k`` of the new tokens, float64, 0 where not scored.
            scored: which of them have a log-probability: real ones but a document's first.
            real: which of them are no padding.
            context: features after each of them.

        Returns:
            float64, normalised. After padding they are what they were before.
        """


def track(gate: Gate) -> Track:
    """Return how a gate is followed along a document.

    Raises:
        ValueError: a sequence gate, which needs the whole document before its first token.
    """
    if isinstance(gate, SequenceGate):
        raise ValueError(
            "gate: a sequence gate weighs whole documents and cannot generate; "
            "`robustgate distill` makes a token gate of it"
        )
    if isinstance(gate, BayesGate) and gate.window is None:
        return BayesTrack(gate)
    if isinstance(gate, TokenGate) and isinstance(gate.network, Pointwise):
        return TokenTrack(gate)
    return ReplayTrack(gate)


class BayesTrack:
    """A Bayes gate: its state is the posterior."""

    def __init__(self, gate: BayesGate) -> None:
        """Follow ``gate``."""
        self.gate = gate

    def advance(
        self,
        layer: GateLayer,
        log_probs: Tensor,  # [B, m, K]
        scored: Tensor,  # bool [B, m]
        real: Tensor,  # bool [B, m]
        context: Tensor | None,
    ) -> Tensor:  # [B, m, K]
        """Return the weights after each token: all at once by sums, or by steps."""
        before = layer.last("posterior")
        if before is None:
            before = self.gate.log_prior.expand(len(log_probs), -1)
        states = before.unsqueeze(1) + self.gate.power * log_probs.cumsum(dim=1)  # [B, m, K]
        total = states.logsumexp(dim=-1, keepdim=True)
        if self.gate.share == 0.0 and bool((total > -math.inf).all()):
            states = states - total
        else:
            steps = []
            for token in range(log_probs.shape[1]):
                after = _restrict(self.gate.step(before, log_probs[:, token]), layer.kept)
                before = torch.where(scored[:, token, None], after, before)
                steps.append(before)
            states = torch.stack(steps, dim=1)
        layer.append(posterior=states)
        return self.gate.weights(states)

    def freeze(
        self,
        layer: GateLayer,
        count: int,
    ) -> Tensor:  # [B, K]
        """Keep the ``count`` largest posterior weights after the last token, renormalised.

        Returns:
            The log-weights in force after that token.
        """
        posterior = layer.history["posterior"]
        chosen = posterior[:, -1].topk(count, dim=-1).indices  # [B, count]
        layer.kept = torch.zeros_like(posterior[:, -1], dtype=torch.bool).scatter(-1, chosen, True)
        state = _restrict(posterior[:, -1], layer.kept)
        layer.history["posterior"] = torch.cat([posterior[:, :-1], state.unsqueeze(1)], dim=1)
        return self.gate.weights(state)


class TokenTrack:
    """A token gate whose network looks at one token's features: decoded step by step."""

    def __init__(self, gate: TokenGate) -> None:
        """Follow ``gate``."""
        self.gate = gate

    def advance(
        self,
        layer: GateLayer,
        log_probs: Tensor,  # [B, m, K]
        scored: Tensor,  # bool [B, m]
        real: Tensor,  # bool [B, m]
        context: Tensor | None,  # [B, m, F]
    ) -> Tensor:  # [B, m, K]
        """Return the weights after each token, by ``gate.start`` and ``gate.step``."""
        batch = len(log_probs)
        posterior, averages = layer.last("posterior"), layer.last("averages")
        weights = layer.last("log_weights")
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for token in range(log_probs.shape[1]):
            known = None if context is None else context[:, token]
            if posterior is None or bool((real & ~scored)[:, token].any()):
                first, state = self.gate.start((batch,), context=known)
                opens = (real & ~scored)[:, token, None]
                posterior = state.posterior if posterior is None else posterior
                averages = state.averages if averages is None else averages
                weights = first if weights is None else torch.where(opens, first, weights)
            assert averages is not None
            assert weights is not None
            after, state = self.gate.step(
                TokenState(posterior, averages, ()), log_probs[:, token], context=known
            )
            goes_on = scored[:, token, None]
            posterior = torch.where(goes_on, state.posterior, posterior)
            averages = torch.where(goes_on.unsqueeze(-1), state.averages, averages)
            weights = torch.where(goes_on, after, weights)
            steps.append((posterior, averages, weights))
        states = [torch.stack(values, dim=1) for values in zip(*steps, strict=True)]
        layer.append(posterior=states[0], averages=states[1])
        return states[2]


class ReplayTrack:
    """Any causal gate, by its ``forward`` over the document so far: transformers, windows."""

    def __init__(self, gate: BayesGate | TokenGate) -> None:
        """Follow ``gate``."""
        self.gate = gate

    def advance(
        self,
        layer: GateLayer,
        log_probs: Tensor,  # [B, m, K]
        scored: Tensor,  # bool [B, m]
        real: Tensor,  # bool [B, m]
        context: Tensor | None,  # [B, m, F]
    ) -> Tensor:  # [B, m, K]
        """Return the last rows of ``gate(log_probs of all tokens and of one to come)``."""
        new = log_probs.shape[1]
        if "log_probs" in layer.history:
            log_probs = torch.cat([layer.history["log_probs"], log_probs], dim=1)
            scored = torch.cat([layer.history["scored"], scored], dim=1)
        to_come = torch.zeros_like(log_probs[:, :1])
        tokens = torch.cat([log_probs[:, 1:], to_come], dim=1)  # [B, n + m, K]
        mask = torch.cat([scored[:, 1:], torch.ones_like(scored[:, :1])], dim=1)  # [B, n + m]
        if isinstance(self.gate, BayesGate):
            weights: Tensor = self.gate(tokens, mask=mask)
            return weights[:, -new:]
        if context is not None:
            layer.append(context=_held(context, real, layer.last("context")))
        weights = self.gate(tokens, context=layer.history.get("context"), mask=mask)
        return weights[:, -new:]


def _restrict(
    log_weights: Tensor,  # [B, K]
    kept: Tensor | None,  # bool [B, K]
) -> Tensor:  # [B, K]
    """Return the weights of the experts that are kept, renormalised."""
    if kept is None:
        return log_weights
    return log_weights.masked_fill(~kept, -math.inf).log_softmax(dim=-1)


def _held(
    values: Tensor,  # [B, m, F]
    real: Tensor,  # bool [B, m]
    before: Tensor | None,  # [B, F]
) -> Tensor:  # [B, m, F]
    """Return the values with those of padding replaced by the last ones of a real token."""
    index = torch.arange(1, values.shape[1] + 1, device=values.device)
    last = torch.where(real, index, 0).cummax(dim=1).values  # [B, m]; 0: none so far
    start = torch.zeros_like(values[:, 0]) if before is None else before
    known = torch.cat([start.unsqueeze(1), values], dim=1)  # [B, 1 + m, F]
    return known.gather(1, last.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
