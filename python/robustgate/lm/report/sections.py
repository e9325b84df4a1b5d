"""The sections of a report that compare systems: worst case, every domain, every pair."""

from __future__ import annotations

import math
from collections.abc import Iterable

from robustgate.lm.evaluation.results import Estimate, Evaluation, SystemResult, format_nats
from robustgate.lm.evaluation.systems import PREVIOUS, ROBUST, STATIC, UNIFORM, UPDATING
from robustgate.lm.modular import ModularModel
from robustgate.lm.report.figures import Bar, Line, bars, lines
from robustgate.lm.report.page import Cell, Figure, Key, Row, Section, Stat, Table
from robustgate.lm.report.palette import Palette

_SHARES = tuple(i / 20 for i in range(21))
_VISIBLE = 0.0005
"""Differences below this do not show in the tables."""
_GROUPS = {"expert": 0, "monolith": 1, "soup": 1, "baseline": 2, "robust": 3}


def headline_numbers(model: ModularModel, evaluation: Evaluation) -> tuple[Stat, ...]:
    """Return the numbers to see first."""
    ours = evaluation.system(evaluation.ours)
    proven = model.certificate
    unit = "document" if model.kind == "prior" else "token"
    worst = getattr(ours, f"worst_excess_per_{unit}")
    mean = sum(d.excess_per_token for d in ours.domains) / len(ours.domains)
    stats = [
        Stat(
            "Worst case, proven",
            f"{proven.worst_case:.3f}",
            "nats per document at most, on the documents of the fit, in any mixture of their "
            f"domains{'' if model.kind == 'prior' else ': the certified prior'}",
        ),
        Stat(
            "Worst case, held out",
            format_nats(worst.value),
            f"nats per {unit}, {evaluation.confidence:.0%} interval "
            f"{format_nats(worst.lower)} to {format_nats(worst.upper)}",
        ),
        Stat(
            "Against an oracle",
            f"{mean:+.4f}",
            "nats per token, mean over domains; the oracle is told each document's domain",
        ),
    ]
    for kind, name in (("monolith", "Against the monolith"), ("baseline", "Against static mixing")):
        rivals = [s for s in evaluation.systems if s.kind == kind]
        if rivals:
            rival = rivals[0] if kind == "monolith" else min(rivals, key=lambda s: s.name != STATIC)
            difference = ours.mean_nll_per_token - rival.mean_nll_per_token
            stats.append(
                Stat(
                    name,
                    f"{difference:+.3f}",
                    "nats per token, mean over domains; below 0 is better",
                )
            )
            break
    return tuple(stats)


def worst_case(model: ModularModel, evaluation: Evaluation, palette: Palette) -> Section:
    """Return the worst-case excess of every system: bars and a table."""
    ranked = sorted(evaluation.systems, key=lambda s: -s.worst_excess_per_token.value)
    known = (UNIFORM, UPDATING, ROBUST)
    close = [s for s in ranked if s.name in known]
    figures = [
        Figure(
            bars(
                "Worst-case excess per token of every system",
                [_bar(s, s.worst_excess_per_token, palette) for s in ranked],
                x_label="worst-case excess over the best expert of each domain, nats per token",
            ),
            f"Bars end at the measured value; whiskers span {evaluation.confidence:.0%} intervals. "
            "Systems in hindsight know the answer: they bound what a gate can reach.",
            "In the worst mixture of domains",
        ),
    ]
    if len(model.experts) > 1:
        figures.append(
            Figure(
                bars(
                    "Worst-case excess per document of the Bayes mixtures",
                    [_bar(s, s.worst_excess_per_document, palette) for s in close],
                    x_label="worst-case excess, nats per document",
                    marks=(
                        (model.certificate.worst_case, "certified on the fit"),
                        (math.log(len(model.experts)), f"log {len(model.experts)}"),
                    ),
                ),
                "In the unit of the certificate. No mixture that holds its weights for a document "
                f"beats the uniform one by more than log {len(model.experts)} nats.",
                "Bayes mixtures, enlarged",
            )
        )
    return Section(
        "How bad can it get?",
        (
            "Nobody knows in which proportions domains will be mixed tomorrow. The worst-case "
            "excess is what a system loses against picking the best expert for each domain, in "
            "the mixture of domains that is worst for it.",
        ),
        figures=tuple(figures),
        folded=(
            Table(
                ("system", "nats per document", "nats per token", "worst domain"),
                tuple(
                    Row(
                        (
                            _name(s, palette),
                            Cell(str(s.worst_excess_per_document)),
                            Cell(str(s.worst_excess_per_token)),
                            Cell(s.worst_domain),
                        ),
                        emphasis=s.name == evaluation.ours,
                        muted=not s.fair,
                    )
                    for s in ranked
                ),
                "Worst-case excess over all mixtures of the domains, on held-out documents, with "
                f"{evaluation.confidence:.0%} intervals (bootstrap over documents, "
                f"{evaluation.resamples:,} resamples). The certificate bounds the nats per "
                "document, on the documents of the fit.",
                "The numbers, with intervals",
            ),
        ),
    )


