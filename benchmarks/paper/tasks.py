"""The two domains of the synthetic study: counting up and counting down, modulo 100.

A document is T tokens: a uniform first one, then the last one plus 1 (up) or minus 1 (down). There
are 200 documents in all, so that every expectation in the study is a sum, without sampling error.

"A 50-50" and "A 25-75" are read as: half, or a quarter, of domain A counts up, the rest down, like
B. Documents of T = 16 tokens are this study's choice.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

VOCABULARY = 100
LENGTH = 16


@dataclass(frozen=True)
class Variant:
    """A study: domain A counts up in a share of its documents, and down in the rest."""

    name: str
    share: float


VARIANTS = (
    Variant("clean", 1.0),
    Variant("A 50-50", 0.5),
    Variant("A 25-75", 0.25),
)


def documents() -> Tensor:  # int [200, T]
    """All documents: 100 that count up, then 100 that count down."""
    first = torch.arange(VOCABULARY).unsqueeze(1)
    steps = torch.arange(LENGTH)
    return torch.cat([(first + steps) % VOCABULARY, (first - steps) % VOCABULARY])


def domains(variant: Variant) -> Tensor:  # [2, 200]
    """Probabilities of all documents in domains A and B."""
    up = torch.tensor([variant.share, 0.0], dtype=torch.float64).unsqueeze(1)
    ups, downs = up.expand(2, VOCABULARY), (1 - up).expand(2, VOCABULARY)
    return torch.cat([ups, downs], dim=1) / VOCABULARY


def entropy(probs: Tensor) -> list[float]:  # [2, 200]
    """Entropy of each domain, nats per document."""
    found: list[float] = (-torch.xlogy(probs, probs).sum(dim=1)).tolist()
    assert max(found) <= math.log(2 * VOCABULARY) + 1e-9
    return found
