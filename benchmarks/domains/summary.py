"""The numbers of one seed, gathered from its evaluations and training manifests."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from judging import KINDS, evaluations, model_of

from robustgate.lm.evaluation.results import Evaluation, SystemResult


@dataclass(frozen=True)
class System:
    """One system: its losses on test, domain by domain.

    Attributes:
        nll: nats per token.
        nll_per_document: nats per document.
        bits_per_byte: of the text.
        excess: ``nll`` less that of the oracle expert.
        worst: the largest excess, nats per token, with the bootstrap interval over documents.
        worst_per_document: the same per document.
    """

    nll: list[float]
    nll_per_document: list[float]
    bits_per_byte: list[float | None]
    excess: list[float]
    worst: tuple[float, float, float]
    worst_per_document: tuple[float, float, float]


@dataclass
class Outcome:
    """One seed.

    Attributes:
        domains: their names, in the order of every list.
        systems: by set of experts and name.
        tokens, documents: of test, by domain.
        prior: certified, by expert, and its least favourable mixture.
        certificate: of the prior on validation, nats per document.
        gates: the training record of each learned gate.
        switch: documents that change their domain: excess by distance, nats per token.
        forgetting, divergence, conflict: as the evaluation has them.
        models: weights and tokens of every model.
    """

    seed: int
    domains: list[str]
    systems: dict[str, dict[str, System]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    prior: dict[str, float] = field(default_factory=dict)
    mixture: dict[str, float] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    switch: dict[str, list[float]] = field(default_factory=dict)
    switch_positions: list[int] = field(default_factory=list)
    forgetting: Any = None
    divergence: Any = None
    conflict: Any = None
    models: dict[str, dict[str, float]] = field(default_factory=dict)


def summarise(out: Path, seed: int) -> Outcome:
    """Gather the numbers of one seed."""
    evaluated = {kind: evaluations(out, seed, kind) for kind in KINDS}
    found = evaluated["experts"]
    first = found["prior"]
    outcome = Outcome(seed, list(first.domains))
    for kind, judged in evaluated.items():
        if judged:
            outcome.systems[kind] = {
                name: _system(system)
                for gate, evaluation in judged.items()
                for name, system in _shown(gate, evaluation).items()
            }
    content = first.to_json()
    outcome.tokens = [part.tokens for part in first.systems[0].domains]
    outcome.documents = [part.documents for part in first.systems[0].domains]
    outcome.forgetting, outcome.divergence = content["forgetting"], content["divergence"]
    outcome.conflict = content["conflict"]
    for gate, evaluation in found.items():
        if evaluation.switch is not None:
            outcome.switch_positions = list(evaluation.switch.positions)
            for part in evaluation.switch.systems:
                name = gate if part.system == evaluation.ours and gate != "prior" else part.system
                outcome.switch[name] = list(part.excess)
    for gate in found:
        model = model_of(out, seed, "experts", gate)
        content = model.to_json()
        outcome.prior, outcome.mixture = content["prior"], content["mixture"]
        outcome.certificate = content["certificate"]
        if content.get("training") is not None:
            outcome.gates[gate] = content["training"]
    folder = out / f"seed{seed}"
    for name in ("seed", "monolith", "brief", "small", *(f"experts/{d}" for d in outcome.domains)):
        manifest = json.loads((folder / name / "robustgate.json").read_text("utf-8"))
        outcome.models[name] = {key: manifest[key] for key in ("parameters", "tokens", "loss")}
    return outcome


def _shown(gate: str, evaluation: Evaluation) -> dict[str, SystemResult]:
    """Return what an evaluation adds: everything for the prior, else the gate alone."""
    if gate == "prior":
        return {system.label: system for system in evaluation.systems}
    return {gate: evaluation.system(evaluation.ours)}


def _system(result: SystemResult) -> System:
    token, document = result.worst_excess_per_token, result.worst_excess_per_document
    return System(
        nll=[part.nll_per_token for part in result.domains],
        nll_per_document=[part.nll_per_document for part in result.domains],
        bits_per_byte=[part.bits_per_byte for part in result.domains],
        excess=[part.excess_per_token for part in result.domains],
        worst=(token.value, token.lower, token.upper),
        worst_per_document=(document.value, document.lower, document.upper),
    )
