"""Training a gate of whole documents on a log-prob store and on samples of the experts."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from robustgate.game import Documents, Normaliser, PrimalDual, SequenceGate, normaliser
from robustgate.game.sample import Sampler
from robustgate.lm.gates.inputs import Packed, check_baseline, padded_rows
from robustgate.lm.gates.records import GateFit, TrainingRecord
from robustgate.lm.gates.samplers import counted
from robustgate.lm.gates.spec import GateSpec, document_features, standardise
from robustgate.lm.progress import ProgressBar

_BATCH: Final = 64  # documents of each domain, and of each expert, in a step
_CHECKS: Final = 20  # times that the held-out documents are asked


def fit_sequence_gate(
    domains: Mapping[str, Packed],
    prior: Tensor,  # [K]
    spec: GateSpec,
    samplers: Sequence[Sampler],  # K
    *,
    samples: int = 512,
    steps: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> GateFit:
    """Train a gate of whole documents that starts at a prior; keep it only if it helps.

        min_g max_{lambda, mu >= 0} sum_d lambda_d ( E_d[-log pi_g(x)] - b_d ) + mu (Z_g - 1)

    by ``robustgate.game.PrimalDual``. Documents are cut at ``spec.span`` tokens; ``b_d`` is the
    loss of the best single expert on them. ``Z_g`` is measured on documents of the experts, three
    sets of them: to train with, to choose among the gates that training passes through, to report.
    The losses that choose and that are reported are those of ``pi_g / max(Z_g, 1)``, on a quarter
    of each domain's documents that is held out. (Where ``Z_g < 1`` the distribution ``pi_g / Z_g``
    does better still, but it is no gate of these experts: it may exceed all of them.)

    Args:
        domains: documents, at least two of each domain, cut at ``spec.span``.
        prior: of the experts, float64 ``[K]``.
        spec: network and span of the gate.
        samplers: of documents cut at ``spec.span``, see ``ExpertSamplers``.
        samples: documents in a set of one expert, at least 2.
        steps: of training.
        seed: of split, network, batches and samples.
        progress: show a bar when it takes longer than two seconds.

    Returns:
        A ``GateFit``.

    Raises:
        ValueError: a domain with fewer than two documents, a number out of range, or a domain where
            every expert gives some document, of the part trained on or held out, probability 0.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if spec.span is None:
        raise ValueError("spec: expected that of a sequence gate, which has a span, got None")
    parts = {name: documents.split(seed) for name, documents in domains.items()}
    training = _Part.of([part[0] for part in parts.values()], spec.span)
    held_out = _Part.of([part[1] for part in parts.values()], spec.span)
    for part in (training, held_out):
        check_baseline(domains, part.baseline)
    generator = torch.Generator().manual_seed(seed)
    with ProgressBar("draw documents", total=3 * samples * len(samplers), show=progress) as bar:
        drawn = [[draw(samples, generator) for draw in counted(samplers, bar)] for _ in range(3)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = spec.build(prior)
    assert isinstance(gate, SequenceGate)
    standardise(gate, torch.cat([documents.inputs for documents in training.documents]))
    start = copy.deepcopy(gate)
    best, best_step, mixture = _train(
        gate, tuple(domains), training, held_out, drawn, steps, seed, progress
    )
    total = normaliser(best, drawn[2])
    before = held_out.losses(start, Normaliser(1.0, 0.0))
    after = held_out.losses(best, total)
    kept = "trained"
    if not float(after.amax()) < float(before.amax()):
        best, best_step, total, after, kept = start, 0, Normaliser(1.0, 0.0), before, "start"
    record = TrainingRecord(
        unit="document",
        domains=tuple(domains),
        documents=tuple(len(documents) for documents in training.documents),
        held_out=tuple(len(documents) for documents in held_out.documents),
        kept=kept,
        steps=steps,
        best_step=best_step,
        before=tuple(before.tolist()),
        after=tuple(after.tolist()),
        train_before=tuple(training.losses(start, Normaliser(1.0, 0.0)).tolist()),
        train_after=tuple(training.losses(best, total).tolist()),
        mixture=tuple(mixture.tolist()),
        seed=seed,
        normaliser=(total.value, total.standard_error),
    )
    return GateFit(spec, best.eval().requires_grad_(False), record)


@dataclass(frozen=True, eq=False)
class _Part:
    """Documents of all domains, with log-probabilities relative to the best expert of each.

    Attributes:
        documents: D of them; ``L_k(x) - max_j L_j(x)``, so that a batch of few documents says how
            good the gate is and not how long they are.
        baseline: ``b_d`` in that scale: how far the best single expert is behind, ``[D]``.
    """

    documents: tuple[Documents, ...]
    baseline: Tensor

    @classmethod
    def of(cls, domains: Sequence[Packed], span: int) -> _Part:
        documents = tuple(_documents(packed, span) for packed in domains)
        return cls(documents, torch.stack([-part.log_probs.mean(0).amax() for part in documents]))

    @torch.no_grad()
    def losses(self, gate: SequenceGate, total: Normaliser) -> Tensor:  # [D]
        """Return the excess of ``pi_g / max(Z_g, 1)`` on every domain, in nats per document."""
        found = torch.stack([part.loss(gate) for part in self.documents]) - self.baseline
        return found + math.log(max(total.value, 1.0))


def _documents(packed: Packed, span: int) -> Documents:
    rows, real = padded_rows(packed.offsets[:-1], packed.offsets.diff())
    log_probs = packed.log_probs[rows].double().masked_fill(~real.unsqueeze(-1), 0.0)  # [n, T, K]
    sums = log_probs.sum(dim=1)  # [n, K]
    inputs = document_features(packed.log_probs[rows], real, span)
    return Documents(inputs, sums - sums.amax(dim=1, keepdim=True))


def _train(
    gate: SequenceGate,
    names: tuple[str, ...],
    training: _Part,
    held_out: _Part,
    drawn: Sequence[Sequence[Documents]],  # at least 2 sets, K each
    steps: int,
    seed: int,
    progress: bool,
) -> tuple[SequenceGate, int, Tensor]:  # best gate, its step, mixture [D]
    """Play the game and return the gate with the least worst domain on the held-out documents."""
    trainer = PrimalDual(gate, dict(zip(names, training.baseline.tolist(), strict=True)))

    def pick(documents: Documents, step: int, salt: int) -> Documents:
        draw = torch.Generator().manual_seed((seed * 1_000_003 + step) * 97 + salt)
        return documents[torch.randint(len(documents), (_BATCH,), generator=draw)]

    def batch(step: int) -> dict[str, Documents]:
        parts = zip(names, training.documents, strict=True)
        return {name: pick(part, step, salt) for salt, (name, part) in enumerate(parts)}

    def samples(step: int) -> list[Documents]:
        return [pick(part, step, 48 + salt) for salt, part in enumerate(drawn[0])]

    def worst(candidate: SequenceGate) -> float:
        return float(held_out.losses(candidate, normaliser(candidate, drawn[1])).amax())

    best, best_step, least = copy.deepcopy(gate), 0, worst(gate)
    every = max(1, steps // _CHECKS)
    with ProgressBar("train gate", total=steps, show=progress) as bar:
        while trainer.steps < steps:
            before = trainer.steps
            trainer.fit(batch, min(steps, before + every), samples=samples)
            bar.advance(trainer.steps - before)
            averaged = trainer.ema_gate()
            assert isinstance(averaged, SequenceGate)
            for candidate in (gate, averaged):
                if (found := worst(candidate)) < least:
                    best, best_step, least = copy.deepcopy(candidate), trainer.steps, found
    return best, best_step, trainer.averaged_mixture()
