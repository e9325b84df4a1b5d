"""The study in words: claim, reproduced or not, figures."""

from statistics import mean, stdev

from study import Outcome

MARGIN = 1e-3  # nats per token


def at(nll: list[float], share: float) -> float:
    """NLL per token at the mixture (share, 1 - share)."""
    return share * nll[0] + (1 - share) * nll[1]


def spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def better(pairs: list[tuple[float, float]]) -> str:
    """Whether the first loss is below the second: a thousandth of a nat per token is a tie."""
    wins = sum(a < b - MARGIN for a, b in pairs)
    losses = sum(a > b + MARGIN for a, b in pairs)
    answer = "yes" if wins == len(pairs) else "no" if losses == len(pairs) else "not clearly"
    return f"{answer}: {wins} better, {len(pairs) - wins - losses} tied, {losses} worse"


def verdict(holds: list[bool]) -> str:
    answer = "yes" if all(holds) else "in part" if any(holds) else "no"
    return f"{answer} ({sum(holds)} of {len(holds)})"


def claims(runs: list[Outcome]) -> list[tuple[str, str, str]]:
    def oracle(run: Outcome, share: float) -> float:
        return min(run.oracle, key=lambda point: abs(point[0] - share))[1]

    half = [(at(r.nll["gate"], 0.5), oracle(r, 0.5)) for r in runs]
    ends = [(at(r.nll["gate"], s), oracle(r, s)) for r in runs for s in (0.0, 1.0)]
    worst = [
        (max(r.nll["gate"]), min(max(r.nll["retrained, small"]), max(r.nll["retrained, large"])))
        for r in runs
    ]
    bayes = [(max(r.nll["gate"]), max(r.nll["uniform Bayes"])) for r in runs]
    return [
        (
            "at (.5, .5) the gate beats the larger model retrained for that mixture",
            better(half),
            f"{spread([g for g, _ in half])} against {spread([o for _, o in half])}",
        ),
        (
            "at the ends the retrained oracle beats the gate",
            better([(o, g) for g, o in ends]),
            f"{spread([o for _, o in ends])} against {spread([g for g, _ in ends])}",
        ),
        (
            "in the worst case the gate beats both retrained models",
            better(worst),
            f"{spread([g for g, _ in worst])} against {spread([m for _, m in worst])}",
        ),
        (
            "lambda_t tends to (.5, .5)",
            verdict([abs(r.summary["lambda_A"] - 0.5) < 0.05 for r in runs]),
            f"lambda_A {spread([r.summary['lambda_A'] for r in runs])}",
        ),
        (
            "Z_t tends to 1",
            verdict([abs(r.summary["Z"] - 1) < 0.05 for r in runs]),
            f"Z {spread([r.summary['Z'] for r in runs])}",
        ),
        (
            "distillation makes no error",
            verdict([r.summary["gap"] < 2 * r.summary["gap_error"] for r in runs]),
            f"gap {spread([r.summary['gap'] for r in runs])} nats per document",
        ),
        (
            "(not in the paper) the gate beats the uniform Bayes mixture in the worst case",
            better(bayes),
            f"{spread([g for g, _ in bayes])} against {spread([b for _, b in bayes])}",
        ),
    ]


def table(found: dict[str, list[Outcome]]) -> str:
    lines = []
    for name, runs in found.items():
        lines += [f"## {name}", "", "| claim | reproduced? | figures |", "|---|---|---|"]
        lines += [f"| {claim} | {answer} | {figures} |" for claim, answer, figures in claims(runs)]
        lines += ["", "| model | NLL per token, A | B | worst |", "|---|---|---|---|"]
        for model in runs[0].nll:
            each = [r.nll[model] for r in runs]
            columns = [spread([n[d] for n in each]) for d in range(2)]
            lines.append(f"| {model} | {' | '.join(columns)} | {spread([max(n) for n in each])} |")
        sizes = ", ".join(f"{model} {count}" for model, count in runs[0].sizes.items())
        worst = [
            f"{label} {spread([r.summary[key] for r in runs])}"
            for label, key in (
                ("floor of any model", "floor"),
                ("robust prior", "robust_prior"),
                ("gate", "worst_case"),
            )
        ]
        lines += ["", f"Worst-case KL, nats per document: {', '.join(worst)}.", ""]
        lines += [f"Parameters: {sizes}.", ""]
    return "\n".join(lines)
