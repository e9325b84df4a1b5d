"""One seed of one variant: train experts, a robust gate and its rivals, compare their losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from model import TinyLM, generate, parameters, train
from tasks import LENGTH, VOCABULARY, Variant, documents, domains, entropy
from torch import Tensor

from robustgate.game import (
    BayesGate,
    ConstantGate,
    Documents,
    PrimalDual,
    SequenceGate,
    TokenDocuments,
    TokenGate,
    capacity,
    distill,
    normaliser,
    robust_prior,
    uniform_prior,
)

EXPERT, GATE, SMALL, LARGE = 8, 6, 16, 20  # widths
EVERY = 10  # steps of the game from one that is kept to the next


@dataclass(frozen=True)
class Effort:
    """How long everything is trained, and how many mixtures an oracle is retrained for."""

    model_steps: int
    game_steps: int
    router_steps: int
    pool: int
    oracles: int


@dataclass
class Outcome:
    """NLL per token of every model on domains A and B, and every tenth step of the game."""

    nll: dict[str, list[float]] = field(default_factory=dict)  # name: [A, B]
    oracle: list[tuple[float, float]] = field(default_factory=list)  # lambda_A, NLL at it
    mixture: list[float] = field(default_factory=list)  # lambda_A
    normaliser: list[float] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


def run(variant: Variant, seed: int, effort: Effort, device: torch.device) -> Outcome:
    out = Outcome()
    ids = documents().to(device)
    probs = domains(variant)
    experts = [
        train(p, ids, EXPERT, effort.model_steps, 10 * seed + k) for k, p in enumerate(probs)
    ]
    space = _documents(experts, ids)
    exact = {
        d: Documents(space.inputs, space.log_probs, p) for d, p in zip("AB", probs, strict=True)
    }

    def record(name: str, log_prob: Tensor) -> None:  # [200], nats per document
        out.nll[name] = (-(probs @ log_prob.detach().double().cpu()) / LENGTH).tolist()

    # The rivals: retrained on equal shares, and on the true mixture.
    for name, width in (("small", SMALL), ("large", LARGE)):
        model = train(probs.mean(dim=0), ids, width, effort.model_steps, 10 * seed + 5)
        record(f"retrained, {name}", model.token_log_probs(ids).sum(dim=1))
        out.sizes[name] = parameters(model)
    for share in torch.linspace(0, 1, effort.oracles).tolist():
        mixed = share * probs[0] + (1 - share) * probs[1]
        model = train(mixed, ids, LARGE, effort.model_steps, 10 * seed + 6)
        nll = -(mixed @ model.token_log_probs(ids).sum(dim=1).double().cpu()) / LENGTH
        out.oracle.append((share, float(nll)))

    # Sequence mixtures: uniform, and the robust prior of the exact game.
    record("uniform Bayes", exact["A"].log_prob(ConstantGate(uniform_prior(2))))
    baseline = dict(zip("AB", entropy(probs), strict=True))
    counts = {d: (p * 4 * VOCABULARY).round().long() for d, p in zip("AB", probs, strict=True)}
    repeated = {d: space.log_probs.cpu().repeat_interleave(n, dim=0) for d, n in counts.items()}
    prior = robust_prior(repeated, baseline=baseline)
    record("robust prior", exact["A"].log_prob(ConstantGate(prior.prior)))

    # The learned gate, against samples of the experts for Z; it is judged on others.
    generator = torch.Generator().manual_seed(seed)
    samplers = [_sampler(experts, e) for e in experts]
    pools, fresh = ([draw(effort.pool, generator) for draw in samplers] for _ in range(2))
    torch.manual_seed(seed)
    gate = SequenceGate.transformer(VOCABULARY, 2, context=LENGTH, width=GATE, hidden=32).to(device)

    def pick(pool: Documents, weights: Tensor, step: int, k: int) -> Documents:
        draw = torch.Generator().manual_seed(1_000_003 * seed + 10 * step + k)
        return pool[torch.multinomial(weights, 128, replacement=True, generator=draw)]

    flat = torch.ones(effort.pool)
    trainer = PrimalDual(gate, baseline, learning_rate=5e-3, mixture_step=0.05)
    course = trainer.fit(
        lambda step: {d: pick(space, probs[k], step, k) for k, d in enumerate("AB")},
        effort.game_steps,
        samples=lambda step: [pick(pool, flat, step, 5 + k) for k, pool in enumerate(pools)],
    )
    kept = course[::EVERY]
    out.mixture = [float(iterate.mixture[0]) for iterate in kept]
    out.normaliser = [iterate.normaliser.value for iterate in kept if iterate.normaliser]
    found = trainer.evaluate(exact, fresh)
    assert found.normaliser is not None
    averaged = trainer.averaged_gate()
    for name, judged in (("gate", gate), ("gate, averaged outputs", averaged)):
        total = normaliser(judged, fresh).value  # above 1, what counts is pi_g / Z_g
        record(name, exact["A"].log_prob(judged) - math.log(max(total, 1.0)))

    # The distilled router, from rejection samples of the gate.
    router = TokenGate.mlp(BayesGate(uniform_prior(2))).to(device)
    half = effort.pool // 2
    distilled = distill(
        gate, router, samplers, documents=half, held_out=half, steps=effort.router_steps,
    )  # fmt: skip
    assert space.tokens is not None
    record("distilled router", distilled.student.log_prob(space.tokens.log_probs).sum(dim=1))

    out.sizes |= {"expert": parameters(experts[0]), "gate": parameters(gate)}
    low, high = found.normaliser.interval()
    out.summary = {
        "floor": capacity(probs).value,
        "lambda_A": float(trainer.averaged_mixture()[0]),
        "Z": found.normaliser.value, "Z_low": low, "Z_high": high,
        "multiplier": trainer.multiplier,
        "worst_case": found.upper_bound, "lower_bound": found.lower_bound,
        "robust_prior": prior.value, "robust_prior_lambda_A": float(prior.mixture[0]),
        "gap": distilled.gap, "gap_error": distilled.standard_error,
    }  # fmt: skip
    return out


def _sampler(experts: list[TinyLM], expert: TinyLM) -> Callable[[int, torch.Generator], Documents]:
    return lambda count, generator: _documents(experts, generate(expert, count, generator))


def _documents(experts: list[TinyLM], ids: Tensor) -> Documents:
    with torch.no_grad():
        tokens = torch.stack([e.token_log_probs(ids) for e in experts], dim=-1).double()
    return Documents(ids, tokens.sum(dim=1), tokens=TokenDocuments(tokens))
