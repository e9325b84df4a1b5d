"""From what the experts answered to the weights with which they are mixed."""

from __future__ import annotations

import torch
from torch import Tensor

from robustgate.lm.causal.cache import ModularCache
from robustgate.lm.causal.gate import BayesTrack, track
from robustgate.lm.causal.reader import Reading, remember, score
from robustgate.lm.causal.tokens import NewTokens
from robustgate.lm.gates.spec import Gate
from robustgate.lm.store.features import FeatureSpec, context_features


class Weigher:
    """Scores new tokens, moves the gate on, and keeps its state in the cache.

    Args:
        gate: the gate.
        features: what it reads besides the tokens' log-probabilities.
        vocab_size: V.

    Raises:
        ValueError: a gate that cannot generate.
    """

    def __init__(self, gate: Gate, features: FeatureSpec, vocab_size: int) -> None:
        """Choose how to follow the gate."""
        self.track = track(gate)
        self.features, self.vocab_size = features, vocab_size

    def __call__(self, cache: ModularCache, new: NewTokens, reading: Reading) -> Tensor:
        """Return the log-weights after each of m new tokens, float64 ``[B, m, K]``.

        Args:
            cache: knows the tokens before; learns what the gate knows after these.
            new: the tokens.
            reading: what the experts answered to them.
        """
        layer, experts, count = cache.gate, len(cache.experts), new.ids.shape[1]
        log_probs, scored = score(layer, reading, new.ids, experts, self.vocab_size)
        context = None
        if self.features.width(experts):
            context = context_features(
                self.features,
                [values[:, -count:] for values in reading.logits],
                None if reading.hidden is None else [part[:, -count:] for part in reading.hidden],
                vocab_size=self.vocab_size,
            )
        log_weights = self.track.advance(layer, log_probs, scored, new.real, context)
        layer.append(scored=scored, log_probs=log_probs)
        if layer.top_k_experts and layer.history["scored"].shape[1] == layer.prompt_length:
            assert isinstance(self.track, BayesTrack)
            chosen = self.track.freeze(layer, layer.top_k_experts)
            log_weights = torch.cat([log_weights[:, :-1], chosen.unsqueeze(1)], dim=1)
        layer.append(log_weights=log_weights)
        remember(layer, reading, experts)
        return log_weights
