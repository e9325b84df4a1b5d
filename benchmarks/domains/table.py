"""The study in words: claim, does it hold, figures."""

from statistics import mean, stdev

from summary import Outcome

MARGIN = 1e-3  # nats per token: less is a tie
GATE, PRIOR, UNIFORM = "token transformer", "robust Bayes mixture", "uniform Bayes mixture"
PAIRS = (
    (GATE, UNIFORM, "a token gate beats the uniform Bayes mixture"),
    (GATE, "oracle expert", "a token gate beats the oracle, which knows the domain"),
    (GATE, "monolith-small", "it beats the small monolith"),
    (
        GATE,
        "monolith-brief",
        "it beats the brief monolith",
    ),
    (GATE, "monolith", "it beats the monolith"),
    (GATE, "token mlp", "looking at all tokens so far beats the present features"),
    ("token mlp", "token mlp, no features", "entropies, maxima and agreements help"),
    (PRIOR, "monolith-small", "the certified prior alone beats the small monolith"),
    (PRIOR, "monolith-brief", "the certified prior alone beats the brief monolith"),
    (PRIOR, "monolith", "the certified prior alone beats the monolith"),
    (PRIOR, UNIFORM, "the certified prior beats the uniform one"),
    ("distilled token gate", PRIOR, "a gate distilled from a sequence gate beats the prior"),
    (UNIFORM, "previous-token gate", "the exact posterior beats its short cut"),
)


def table(found: list[Outcome]) -> str:
    """Return Markdown tables: claims, systems, models, gates."""
    lines = ["| worst case over mixtures | holds? | nats per token |", "|---|---|---|"]
    lines += [
        f"| {claim} | {_verdict(found, one, other)} | {_worst(found, one)} against "
        f"{_worst(found, other)} |"
        for one, other, claim in PAIRS
        if all(name in found[0].systems["experts"] for name in (one, other))
    ]
    for kind in found[0].systems:
        lines += ["", *_systems(kind, [run for run in found if kind in run.systems])]
    return "\n".join([*lines, "", *_models(found[0])]) + "\n"


def _models(run: Outcome) -> list[str]:
    """Return the table of all models; a token's arithmetic grows with the weights it passes."""
    cost = {name: model["parameters"] * model["tokens"] for name, model in run.models.items()}
    own = sum(cost[name] for name in ("seed", *(f"experts/{domain}" for domain in run.domains)))
    lines = ["| model | weights | tokens read | arithmetic, of all experts' |", "|---" * 4 + "|"]
    lines += [
        f"| {name} | {model['parameters']:,} | {model['tokens']:,} | {cost[name] / own:.2f} |"
        for name, model in run.models.items()
    ]
    return lines


def _systems(kind: str, found: list[Outcome]) -> list[str]:
    """Return the table of all systems over one set of experts."""
    what = {"experts": "Experts branched from a seed model", "scratch": "Experts from nothing"}
    domains, runs = found[0].domains, [run.systems[kind] for run in found]
    lines = [
        f"{what[kind]}, {len(runs)} seed{'s' * (len(runs) > 1)}; test NLL, nats per token.",
        "",
        f"| system | {' | '.join(domains)} | mean | largest excess over the oracle |",
        "|---" * (len(domains) + 3) + "|",
    ]
    for name in runs[0]:
        own = [run[name] for run in runs]
        columns = [spread([system.nll[d] for system in own]) for d in range(len(domains))]
        columns += [spread([mean(s.nll) for s in own]), spread([max(s.excess) for s in own])]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return lines


def spread(values: list[float]) -> str:
    """Return the mean, and the standard deviation over seeds where there are several."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _worst(found: list[Outcome], name: str) -> str:
    return spread([max(run.systems["experts"][name].excess) for run in found])


def _verdict(found: list[Outcome], one: str, other: str) -> str:
    """Say whether the first worst case is below the second, and on how many domains it is."""
    pairs = [(run.systems["experts"][one], run.systems["experts"][other]) for run in found]
    wins = sum(max(a.excess) < max(b.excess) - MARGIN for a, b in pairs)
    losses = sum(max(a.excess) > max(b.excess) + MARGIN for a, b in pairs)
    domains = sum(x < y - MARGIN for a, b in pairs for x, y in zip(a.nll, b.nll, strict=True))
    answer = "yes" if wins == len(pairs) else "no" if losses == len(pairs) else "tie"
    if wins and losses:
        answer = "not clearly"
    return f"{answer}; better on {domains} of {sum(len(run.domains) for run in found)} domains"
