"""What an evaluation finds beside the losses: tuned priors, removals, topic switches, conflicts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PairCurve:
    """The best that fixed weights can do on mixtures of two domains, given the shares.

        e(s) = min_w (1 - s) E_first[excess of w] + s E_second[excess of w]

    The excess of ``w`` is that of the sequence mixture ``sum_k w_k pi_k`` over the oracle expert.
    ``w`` is fitted to the documents it is judged on: a bound, not a system. Where no single expert
    is the best of all documents of a domain, ``w`` can go below the oracle; then ``e`` is negative.

    Attributes:
        first: Domain at share 0.
        second: Domain at share 1.
        shares: Shares ``s`` of documents of ``second``, from 0 to 1.
        tuned: ``e(s)``, nats per document.
    """

    first: str
    second: str
    shares: tuple[float, ...]
    tuned: tuple[float, ...]


@dataclass(frozen=True)
class Forgetting:
    """The certified mixture after one expert is taken out, its weight shared by the others.

    Attributes:
        experts: The expert taken out, K of them in turn.
        whole: Nats per token of every domain with all experts, ``[D]``.
        without: The same without expert k, ``[D][K]``.
    """

    experts: tuple[str, ...]
    whole: tuple[float, ...]
    without: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class SwitchResult:
    """One system on documents that change their domain half way, in nats per token.

    Attributes:
        system: Name of the system.
        before: Loss on the first halves.
        after: Loss on the second halves.
        excess: Mean excess over the oracle expert of each half, by distance from the switch.
    """

    system: str
    before: float
    after: float
    excess: tuple[float, ...]


@dataclass(frozen=True)
class TopicSwitch:
    """Documents that change their domain: the first half of one, the second half of another.

    The experts' log-probabilities are those of the two documents, each read from its own
    beginning: what is measured is the gate, which is not told of the switch.

    Attributes:
        documents: How many were made.
        positions: First token of every bin of ``excess``, counted from the switch.
        width: Tokens in a bin.
        systems: The systems.
    """

    documents: int
    positions: tuple[int, ...]
    width: int
    systems: tuple[SwitchResult, ...]


@dataclass(frozen=True)
class Divergence:
    """How far the experts' next-token distributions are from each other, by domain.

    Attributes:
        tokens: Tokens of each domain it was measured on.
        pairwise: Jensen-Shannon divergence of two experts, nats per token, ``[D][K][K]``.
        together: That of all K experts with equal weights, ``[D]``; at most ``log K``.
    """

    tokens: int
    pairwise: tuple[tuple[tuple[float, ...], ...], ...]
    together: tuple[float, ...]


@dataclass(frozen=True)
class Conflict:
    """How far the domains' gradients of one model pull apart.

    Attributes:
        model: Name of the monolith.
        tokens: Tokens of each domain behind its gradient, at most.
        cosine: Cosine between the gradients of two domains, ``[D][D]``.
        negative_share: Share of the pairs of domains with a negative cosine.
    """

    model: str
    tokens: int
    cosine: tuple[tuple[float, ...], ...]
    negative_share: float
