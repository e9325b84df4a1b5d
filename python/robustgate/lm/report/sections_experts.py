"""The sections of a report about the experts: removals, differences, and where all came from."""

from __future__ import annotations

import math

from robustgate.lm.evaluation.results import Evaluation
from robustgate.lm.modular import ModularModel
from robustgate.lm.report.figures import Bar, bars, heat_map
from robustgate.lm.report.page import Figure, Section, Table
from robustgate.lm.report.palette import Palette
from robustgate.lm.report.svg import WIDTH


def forgetting(evaluation: Evaluation, palette: Palette) -> Section | None:
    """Return what every domain loses when each expert is taken out."""
    found = evaluation.forgetting
    if found is None:
        return None
    change = [
        [after - before for after in row]
        for row, before in zip(found.without, found.whole, strict=True)
    ]
    domains = [(domain, palette.domain(domain)) for domain in evaluation.domains]
    experts = [(name, palette.expert(name)) for name in found.experts]
    return Section(
        "If an expert is taken out",
        (
            "The expert's weight goes to the others and nothing is fitted again. What a domain "
            "loses says who serves it: where only one cell of a column is warm, that expert can "
            "leave and take its own domain with it, and nothing else.",
        ),
        figures=(
            Figure(
                heat_map(
                    "Loss of every domain without each expert",
                    change,
                    domains,
                    experts,
                    digits=3,
                    width=WIDTH,
                ),
                "Change of the certified mixture's loss on each domain (rows) without each expert "
                "(columns), nats per token.",
            ),
        ),
        folded=(
            Table.of(
                ("domain", "all experts", *(f"without {name}" for name in found.experts)),
                [
                    (domain, f"{before:.3f}", *(f"{after:.3f}" for after in row))
                    for domain, before, row in zip(
                        evaluation.domains, found.whole, found.without, strict=True
                    )
                ],
                "Nats per token of the certified mixture.",
                "The losses",
            ),
        ),
    )


def differences(evaluation: Evaluation, palette: Palette) -> Section | None:
    """Return how far the experts are apart, and how the monolith's gradients agree."""
    figures, tables = [], []
    apart, conflict = evaluation.divergence, evaluation.conflict
    experts = [(name, palette.expert(name)) for name in evaluation.experts]
    domains = [(domain, palette.domain(domain)) for domain in evaluation.domains]
    size = len(experts)
    if apart is not None:
        mean = [
            [sum(own[i][j] for own in apart.pairwise) / len(domains) for j in range(size)]
            for i in range(size)
        ]
        figures += [
            Figure(
                heat_map(
                    "Divergence of two experts", mean, experts, experts, digits=3, diagonal=False
                ),
                "Jensen-Shannon divergence of the next-token distributions of two experts, mean "
                "over domains, nats per token; at most log 2 = 0.693.",
                "Two experts",
            ),
            Figure(
                bars(
                    "Divergence of all experts by domain",
                    [
                        Bar(domain, value, value, value, f"{value:.3f}", style)
                        for (domain, style), value in zip(domains, apart.together, strict=True)
                    ],
                    x_label="nats per token",
                    marks=((math.log(size), f"log {size}"),),
                    width=WIDTH // 2,
                    labels=118,
                ),
                "That of all experts together, on the text of each domain. Near 0 they agree and "
                f"any gate will do; near log {size} the choice of weights is all that matters.",
                "All experts, by domain",
            ),
        ]
        tables.append(
            Table.of(
                ("domain", "all", *(f"{a}, {b}" for a, b in _pairs(evaluation.experts))),
                [
                    (
                        domain,
                        f"{together:.3f}",
                        *(f"{own[i][j]:.3f}" for i in range(size) for j in range(i + 1, size)),
                    )
                    for domain, together, own in zip(
                        evaluation.domains, apart.together, apart.pairwise, strict=True
                    )
                ],
                "Jensen-Shannon divergence, nats per token, from the experts' logits at "
                f"{apart.tokens:,} tokens of each domain.",
                "Divergence of every pair on every domain",
            )
        )
    if conflict is not None:
        figures.append(
            Figure(
                heat_map(
                    "Cosine between the gradients of two domains",
                    conflict.cosine,
                    domains,
                    domains,
                    digits=2,
                    warm="low",
                    diagonal=False,
                ),
                f"Cosine between the gradients of the {conflict.model}'s losses on two domains, "
                f"about {conflict.tokens:,} tokens each; {conflict.negative_share:.0%} of the "
                "pairs pull against each other. Experts trained apart have no such pairs.",
                f"Gradients of the {conflict.model}",
            )
        )
        tables.append(
            Table.of(
                ("domain", *evaluation.domains),
                [
                    (domain, *(f"{value:.3f}" for value in row))
                    for domain, row in zip(evaluation.domains, conflict.cosine, strict=True)
                ],
                f"Cosine between the gradients of the {conflict.model}.",
                "Gradients",
            )
        )
    if not figures:
        return None
    return Section(
        "How different the experts are",
        ("What a single model would have to average away.",),
        figures=tuple(figures),
        columns=2,
        folded=tuple(tables),
    )


def provenance(model: ModularModel, evaluation: Evaluation, palette: Palette) -> Section:
    """Return the certificate in full, the held-out documents and the hashes."""
    proven = model.certificate
    return Section(
        "What was measured",
        (
            "Every loss comes from stored log-probabilities of single tokens; no expert was "
            "changed or trained further.",
            *evaluation.notes,
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
                styles=[palette.domain(domain) for domain in evaluation.domains],
            ),
            Table.of(
                ("expert", "SHA-256 of configuration and weights"),
                [(expert.name, expert.sha256) for expert in model.experts],
                f"Tokenizer {model.tokenizer_sha256}; log-probabilities {model.store_sha256}.",
                styles=[palette.expert(name) for name in model.names],
            ),
        ),
    )


def _pairs(names: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
