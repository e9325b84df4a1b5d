"""What a gate is made of, apart from its numbers: enough to build it again from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

from robustgate.game import BayesGate, SequenceGate, TokenGate
from robustgate.game.token_network import CausalTransformer, Pointwise
from robustgate.lm.store.features import FeatureSpec

GateKind = Literal["prior", "token", "sequence"]
NetworkKind = Literal["linear", "mlp", "transformer"]
Gate = BayesGate | TokenGate | SequenceGate

PREFIX: Final = 32
"""Tokens of the short prefix among the features of a document."""


@dataclass(frozen=True)
class Network:
    """The network of a learned gate.

    Attributes:
        kind: ``"linear"`` in the features; ``"mlp"``, hidden layers on each token's (or document's)
            features; ``"transformer"``, over the features of all tokens so far.
        width: of the hidden layers, or of the transformer.
        layers: hidden layers, or blocks of the transformer.
        heads: of the transformer's attention.
        hidden: of the transformer's feed-forward layers.

    Raises:
        ValueError: another kind, or a size below 1.
    """

    kind: NetworkKind = "mlp"
    width: int = 64
    layers: int = 1
    heads: int = 2
    hidden: int = 128

    def __post_init__(self) -> None:
        """Check kind and sizes."""
        if self.kind not in get_args(NetworkKind):
            raise ValueError(f"network: expected linear, mlp or transformer, got {self.kind!r}")
        for name in ("width", "layers", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"network: expected {name} >= 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class BayesOptions:
    """The options of ``robustgate.game.BayesGate``, which see.

    Attributes:
        share: of fixed-share.
        power: of the likelihood.
        window: how many tokens count; None for all.
        top_k: how many weights are kept; None for all.
    """

    share: float = 0.0
    power: float = 1.0
    window: int | None = None
    top_k: int | None = None


@dataclass(frozen=True)
class GateSpec:
    """A gate without its numbers.

    Attributes:
        kind: ``"prior"``, the Bayes gate of the certified prior; ``"token"``, a learned causal
            gate that starts there; ``"sequence"``, a learned gate of whole documents.
        bayes: options of the Bayes gate (of the one within, for a token gate).
        network: of a learned gate; None for ``"prior"``.
        features: what a token gate is told before each token besides the log-probabilities so far.
        span: how many tokens of a document a sequence gate looks at; None for the others.

    Raises:
        ValueError: parts that do not belong together.
    """

    kind: GateKind = "prior"
    bayes: BayesOptions = field(default_factory=BayesOptions)
    network: Network | None = None
    features: FeatureSpec = field(default_factory=FeatureSpec)
    span: int | None = None

    def __post_init__(self) -> None:
        """Check that the parts belong together."""
        if self.kind not in get_args(GateKind):
            raise ValueError(f"gate: expected prior, token or sequence, got {self.kind!r}")
        if (self.network is None) != (self.kind == "prior"):
            raise ValueError(f"network: a {self.kind} gate with {self.network}")
        if (self.span is None) != (self.kind != "sequence"):
            raise ValueError(f"span: a {self.kind} gate with {self.span}")
        if self.kind == "sequence" and self.network_kind == "transformer":
            raise ValueError("network: a sequence gate is linear or mlp, got transformer")

    @property
    def network_kind(self) -> NetworkKind | None:
        """The network's kind, if there is a network."""
        return None if self.network is None else self.network.kind

    def build(
        self,
        prior: Tensor,  # [K]
    ) -> Gate:
        """Make the gate, untrained: the Bayes gate of the prior, or the constant gate of it.

        Args:
            prior: float64 ``[K]``, sums to 1.

        Returns:
            A ``BayesGate``, ``TokenGate`` or ``SequenceGate``, by kind.
        """
        experts = len(prior)
        if self.kind == "sequence":
            assert self.network is not None
            layers, width = _layers(self.network, document_feature_count(experts))
            return SequenceGate(layers, width, prior)
        bayes = BayesGate(prior, **asdict(self.bayes))
        if self.network is None:
            return bayes
        context = self.features.width(experts)
        count = TokenGate.linear(bayes, context=context).head.in_features
        if self.network.kind != "transformer":
            layers, width = _layers(self.network, count)
            return TokenGate(bayes, Pointwise(layers), width, context=context)
        shape = self.network
        network = CausalTransformer(count, shape.width, shape.heads, shape.hidden, shape.layers)
        network.embed = nn.Sequential(Standardise(count), network.embed)  # type: ignore[assignment]
        return TokenGate(bayes, network, shape.width, context=context)

    def to_json(self) -> dict[str, Any]:
        """Return the description as JSON values."""
        return {**asdict(self), "features": self.features.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GateSpec:
        """Return what :meth:`to_json` wrote."""
        network = value["network"]
        return cls(
            value["kind"],
            BayesOptions(**value["bayes"]),
            None if network is None else Network(**network),
            FeatureSpec.from_json(value["features"]),
            value["span"],
        )


class Standardise(nn.Module):
    """Features to mean 0 and variance 1, by the numbers of the training documents.

        (x - mean) / scale

    Args:
        features: F.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int) -> None:
        """Start as the identity."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def measure(
        self,
        features: Tensor,  # [n, F]
    ) -> None:
        """Take mean and scale from features; one that does not vary keeps scale 1."""
        values = features.double()
        deviation = values.std(dim=0, correction=0)
        self.mean.copy_(values.mean(dim=0))
        self.scale.copy_(torch.where(deviation > 1e-6, deviation, 1.0))

    def forward(
        self,
        features: Tensor,  # [..., F]
    ) -> Tensor:  # [..., F]
        """Return the standardised features."""
        return (features - self.mean) / self.scale


