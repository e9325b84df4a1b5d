"""Training a token gate on a log-prob store, against the worst mixture of domains."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from robustgate.game import BayesGate, Simplex, TokenGate
from robustgate.game.players import MixturePlayer
from robustgate.lm.gates.inputs import (
    GateInputs,
    Packed,
    check_baseline,
    mean_losses,
    padded_rows,
    ragged_rows,
)
from robustgate.lm.gates.records import GateFit, TrainingRecord
from robustgate.lm.gates.spec import BayesOptions, GateSpec, standardise
from robustgate.lm.progress import ProgressBar

SHARES: Final = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)
"""Fixed shares to choose from; above 0, so that a correction of a few nats can wake an expert."""

_ROWS: Final = 2048  # tokens of each domain in a step
_SPAN: Final = 256  # tokens in a row for a network that looks at more than one
_CHECKS: Final = 20  # times that the held-out documents are asked
_PATIENCE: Final = 6  # checks without a better gate before training stops
_MIXTURE_STEP: Final = 1.0  # of lambda, per nat per token
_WARM_UP: Final = 0.05  # share of the steps in which the learning rate rises
_RATES: Final = {"linear": 1e-2, "mlp": 3e-3, "transformer": 2e-3}


def fit_token_gate(
    domains: Mapping[str, Packed],
    prior: Tensor,  # [K]
    spec: GateSpec,
    *,
    steps: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> GateFit:
    """Train a token gate that starts at the Bayes gate of a prior; keep it only if it helps.

        min_gamma max_lambda sum_d lambda_d ( E_d[-log sum_k gamma_k(x_<t) pi_k(x_t | x_<t)] - b_d )

    with means per token and ``b_d`` the loss of the best single expert on the domain's training
    documents. A quarter of each domain's documents is held out. On the others the share of the
    Bayes gate within is chosen and the network trained: AdamW with a warm-up and a cosine decay of
    the learning rate, lambda by mirror ascent. The held-out documents choose among the gates that
    training passes through, and the plain Bayes gate wins if none has a smaller worst domain.

    The loss that moves lambda is that of the start on all training documents plus the change on
    the batch: an estimate without bias and with a hundredth of the variance of the batch's loss.

    Args:
        domains: documents, at least two of each domain.
        prior: of the experts, float64 ``[K]``.
        spec: network and features of the gate; the share within is chosen here.
        steps: of training, at most.
        seed: of the split, the network and the batches.
        progress: show a bar when it takes longer than two seconds.

    Returns:
        A ``GateFit``.

    Raises:
        ValueError: a domain with fewer than two documents, ``steps`` below 1, or a domain where
            every expert gives some document, of the part trained on or held out, probability 0.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    parts = {name: documents.split(seed) for name, documents in domains.items()}
    training = {name: part[0] for name, part in parts.items()}
    held_out = {name: part[1] for name, part in parts.items()}
    baseline = torch.stack([best_expert(part.log_probs) for part in training.values()])  # [D]
    judge = torch.stack([best_expert(part.log_probs) for part in held_out.values()])  # [D]
    for best in (baseline, judge):
        check_baseline(domains, best)
    spec = replace(spec, bayes=BayesOptions(share=choose_share(training, prior, baseline)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = spec.build(prior)
    assert isinstance(gate, TokenGate)
    learn, check = GateInputs.of_each(gate, training), GateInputs.of_each(gate, held_out)
    standardise(gate, torch.cat([inputs.features for inputs in learn.values()]))
    plain = BayesGate(prior)
    before = bayes_losses(plain, held_out) - judge
    train_before = bayes_losses(plain, training) - baseline
    course = _train(spec, gate, learn, check, baseline, judge, steps, seed, progress)
    if not float(course.losses.amax()) < float(before.amax()):
        spec = replace(spec, bayes=BayesOptions())
        start = spec.build(prior)
        assert isinstance(start, TokenGate)
        course = replace(course, gate=start, losses=before, best_step=0)
        kept, train_after = "start", train_before
    else:
        kept, train_after = "trained", mean_losses(course.gate, learn, baseline)
    record = TrainingRecord(
        unit="token",
        domains=tuple(domains),
        documents=tuple(len(part.offsets) - 1 for part in training.values()),
        held_out=tuple(len(part.offsets) - 1 for part in held_out.values()),
        kept=kept,
        steps=course.steps,
        best_step=course.best_step,
        before=tuple(before.tolist()),
        after=tuple(course.losses.tolist()),
        train_before=tuple(train_before.tolist()),
        train_after=tuple(train_after.tolist()),
        mixture=tuple(course.mixture.tolist()),
        seed=seed,
    )
    return GateFit(spec, course.gate.eval().requires_grad_(False), record)


def best_expert(
    log_probs: Tensor,  # [N, K]
) -> Tensor:  # []
    """Return the mean NLL per token of the best single expert, float64."""
    return -log_probs.double().mean(dim=0).amax()


def bayes_losses(gate: BayesGate, domains: Mapping[str, Packed]) -> Tensor:  # [D]
    """Return the mean NLL per token of a Bayes gate on every domain, float64."""
    joined = Packed.join(list(domains.values()))
    found = gate.log_prob(joined.log_probs, offsets=joined.offsets)
    sizes = [len(part.log_probs) for part in domains.values()]
    return torch.stack([-part.mean() for part in found.split(sizes)])


def choose_share(
    domains: Mapping[str, Packed],
    prior: Tensor,  # [K]
    baseline: Tensor,  # [D]
) -> float:
    """Return the share among ``SHARES`` whose Bayes gate has the least worst domain."""
    worst = [
        float((bayes_losses(BayesGate(prior, share=share), domains) - baseline).amax())
        for share in SHARES
    ]
    return SHARES[worst.index(min(worst))]


@dataclass(frozen=True, eq=False)
class _Course:
    """What training came to: the best gate on the held-out documents, and when."""

    gate: TokenGate
    losses: Tensor  # [D], held out
    best_step: int
    steps: int
    mixture: Tensor  # [D]


def _train(
    spec: GateSpec,
    gate: TokenGate,
    learn: Mapping[str, GateInputs],
    check: Mapping[str, GateInputs],
    baseline: Tensor,  # [D]
    judge: Tensor,  # [D]
    steps: int,
    seed: int,
    progress: bool,
) -> _Course:
    """Descend with the gate, ascend with the mixture, and keep the best gate."""
    generator = torch.Generator().manual_seed(seed)
    start = copy.deepcopy(gate)
    level = mean_losses(start, learn, baseline)  # [D]
    adversary = MixturePlayer(len(level), Simplex(), _MIXTURE_STEP, optimistic=False)
    span = 1 if spec.network_kind != "transformer" else _SPAN
    runs = [_runs(inputs.offsets, span) for inputs in learn.values()]
    optimiser = torch.optim.AdamW(gate.parameters(), lr=_RATES[spec.network_kind or "mlp"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda made: _rate(made / steps))
    best = _Course(start, mean_losses(gate, check, judge), 0, 0, adversary.mixture)
    every = max(1, steps // _CHECKS)
    step = 0
    with ProgressBar("train gate", total=steps, show=progress) as bar:
        while step < steps and step - best.best_step < _PATIENCE * every + every:
            losses, changes = [], []
            for inputs, (starts, lengths) in zip(learn.values(), runs, strict=True):
                drawn = torch.randint(len(starts), (_ROWS // span,), generator=generator)
                rows, real = padded_rows(starts[drawn], lengths[drawn])
                log_prob = inputs.log_prob(gate, rows, real)
                change = inputs.bayes_log_prob(rows) - log_prob.detach()
                losses.append(-log_prob[real].mean())
                changes.append(change[real].mean())
            adversary.move(level + torch.stack(changes))
            optimiser.zero_grad()
            (adversary.mixture @ torch.stack(losses)).backward()
            nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            step += 1
            bar.advance()
            if step % every == 0 or step == steps:
                found = mean_losses(gate, check, judge)
                if float(found.amax()) < float(best.losses.amax()):
                    best = _Course(copy.deepcopy(gate), found, step, step, adversary.mixture)
    return replace(best, steps=step, mixture=adversary.mixture)


def _rate(progress: float) -> float:
    """Return the learning rate as a share of its peak: a warm-up, then half a cosine."""
    if progress < _WARM_UP:
        return max(progress, 1e-3) / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


def _runs(
    offsets: Tensor,  # int64 [n + 1]
    span: int,
) -> tuple[Tensor, Tensor]:  # int64 [R] each
    """Return starts and lengths of the documents' pieces of ``span`` tokens."""
    lengths = offsets.diff()  # [n]
    counts = (lengths + span - 1) // span  # [n]
    before = ragged_rows(torch.zeros_like(counts), counts) * span  # [R]
    left = torch.repeat_interleave(lengths, counts) - before  # [R]
    return torch.repeat_interleave(offsets[:-1], counts) + before, left.clamp(max=span)