def by_domain(evaluation: Evaluation, palette: Palette) -> Section:
    """Return the losses of every system on every domain: heat maps with the best marked."""
    more = [
        ("nll_document_weighted", 3, "Nats per token, every document counting alike"),
        ("bits_per_byte", 4, "Bits per byte of text"),
        ("perplexity", 2, "Perplexity per token"),
        ("nll_per_document", 1, "Nats per document"),
    ]
    return Section(
        "Every system on every domain",
        (
            "Each expert is strong at home and poor elsewhere. A Bayes mixture reads which domain "
            "it is in from the text so far, and follows the right expert without being told.",
            *_comparison(evaluation),
        ),
        tables=(
            _table(
                evaluation,
                palette,
                "nll_per_token",
                3,
                "",
                "Negative log-likelihood, nats per token; the warmer, the further above the best "
                "of the column. Framed: the best system that knows nothing but the text so far. In "
                "italics: systems that are told the domain, see other documents of it, or know the "
                "answer.",
            ),
        ),
        folded=tuple(
            _table(evaluation, palette, field, digits, title, "As above.")
            for field, digits, title in more
            if getattr(evaluation.systems[0].domains[0], field) is not None
        ),
    )


def pairs(evaluation: Evaluation, palette: Palette) -> Section | None:
    """Return the losses along the mixtures of two domains, and what knowing the shares is worth."""
    if not evaluation.pairs:
        return None
    names = {system.name for system in evaluation.systems}
    wide = [s.name for s in evaluation.systems if s.kind == "monolith"][:1]
    rivals = [*wide, *(name for name in (STATIC,) if name in names)]
    strong = dict.fromkeys(best for best in evaluation.best_expert if best in names)
    limits = _limits(evaluation, [*strong, *rivals, evaluation.ours])
    charts = []
    for pair in evaluation.pairs:
        one, two = (evaluation.domains.index(d) for d in (pair.first, pair.second))
        experts = dict.fromkeys(evaluation.best_expert[i] for i in (one, two))
        drawn = [*(name for name in experts if name in names), *rivals, evaluation.ours]
        charts.append(
            Figure(
                lines(
                    f"Loss on mixtures of {pair.first} and {pair.second}",
                    [
                        Line(
                            evaluation.system(name).label,
                            [evaluation.on_pair(name, pair.first, pair.second, s) for s in _SHARES],
                            palette.system(evaluation.system(name))
                            + (" dashed" if name == STATIC else ""),
                        )
                        for name in drawn
                    ],
                    x_label="",
                    y_label="",
                    at=_SHARES,
                    limits=limits,
                    named=False,
                    width=232,
                    height=160,
                ),
                "",
                f"{pair.first} \N{RIGHTWARDS ARROW} {pair.second}",
            )
        )
    keys = [Key(evaluation.ours, "chosen")]
    keys += [Key(name, "rival" if name == STATIC else "dark") for name in rivals]
    return Section(
        "On mixtures of two domains",
        (
            "From documents of one domain alone, at the left of each chart, to documents of the "
            "other alone, in nats per token. The best expert of a domain, in its own colour, is a "
            "slope: good on one side, poor on the other. A robust model stays low, whatever the "
            "share.",
        ),
        legend=tuple(keys),
        figures=tuple(charts),
        columns=4,
        folded=(_known_shares(evaluation),),
    )