def standardise(
    gate: nn.Module,
    features: Tensor,  # [n, F]
) -> None:
    """Let the one ``Standardise`` of a gate measure features."""
    (module,) = (part for part in gate.modules() if isinstance(part, Standardise))
    module.measure(features)


def document_feature_count(experts: int) -> int:
    """Return F of ``document_features``: ``3 K + 2``."""
    return 3 * experts + 2


def document_features(
    log_probs: Tensor,  # [n, T, K]
    mask: Tensor,  # [n, T]
    span: int,
) -> Tensor:  # [n, 3 K + 2]
    """Return what a sequence gate of the modular model sees of a document.

    Of its first ``span`` tokens, from their log-probabilities ``l_k(t)``: for each expert
    ``L_k - max_j L_j``, at least -20, of the sums ``L_k`` over the tokens; the mean over tokens of
    ``l_k - max_j l_j``; the same over the first 32 tokens. Then the mean of ``max_j l_j`` and the
    logarithm of the number of tokens. They know the whole span, so the gate is not causal; they
    know nothing behind it, so ``Z_g`` is that of documents cut at ``span``.

    Args:
        log_probs: token log-probabilities of the experts, ``[n, T, K]`` floating point.
        mask: true for real tokens, which come first, ``[n, T]``.
        span: how many tokens count.

    Returns:
        float32 ``[n, 3 K + 2]``.
    """
    real = mask[:, :span].bool()  # [n, S]
    values = log_probs[:, :span].double().clamp(min=-100.0)  # [n, S, K]; -inf would say NaN
    values = values.masked_fill(~real.unsqueeze(-1), 0.0)
    best = values.amax(dim=-1, keepdim=True)  # [n, S, 1]
    lengths = real.sum(dim=1, keepdim=True).clamp(min=1)  # [n, 1]
    sums = values.sum(dim=1)  # [n, K]
    evidence = (sums - sums.amax(dim=1, keepdim=True)).clamp(min=-20.0)  # [n, K]
    whole = (values - best).sum(dim=1) / lengths  # [n, K]
    prefix = (values - best)[:, :PREFIX].sum(dim=1) / lengths.clamp(max=PREFIX)  # [n, K]
    level = best.sum(dim=1) / lengths  # [n, 1]
    return torch.cat([evidence, whole, prefix, level, lengths.double().log()], dim=1).float()


def _layers(network: Network, features: int) -> tuple[nn.Module, int]:
    """Return a network on standardised features, and the width of its output."""
    parts: list[nn.Module] = [Standardise(features)]
    width = features
    for _ in range(network.layers if network.kind == "mlp" else 0):
        parts += [nn.Linear(width, network.width), nn.GELU()]
        width = network.width
    return nn.Sequential(*parts), width
