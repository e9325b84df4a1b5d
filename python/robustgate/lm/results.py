"""Results of an evaluation: frozen, and the same after a trip through JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robustgate.lm.files import read_json, write_json

_FILE = "evaluation.json"


def format_nats(value: float) -> str:
    """Format a loss: four decimals below 0.1, one less for every factor of ten above."""
    if value == 0:
        return "0"
    size = abs(value)
    digits = 4 if size < 0.1 else 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:.{digits}f}"


@dataclass(frozen=True)
class Estimate:
    """A number measured on a sample of documents, with its bootstrap interval.

    Attributes:
        value: On all documents.
        lower: Lower end of the percentile interval.
        upper: Upper end.
    """

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        """Return the number and its interval, such as ``1.61 (1.50 to 1.72)``."""
        value, lower, upper = map(format_nats, (self.value, self.lower, self.upper))
        return f"{value} ({lower} to {upper})"


@dataclass(frozen=True)
class DomainResult:
    """One system on one domain, in nats.

    Attributes:
        domain: Domain.
        documents: Number of documents.
        tokens: Number of scored tokens.
        nll_per_token: Negative log-likelihood over all tokens, ``sum_x NLL(x) / sum_x T(x)``.
        nll_per_document: Mean over documents.
        perplexity: ``exp(nll_per_token)``.
        excess_per_token: ``nll_per_token`` minus that of the oracle expert.
        excess_per_document: ``nll_per_document`` minus that of the oracle expert.
    """

    domain: str
    documents: int
    tokens: int
    nll_per_token: float
    nll_per_document: float
    perplexity: float
    excess_per_token: float
    excess_per_document: float


@dataclass(frozen=True)
class SystemResult:
    """One system on every domain.

    Attributes:
        name: Its name; that of an expert is its name in the store.
        kind: ``"expert"``, ``"monolith"``, ``"oracle"``, ``"baseline"`` or ``"robust"``.
        domains: One result per domain.
        worst_domain: Domain of the largest excess per document.
        worst_excess_per_document: Worst-case excess over all mixtures of the domains; the unit
            of the robust prior's certificate.
        worst_excess_per_token: The same per token.
    """

    name: str
    kind: str
    domains: tuple[DomainResult, ...]
    worst_domain: str
    worst_excess_per_document: Estimate
    worst_excess_per_token: Estimate

    @property
    def label(self) -> str:
        """Return what tables call it."""
        return f"expert {self.name}" if self.kind == "expert" else self.name


@dataclass(frozen=True)
class Evaluation:
    """Every system on every domain.

    Attributes:
        domains: Domains, in the order of every ``SystemResult.domains``.
        best_expert: The oracle's choice ``k(d)`` per domain.
        systems: The systems.
        confidence: Coverage of the intervals.
        resamples: Bootstrap resamples behind them.
        seed: Seed of the resamples.
    """

    domains: tuple[str, ...]
    best_expert: tuple[str, ...]
    systems: tuple[SystemResult, ...]
    confidence: float
    resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as JSON values."""
        return asdict(self)

    def save(self, folder: Path) -> None:
        """Write ``evaluation.json`` into the folder of a modular model."""
        write_json(folder / _FILE, self.to_json())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Evaluation:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: The model was not evaluated.
            ValueError: The file is damaged.
        """
        file = Path(folder) / _FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing; run `robustgate evaluate` first")
        data = read_json(file)
        try:
            data["systems"] = tuple(_system(system) for system in data["systems"])
            data["domains"] = tuple(data["domains"])
            data["best_expert"] = tuple(data["best_expert"])
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); evaluate again") from error

    def system(self, name: str) -> SystemResult:
        """Return a system by name.

        Raises:
            ValueError: There is no such system.
        """
        for system in self.systems:
            if system.name == name:
                return system
        known = ", ".join(system.name for system in self.systems)
        raise ValueError(f"no system named {name!r}; there are {known}")


def _system(data: Mapping[str, Any]) -> SystemResult:
    """Build a system's result from its JSON form."""
    fields = dict(data)
    fields["domains"] = tuple(DomainResult(**domain) for domain in data["domains"])
    for unit in ("worst_excess_per_document", "worst_excess_per_token"):
        fields[unit] = Estimate(**data[unit])
    return SystemResult(**fields)
