"""The sections of a report about the gate: along a document, at a topic switch, and its fit."""

from __future__ import annotations

import math

from robustgate.lm.evaluation.results import Evaluation
from robustgate.lm.evaluation.systems import ORACLE, PREVIOUS, SHARE, STATIC, UNIFORM
from robustgate.lm.evaluation.trace import Trace
from robustgate.lm.modular import ModularModel
from robustgate.lm.report.figures import Line, areas, lines
from robustgate.lm.report.page import Cell, Figure, Passage, Row, Section, Table, Token
from robustgate.lm.report.palette import Palette
from robustgate.lm.report.svg import COLOURS, WIDTH

_ROUNDING = 1e-12
"""Duality gaps below this are rounding errors of double precision."""


def gate(trace: Trace, palette: Palette) -> Section:
    """Return how the gate moves along a document that changes its topic."""
    return Section(
        "The gate along one document",
        (
            "This document was pasted together from several domains; the gate was not told. It "
            "moves on evidence alone, token by token.",
        ),
        figures=(
            Figure(
                areas(
                    "Gate weights along a mixed document",
                    trace.weights,
                    trace.experts,
                    [
                        (piece.domain, piece.first, palette.domain(piece.domain))
                        for piece in trace.pieces
                    ],
                    x_label="token",
                ),
                "Weight of every expert before each token. The strip above has the colour of the "
                "domain's best expert: what the gate should find out.",
            ),
        ),
        passages=tuple(
            Passage(
                f"{piece.domain} text",
                tuple(_token(trace, t) for t in range(piece.first, piece.last)),
            )
            for piece in trace.pieces
        ),
    )


def _token(trace: Trace, t: int) -> Token:
    weights = trace.weights[t]
    order = sorted(range(len(weights)), key=lambda k: -weights[k])
    note = "\n".join(f"{weights[k]:.3f} {trace.experts[k]}" for k in order[:5])
    return Token(trace.tokens[t], f"c{order[0] % COLOURS}", f"{weights[order[0]]:.2f}", note)


def switch(evaluation: Evaluation, palette: Palette) -> Section | None:
    """Return the losses around a change of the domain half way through documents."""
    found = evaluation.switch
    if found is None:
        return None
    grey = {STATIC: "rival dashed", PREVIOUS: "rival thin", UNIFORM: "rival", SHARE: "dark"}
    shown = [
        result
        for result in found.systems
        if result.system in (*grey, evaluation.ours) and result.system != ORACLE
    ]
    middles = [position + found.width / 2 for position in found.positions]
    chart = Figure(
        lines(
            "Excess over the oracle around a change of topic",
            [
                Line(
                    result.system,
                    result.excess,
                    "chosen" if result.system == evaluation.ours else grey[result.system],
                )
                for result in shown
            ],
            x_label="tokens from the change of topic",
            y_label="excess over the oracle of each half, nats per token",
            at=middles,
            mark=0.0,
            limits=_range([v for result in shown for v in result.excess]),
            width=WIDTH,
            height=290,
        ),
        f"Means over {found.width} tokens. The experts read each document from its own "
        "beginning, so that this is about the gate alone.",
    )
    return Section(
        "When the topic changes",
        (
            f"{found.documents:,} documents, each the first half of one domain's document and the "
            "second half of another's. The exact Bayes gate must first outweigh all its evidence "
            "for the old topic; a gate that forgets a little, or that has learned to, is back "
            "after a few tokens.",
        ),
        figures=(chart,) if len(found.positions) > 2 else (),
        tables=(
            Table(
                ("system", "first half", "second half", "excess, first", "excess, second"),
                tuple(
                    Row(
                        (
                            Cell(r.system, style=palette.system(evaluation.system(r.system))),
                            Cell(f"{r.before:.3f}"),
                            Cell(f"{r.after:.3f}"),
                            Cell(f"{r.before - found.systems[0].before:+.4f}"),
                            Cell(f"{r.after - found.systems[0].after:+.4f}"),
                        ),
                        emphasis=r.system == evaluation.ours,
                        muted=r.system == ORACLE,
                    )
                    for r in found.systems
                ),
                "Nats per token on both halves, and the excess over "
                f"{'the oracle' if found.systems[0].system == ORACLE else 'the first row'}.",
            ),
        ),
    )


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(*values, 0.0), max(*values, 0.0)
    margin = 0.04 * ((high - low) or 1.0)
    return low - margin, high + margin


def solver(model: ModularModel, palette: Palette) -> Section:
    """Return the solver's course and its result."""
    lower, upper = (model.trajectory[key].tolist() for key in ("lower_bound", "upper_bound"))
    gap = [max(u - v, _ROUNDING) for u, v in zip(upper, lower, strict=True)]
    first = next(filter(math.isfinite, gap))
    last = f"{gap[-1]:.1g}" if gap[-1] > _ROUNDING else f"less than {_ROUNDING:g}"
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
        columns=2,
        figures=(
            Figure(
                lines(
                    "Duality gap by iteration",
                    [Line("gap", gap, "chosen")],
                    x_label="iteration",
                    y_label="nats per document",
                    log=True,
                ),
                f"From {first:.2g} to {last} nats: no prior is better by more than that.",
                "Duality gap",
            ),
            Figure(
                lines(
                    "Least favourable mixture by iteration",
                    [
                        Line(domain, mixture[:, d].tolist(), palette.domain(domain))
                        for d, domain in enumerate(model.domains)
                    ],
                    x_label="iteration",
                    y_label="share",
                ),
                "The adversary's mixture of domains. Its final shares say which domains bind.",
                "Least favourable mixture",
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
                styles=[palette.expert(name) for name in model.names],
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
                styles=[palette.domain(domain) for domain in model.domains],
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


def training(model: ModularModel, palette: Palette) -> Section | None:
    """Return what training a learned gate found, on documents it was not trained on."""
    found = model.training
    if found is None:
        return None
    return Section(
        "How the gate was trained",
        (
            f"The {model.kind} gate starts as the Bayes gate of the certified prior and is trained "
            "against the worst mixture of the domains. The certificate is that of the prior; what "
            "the gate adds is measured, not proven.",
            found.sentence(),
        ),
        tables=(
            Table.of(
                ("domain", "trained on", "held out", "start", "kept gate", "share at the end"),
                [
                    (
                        domain,
                        f"{seen:,}",
                        f"{kept:,}",
                        f"{before:+.4f}",
                        f"{after:+.4f}",
                        f"{s:.3f}",
                    )
                    for domain, seen, kept, before, after, s in zip(
                        found.domains,
                        found.documents,
                        found.held_out,
                        found.before,
                        found.after,
                        found.mixture,
                        strict=True,
                    )
                ],
                f"Documents, and held-out excess over the domain's best expert in nats per "
                f"{found.unit}, before and after; the share is the domain's in the least "
                "favourable mixture that training found.",
                styles=[palette.domain(domain) for domain in found.domains],
            ),
        ),
    )
