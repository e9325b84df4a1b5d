"""Results of an evaluation: frozen, and the same after a trip through JSON."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustgate.lm.evaluation.findings import (
    Conflict,
    Divergence,
    Forgetting,
    PairCurve,
    TopicSwitch,
)
from robustgate.lm.files import read_json, write_json
from robustgate.lm.jsonable import from_json, to_json

FILE = "evaluation.json"
VERSION = 2


def format_nats(value: float) -> str:
    """Format a loss: four decimals below 0.1, one less for every factor of ten above."""
    if value == 0:
        return "0"
    size = abs(value)
    digits = 4 if size < 0.1 else 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{round(value, digits) + 0.0:.{digits}f}"  # never "-0.00"


@dataclass(frozen=True)
class Estimate:
    """A number measured on a sample of documents, with its bootstrap interval.

    Attributes:
        value: On all documents.
        lower: Lower end of the interval.
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

    With ``NLL(x)`` the negative log-likelihood of a document and ``T(x)`` its tokens, the end of
    the document included:

    Attributes:
        domain: Domain.
        documents: Number of documents n.
        tokens: Number of scored tokens.
        nll_per_token: Token-weighted, ``sum_x NLL(x) / sum_x T(x)``.
        nll_document_weighted: Document-weighted, ``(1/n) sum_x NLL(x) / T(x)``.
        nll_per_document: ``(1/n) sum_x NLL(x)``.
        perplexity: ``exp(nll_per_token)``.
        bits_per_byte: ``sum_x NLL(x) / log 2`` by the bytes of the text; ``None`` where the text
            was not at hand. It does not depend on the tokenizer.
        excess_per_token: ``nll_per_token`` minus that of the oracle expert.
        excess_per_document: ``nll_per_document`` minus that of the oracle expert.
    """

    domain: str
    documents: int
    tokens: int
    nll_per_token: float
    nll_document_weighted: float
    nll_per_document: float
    perplexity: float
    bits_per_byte: float | None
    excess_per_token: float
    excess_per_document: float


@dataclass(frozen=True)
class SystemResult:
    """One system on every domain.

    Attributes:
        name: Its name; that of an expert is its name in the store.
        kind: ``"expert"``, ``"monolith"``, ``"soup"``, ``"oracle"``, ``"bound"``, ``"baseline"``
            or ``"robust"``.
        fair: Whether it is a model of a text of which nothing is known. The oracle is told the
            domain, the cached and the updating prior see other documents of it, bounds know the
            answer.
        domains: One result per domain.
        worst_domain: Domain of the largest excess per document.
        worst_excess_per_document: Worst-case excess over all mixtures of the domains; the unit
            of the robust prior's certificate.
        worst_excess_per_token: The same per token.
    """

    name: str
    kind: str
    fair: bool
    domains: tuple[DomainResult, ...]
    worst_domain: str
    worst_excess_per_document: Estimate
    worst_excess_per_token: Estimate

    @property
    def label(self) -> str:
        """Return what tables call it."""
        return f"expert {self.name}" if self.kind == "expert" else self.name

    @property
    def mean_nll_per_token(self) -> float:
        """Return the mean over domains of ``nll_per_token``, every domain counting alike."""
        return sum(result.nll_per_token for result in self.domains) / len(self.domains)


@dataclass(frozen=True)
class Evaluation:
    """Every system on every domain.

    Attributes:
        domains: Domains, in the order of every ``SystemResult.domains``.
        experts: Experts, in the order of the prior.
        best_expert: The oracle's choice ``k(d)`` per domain.
        ours: Name of the system that is the model itself.
        systems: The systems.
        pairs: Bounds on mixtures of two domains.
        forgetting: What taking out each expert costs; ``None`` for a single expert.
        switch: Documents that change their domain; ``None`` for a single domain.
        divergence: How far the experts are apart; ``None`` if it was not measured.
        conflict: Gradients of the monolith; ``None`` if it was not measured.
        notes: What to know about single systems, and what was left out and why.
        confidence: Coverage of the intervals.
        resamples: Bootstrap resamples behind them.
        seed: Seed of the resamples.
    """

    domains: tuple[str, ...]
    experts: tuple[str, ...]
    best_expert: tuple[str, ...]
    ours: str
    systems: tuple[SystemResult, ...]
    pairs: tuple[PairCurve, ...]
    forgetting: Forgetting | None
    switch: TopicSwitch | None
    divergence: Divergence | None
    conflict: Conflict | None
    notes: tuple[str, ...]
    confidence: float
    resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as JSON values, see ``jsonable.to_json``."""
        return {"version": VERSION, **to_json(self)}

    def save(self, folder: Path) -> None:
        """Write ``evaluation.json`` into the folder of a modular model."""
        write_json(folder / FILE, self.to_json())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Evaluation:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: The model was not evaluated.
            ValueError: The file is damaged, or another release wrote it.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing; run `robustgate evaluate` first")
        data = read_json(file)
        version = data.pop("version", 1) if isinstance(data, dict) else None
        if version != VERSION:
            raise ValueError(
                f"{file}: version {version}, but this release reads version {VERSION}; evaluate "
                "again, which reads the scores and runs no expert"
            )
        try:
            return from_json(cls, data)
        except TypeError as error:
            raise ValueError(f"{file}: damaged ({error}); evaluate again") from error

    def system(self, name: str) -> SystemResult:
        """Return a system by name.

        Raises:
            ValueError: No system has this name.
        """
        for system in self.systems:
            if system.name == name:
                return system
        known = ", ".join(system.name for system in self.systems)
        raise ValueError(f"no system named {name!r}; there are {known}")

    def on_pair(self, name: str, first: str, second: str, share: float) -> float:
        """Return the nats per token of a system on a mixture of two domains.

            ((1 - s) n_1 + s n_2) / ((1 - s) t_1 + s t_2)

        with ``n_d`` its mean nats per document of domain ``d`` and ``t_d`` the mean tokens.

        Args:
            name: The system.
            first: Domain at share 0.
            second: Domain at share 1.
            share: Share ``s`` of documents of ``second``.
        """
        system = self.system(name)
        one, two = (system.domains[self.domains.index(domain)] for domain in (first, second))
        nats = (1 - share) * one.nll_per_document + share * two.nll_per_document
        lengths = [result.tokens / result.documents for result in (one, two)]
        return nats / ((1 - share) * lengths[0] + share * lengths[1])