def _known_shares(evaluation: Evaluation) -> Table:
    """Return what fixed weights could do if the shares of two domains were known."""
    shares = evaluation.pairs[0].shares
    shown = [i for i, share in enumerate(shares) if round(share * 20) in (1, 4, 10, 16, 19)]
    return Table.of(
        ("pair", *(f"{shares[i]:.0%} of the second" for i in shown), "largest"),
        [
            (
                f"{pair.first}, {pair.second}",
                *(format_nats(pair.tuned[i]) for i in shown),
                format_nats(max(pair.tuned)),
            )
            for pair in evaluation.pairs
        ],
        "Excess over the oracle of the best fixed weights for each mixture, fitted to it, in nats "
        "per document. A robust prior does not know the shares and pays at most its certificate: "
        "the difference is the price of robustness.",
        "If the shares were known",
    )


def _limits(evaluation: Evaluation, names: Iterable[str]) -> tuple[float, float]:
    """Return a common vertical range for charts of some systems."""
    values = [d.nll_per_token for name in names for d in evaluation.system(name).domains]
    margin = 0.05 * (max(values) - min(values) or 1.0)
    return min(values) - margin, max(values) + margin


def _comparison(evaluation: Evaluation) -> tuple[str, ...]:
    """Say on how many domains the model beats each rival."""
    own = evaluation.system(evaluation.ours).domains
    wins = {
        rival.label: sum(
            mine.nll_per_token < other.nll_per_token - _VISIBLE
            for mine, other in zip(own, rival.domains, strict=True)
        )
        for rival in evaluation.systems
        if rival.kind == "monolith" or rival.name in (STATIC, PREVIOUS, UNIFORM)
    }
    if not wins:
        return ()
    counts = ", ".join(f"the {name} on {count}" for name, count in wins.items())
    return (
        f"Of {len(own)} domains, the {evaluation.ours} has a lower loss (by {_VISIBLE:g} nats per "
        f"token or more) than {counts}.",
    )


def _table(
    evaluation: Evaluation, palette: Palette, field: str, digits: int, title: str, caption: str
) -> Table:
    """Return one number of every system on every domain."""
    values = {s.name: [getattr(d, field) for d in s.domains] for s in evaluation.systems}
    for row in values.values():
        row.append(sum(row) / len(row))
    nats = {s.name: [d.nll_per_token for d in s.domains] for s in evaluation.systems}
    for row in nats.values():
        row.append(sum(row) / len(row))
    fair = [values[s.name] for s in evaluation.systems if s.fair]
    best = [min(column) for column in zip(*fair, strict=True)]
    least = [min(column) for column in zip(*nats.values(), strict=True)]
    largest = max(n - m for row in nats.values() for n, m in zip(row, least, strict=True)) or 1.0
    rows, group = [], 0
    for system in evaluation.systems:
        before, group = group, _GROUPS.get(system.kind, 4)
        rows.append(
            Row(
                (
                    _name(system, palette),
                    *(
                        Cell(
                            f"{value:.{digits}f}",
                            ((n - m) / largest) ** 0.7,
                            best=system.fair and f"{value:.{digits}f}" == f"{top:.{digits}f}",
                        )
                        for value, n, m, top in zip(
                            values[system.name], nats[system.name], least, best, strict=True
                        )
                    ),
                ),
                emphasis=system.name == evaluation.ours,
                muted=not system.fair,
                first=group != before,
            )
        )
    return Table(("system", *evaluation.domains, "mean"), tuple(rows), caption, title)


def _name(system: SystemResult, palette: Palette) -> Cell:
    return Cell(system.label, style=palette.system(system) if system.fair else "")


def _bar(system: SystemResult, estimate: Estimate, palette: Palette) -> Bar:
    return Bar(
        system.label,
        estimate.value,
        estimate.lower,
        estimate.upper,
        format_nats(estimate.value),
        palette.system(system),
    )
