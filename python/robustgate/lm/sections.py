"""The sections of a modular model's report: figures, tables and what they mean."""

from __future__ import annotations

import math

from robustgate.lm.evaluate import ROBUST, UNIFORM
from robustgate.lm.figures import COLOURS, Bar, Line, areas, bars, lines
from robustgate.lm.modular import ModularModel
from robustgate.lm.page import Cell, Figure, Passage, Row, Section, Table, Token
from robustgate.lm.results import Estimate, Evaluation, SystemResult, format_nats
from robustgate.lm.trace import Trace

ROUNDING = 1e-12
"""Duality gaps below this are rounding errors of double precision."""


def worst_case(model: ModularModel, evaluation: Evaluation) -> Section:
    """Return the worst-case excess of every system: bars and a table."""
    ranked = sorted(evaluation.systems, key=lambda s: -s.worst_excess_per_document.value)
    mixtures = [system for system in evaluation.systems if system.name in (UNIFORM, ROBUST)]
    everything = bars(
        "Worst-case excess per token of every system",
        [_bar(system, system.worst_excess_per_token) for system in ranked],
        x_label="worst-case excess, nats per token",
    )
    close = bars(
        "Worst-case excess per document of the Bayes mixtures",
        [_bar(system, system.worst_excess_per_document) for system in mixtures],
        x_label="worst-case excess, nats per document",
        marks=(
            (model.certificate.worst_case, "certified for the fit"),
            (math.log(len(model.experts)), f"log {len(model.experts)}"),
        ),
    )
    level = f"{evaluation.confidence:.0%}"
    return Section(
        "How bad can it get?",
        (
            "Nobody knows in which proportions domains will be mixed tomorrow. The worst-case "
            "excess is what a system loses against picking the best expert for each domain, in "
            "the mixture of domains that is worst for it.",
        ),
        (
            Figure(everything, f"Bars end at the measured value, whiskers span {level} intervals."),
            Figure(
                close,
                "The two Bayes mixtures, enlarged, in the unit of the certificate. No sequence "
                f"mixture beats the uniform one by more than log {len(model.experts)} nats a "
                "document.",
            ),
        ),
        tables=(
            Table(
                ("system", "nats per document", "nats per token", "worst domain"),
                tuple(
                    Row(
                        (
                            Cell(system.label),
                            Cell(str(system.worst_excess_per_document)),
                            Cell(str(system.worst_excess_per_token)),
                            Cell(system.worst_domain),
                        ),
                        emphasis=system.name == ROBUST,
                    )
                    for system in ranked
                ),
                "Worst-case excess over all mixtures of the domains, on held-out documents, with "
                f"{level} intervals (bootstrap over documents, {evaluation.resamples:,} "
                "resamples). The certificate bounds the nats per document, on the documents of "
                "the fit.",
            ),
        ),
    )


def by_domain(evaluation: Evaluation) -> Section:
    """Return the losses of every system on every domain: heat maps."""
    columns = ("system", *evaluation.domains)
    return Section(
        "Every system on every domain",
        (
            "Each expert is strong at home and poor elsewhere. A Bayes mixture reads which domain "
            "it is in from the text so far, and follows the right expert without being told.",
            *_comparison(evaluation),
        ),
        tables=(
            Table(
                columns,
                _heat_rows(evaluation, "nll_per_token", 3),
                "Negative log-likelihood per token. The warmer a cell, the further it lies above "
                "the best value of its column.",
            ),
            Table(columns, _heat_rows(evaluation, "nll_per_document", 1), "The same per document."),
            Table(columns, _heat_rows(evaluation, "perplexity", 1), "The same as perplexity."),
        ),
    )


def _comparison(evaluation: Evaluation) -> tuple[str, ...]:
    """Say on how many domains the robust mixture beats each rival."""
    own = evaluation.system(ROBUST).domains
    wins = {
        rival.label: sum(
            mine.nll_per_token < other.nll_per_token
            for mine, other in zip(own, rival.domains, strict=True)
        )
        for rival in evaluation.systems
        if rival.kind in ("monolith", "baseline")
    }
    if not wins:
        return ()
    counts = ", ".join(f"the {name} on {count}" for name, count in wins.items())
    return (f"Of {len(own)} domains, the robust mixture has a lower loss than {counts}.",)


def _heat_rows(evaluation: Evaluation, field: str, digits: int) -> tuple[Row, ...]:
    values = [[getattr(d, field) for d in system.domains] for system in evaluation.systems]
    nats = [[d.nll_per_token for d in system.domains] for system in evaluation.systems]
    best = [min(column) for column in zip(*nats, strict=True)]
    excess = [[v - b for v, b in zip(row, best, strict=True)] for row in nats]
    largest = max(max(row) for row in excess) or 1.0
    return tuple(
        Row(
            (
                Cell(system.label),
                *(
                    Cell(f"{value:.{digits}f}", math.sqrt(over / largest))
                    for value, over in zip(row, overs, strict=True)
                ),
            ),
            emphasis=system.name == ROBUST,
        )
        for system, row, overs in zip(evaluation.systems, values, excess, strict=True)
    )


