"""The study in words: claim, reproduced or not, figures."""

from statistics import mean, stdev

from study import Outcome
from tasks import LENGTH, VARIANTS, domains, entropy

MARGIN = 1e-3  # nats per token


def at(nll: list[float], share: float) -> float:
    """NLL per token at the mixture (share, 1 - share)."""
    return share * nll[0] + (1 - share) * nll[1]


def worst(nll: list[float], entropies: list[float]) -> float:
    """KL(p_d || model) of the worse domain, nats per document: what the game is about."""
    return max(LENGTH * n - h for n, h in zip(nll, entropies, strict=True))


def spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def better(pairs: list[tuple[float, float]], margin: float = MARGIN) -> str:
    """Whether the first loss is below the second: a thousandth of a nat per token is a tie."""
    wins = sum(a < b - margin for a, b in pairs)
    losses = sum(a > b + margin for a, b in pairs)
    answer = "yes" if wins == len(pairs) else "no" if losses == len(pairs) else "not clearly"
    return f"{answer}: {wins} better, {len(pairs) - wins - losses} tied, {losses} worse"


def verdict(holds: list[bool]) -> str:
    answer = "yes" if all(holds) else "in part" if any(holds) else "no"
    return f"{answer} ({sum(holds)} of {len(holds)})"


def claims(runs: list[Outcome], entropies: list[float]) -> list[tuple[str, str, str]]:
    def oracle(run: Outcome, share: float) -> float:
        return min(run.oracle, key=lambda point: abs(point[0] - share))[1]

    half = [(at(r.nll["gate"], 0.5), oracle(r, 0.5)) for r in runs]
    ends = [(at(r.nll["gate"], s), oracle(r, s)) for r in runs for s in (0.0, 1.0)]
    retrained = ("retrained, small", "retrained, large")
    gate = [worst(r.nll["gate"], entropies) for r in runs]
    rivals = [min(worst(r.nll[name], entropies) for name in retrained) for r in runs]
    prior = [worst(r.nll["robust prior"], entropies) for r in runs]
    bayes = [worst(r.nll["uniform Bayes"], entropies) for r in runs]
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
            "in the worst case (KL) the gate beats both retrained models",
            better(list(zip(gate, rivals, strict=True)), LENGTH * MARGIN),
            f"{spread(gate)} against {spread(rivals)} nats per document",
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
            "(not in the paper) the gate beats the uniform Bayes mixture in the worst case (KL)",
            better(list(zip(gate, bayes, strict=True)), LENGTH * MARGIN),
            f"{spread(gate)} against {spread(bayes)} nats per document",
        ),
        (
            "(not in the paper) the robust prior, not trained at all, beats both retrained models"
            " in the worst case (KL)",
            better(list(zip(prior, rivals, strict=True)), LENGTH * MARGIN),
            f"{spread(prior)} against {spread(rivals)} nats per document",
        ),
    ]


def table(found: dict[str, list[Outcome]]) -> str:
    lines = []
    for name, runs in found.items():
        variant = next(variant for variant in VARIANTS if variant.name == name)
        entropies = entropy(domains(variant))
        lines += [f"## {name}", "", "| claim | reproduced? | figures |", "|---|---|---|"]
        lines += [
            f"| {claim} | {answer} | {figures} |"
            for claim, answer, figures in claims(runs, entropies)
        ]
        lines += [
            "",
            "| model | NLL per token, A | B | worst KL, nats per document |",
            "|---|---|---|---|",
        ]
        for model in runs[0].nll:
            each = [r.nll[model] for r in runs]
            columns = [spread([n[d] for n in each]) for d in range(2)]
            divergence = spread([worst(n, entropies) for n in each])
            lines.append(f"| {model} | {' | '.join(columns)} | {divergence} |")
        sizes = ", ".join(f"{model} {count}" for model, count in runs[0].sizes.items())
        floor = spread([r.summary["floor"] for r in runs])
        lines += ["", f"No model has a worst-case KL below {floor} nats per document.", ""]
        lines += [f"Parameters: {sizes}.", ""]
    return "\n".join(lines)