def solver(model: ModularModel) -> Section:
    """Return the solver's course and its result."""
    lower, upper = (model.trajectory[key].tolist() for key in ("lower_bound", "upper_bound"))
    gap = [max(u - v, ROUNDING) for u, v in zip(upper, lower, strict=True)]
    first = next(filter(math.isfinite, gap))
    last = f"{gap[-1]:.1g}" if gap[-1] > ROUNDING else f"less than {ROUNDING:g}"
    mixture = model.trajectory["mixtures"]  # [I, D]
    proven = model.certificate
    return Section(
        "How the prior was found",
        (
            "The prior is the solution of a game: one side chooses weights for the experts, the "
            "other the mixture of domains that hurts most. The solver stops when the best answer "
            "of one side and of the other are the same, and that is the proof.",
            *_uniform(model),
        ),
        side_by_side=True,
        figures=(
            Figure(
                lines(
                    "Duality gap by iteration",
                    [Line("gap", gap, "chosen")],
                    x_label="iteration",
                    y_label="duality gap, nats per document",
                    log=True,
                ),
                f"From {first:.2g} to {last} nats: no prior is better by more than that.",
            ),
            Figure(
                lines(
                    "Least favourable mixture by iteration",
                    [
                        Line(domain, mixture[:, d].tolist(), f"c{d % COLOURS}")
                        for d, domain in enumerate(model.domains)
                    ],
                    x_label="iteration",
                    y_label="share in the least favourable mixture",
                ),
                "The adversary's mixture of domains. Its final shares say which domains bind.",
            ),
        ),
        tables=(
            Table.of(
                ("expert", "prior weight"),
                [
                    (name, f"{weight:.4f}")
                    for name, weight in zip(model.names, model.prior.tolist(), strict=True)
                ],
                f"The prior, with {proven.delta:g} of the uniform prior mixed in so that no "
                "expert can be lost.",
            ),
            Table.of(
                ("domain", "share in the worst mixture", "baseline, nats per document"),
                [
                    (domain, f"{share:.4f}", f"{base:.2f}")
                    for domain, share, base in zip(
                        model.domains, model.mixture.tolist(), model.baseline.tolist(), strict=True
                    )
                ],
                f"The least favourable mixture, and the {proven.baseline} baseline of the losses.",
            ),
        ),
    )


def _uniform(model: ModularModel) -> tuple[str, ...]:
    """Say so if the solution is the uniform prior."""
    if float((model.prior - 1 / len(model.prior)).abs().max()) > 0.005:
        return ()
    return (
        "Here it is the uniform prior, now with a proof: the domains are easy to tell apart and "
        "every expert is needed, so that no other weights can promise less. It differs where "
        "experts overlap, repeat one another or serve no domain.",
    )


def gate(trace: Trace) -> Section:
    """Return how the gate moves along a document that changes its topic."""
    return Section(
        "The gate along one document",
        (
            "This document was pasted together from several domains; the gate was not told. It "
            "moves on evidence alone, token by token. The exact Bayes gate must first outweigh "
            "the evidence for the old topic, so that it changes its mind some tokens late.",
        ),
        figures=(
            Figure(
                areas(
                    "Gate weights along a mixed document",
                    trace.weights,
                    trace.experts,
                    [(piece.domain, piece.first) for piece in trace.pieces],
                    x_label="token",
                ),
                "Weight of every expert before each token; dashed lines mark where the text "
                "changes its domain.",
            ),
        ),
        passages=tuple(
            Passage(
                f"{piece.domain} text",
                tuple(
                    Token(trace.tokens[t], f"c{top % COLOURS}", f"{trace.weights[t][top]:.2f}")
                    for t in range(piece.first, piece.last)
                    for top in [max(range(len(trace.experts)), key=trace.weights[t].__getitem__)]
                ),
            )
            for piece in trace.pieces
        ),
    )


def provenance(model: ModularModel, evaluation: Evaluation) -> Section:
    """Return the certificate in full, the held-out documents and the hashes."""
    proven = model.certificate
    return Section(
        "What was measured",
        (
            "Every number of this report comes from stored log-probabilities of single tokens; "
            "no expert was changed or trained further.",
        ),
        tables=(
            Table.of(
                ("certificate", "nats per document"),
                (
                    ("no fixed prior can promise less than", f"{proven.lower_bound:.6f}"),
                    ("the solver's prior, at most", f"{proven.upper_bound:.6f}"),
                    ("the prior of this model, after its floor", f"{proven.worst_case:.6f}"),
                    ("on any document, against any expert, at most", f"{proven.guarantee:.6f}"),
                ),
                f"Worst case over all mixtures of {len(model.domains)} domains, on the "
                f"{proven.documents:,} documents of the fit; baseline: {proven.baseline}.",
            ),
            Table.of(
                ("domain", "documents", "tokens", "best expert"),
                [
                    (d.domain, f"{d.documents:,}", f"{d.tokens:,}", best)
                    for d, best in zip(
                        evaluation.systems[0].domains, evaluation.best_expert, strict=True
                    )
                ],
                "The held-out documents.",
            ),
            Table.of(
                ("expert", "SHA-256 of configuration and weights"),
                [(expert.name, expert.sha256) for expert in model.experts],
                f"Tokenizer {model.tokenizer_sha256}; log-probabilities {model.store_sha256}.",
            ),
        ),
    )


def _bar(system: SystemResult, estimate: Estimate) -> Bar:
    style = {"robust": "chosen", "baseline": "rival", "monolith": "rival"}.get(system.kind, "plain")
    return Bar(
        system.label,
        estimate.value,
        estimate.lower,
        estimate.upper,
        format_nats(estimate.value),
        style,
    )
