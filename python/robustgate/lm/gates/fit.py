"""Fitting a gate to a log-prob store, and writing the modular model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustgate.game import certificate, robust_prior
from robustgate.lm.experts import ExpertSet
from robustgate.lm.gates.inputs import LONGEST, TOKENS, Packed
from robustgate.lm.gates.records import BASELINES, Baseline, CertificateRecord
from robustgate.lm.gates.samplers import ExpertSamplers
from robustgate.lm.gates.sequence_fit import fit_sequence_gate
from robustgate.lm.gates.spec import GateKind, GateSpec, Network
from robustgate.lm.gates.token_fit import fit_token_gate
from robustgate.lm.modular import ExpertEntry, ModularModel
from robustgate.lm.publish import check_place, publish, store_sha256
from robustgate.lm.store.features import FeatureSpec
from robustgate.lm.store.log_probs import LogProbStore


def fit(
    store: LogProbStore,
    out: str | os.PathLike[str],
    *,
    gate: GateKind = "prior",
    experts: ExpertSet | None = None,
    baseline: Baseline = "hindsight",
    delta: float = 0.01,
    tol: float = 1e-6,
    network: Network | None = None,
    features: FeatureSpec | None = None,
    steps: int = 1000,
    span: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> ModularModel:
    """Fit the robust prior, and a gate that starts from it, to everything a store holds.

    The prior comes with a certificate. ``"prior"`` stops there: the gate is its Bayes gate.
    ``"token"`` trains a causal gate from there (``token_fit.fit_token_gate``), ``"sequence"`` a
    gate of whole documents (``sequence_fit.fit_sequence_gate``), on three quarters of each domain's
    documents; the others decide whether it is kept. The certificate stays that of the prior.

    Args:
        store: Log-probabilities of the experts on one corpus per domain.
        out: Folder of the model, made or replaced.
        gate: ``"prior"``, ``"token"`` or ``"sequence"``.
        experts: The checkpoints, checked against the store and remembered in the model; without
            them the model is of all that the store holds, but for what ``evaluate`` compared
            experts with, and can be evaluated only where they are given. A sequence gate needs
            them.
        baseline: ``"hindsight"``, ``"excess"`` or ``"raw"``, see ``CertificateRecord``. Measured
            with hindsight a document's loss lies between 0 and ``-log min_k w_k``; measured as
            excess it has the scale of a log-likelihood ratio, hundreds of nats, and a single odd
            document can talk the prior out of an expert that other documents need.
        delta: Share of the uniform prior mixed into the solution, in (0, 1).
        tol: Largest gap between the certificate's bounds, in nats per document.

    Other:
        network: Of a learned gate; ``Network()`` unless given.
        features: What a token gate reads, of those that the store holds; none unless given.
        steps: Of training, at most.
        span: Tokens of a document that a sequence gate looks at.
        seed: Of split, network, batches and samples.
        progress: Show a bar for training that takes longer than two seconds.

    Returns:
        The model, as read back from ``out``.

    Raises:
        ValueError: The store is empty or lacks features, an expert is another one than it scored,
            or an argument is out of range.
        FileExistsError: ``out`` holds other files.
        OSError: A file could not be written; a model that was there stays whole.

    Example:
        >>> model = fit(LogProbStore.open("store/"), "modular/")              # doctest: +SKIP
        >>> print(model.sentence())                                           # doctest: +SKIP
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline: expected one of {', '.join(BASELINES)}, got {baseline!r}")
    names = store.entrants if experts is None else experts.names
    if not names or not store.corpora:
        raise ValueError(f"{store.path}: holds no scored experts and corpora; score some first")
    folder = Path(out)
    check_place(folder)
    entries = _entries(store, experts)
    shape = network or Network()
    log_probs = {name: store.document_log_probs(name, names) for name in store.corpora}
    model = _fit_prior(log_probs, folder, entries, store, baseline, delta, tol)
    training: dict[str, Any] = {"steps": steps, "seed": seed, "progress": progress}
    if gate == "token":
        spec = GateSpec("token", network=shape, features=features or FeatureSpec())
        documents = _read(store, names, spec, LONGEST, seed)
        model = model.with_gate(fit_token_gate(documents, model.prior, spec, **training))
    elif gate == "sequence":
        if experts is None:
            raise ValueError("experts: a sequence gate is trained on their samples; give them")
        spec = GateSpec("sequence", network=shape, span=span)
        samplers = ExpertSamplers(experts, span).samplers()
        documents = _read(store, names, spec, span, seed)
        model = model.with_gate(
            fit_sequence_gate(documents, model.prior, spec, samplers, **training)
        )
    elif gate != "prior":
        raise ValueError(f"gate: expected prior, token or sequence, got {gate!r}")
    return publish(model)


def _fit_prior(
    log_probs: Mapping[str, Tensor],  # D x [n_d, K]
    folder: Path,
    entries: tuple[ExpertEntry, ...],
    store: LogProbStore,
    baseline: Baseline,
    delta: float,
    tol: float,
) -> ModularModel:
    """Return the model of the floored robust prior, with its certificate."""
    solution = robust_prior(log_probs, baseline=baseline, tol=tol)
    shipped = solution.floor(delta)
    proof = certificate(log_probs, shipped.prior, solution.mixture, baseline=solution.baseline)
    counts = tuple(len(part) for part in log_probs.values())
    record = CertificateRecord(
        baseline=baseline,
        documents=sum(counts),
        lower_bound=solution.lower_bound,
        upper_bound=solution.upper_bound,
        worst_case=proof.upper_bound,
        delta=delta,
        guarantee=shipped.guarantee,
    )
    bounds = [(step.lower_bound, step.upper_bound) for step in solution.trajectory]
    lower, upper = torch.tensor(bounds, dtype=torch.float64).unbind(dim=1)
    return ModularModel(
        path=folder,
        experts=entries,
        tokenizer_sha256=store.tokenizer_sha256,
        domains=tuple(log_probs),
        prior=shipped.prior,
        mixture=solution.mixture,
        baseline=solution.baseline,
        trajectory={
            "lower_bound": lower,
            "upper_bound": upper,
            "mixtures": torch.stack([step.mixture for step in solution.trajectory]),
        },
        certificate=record,
        store_sha256=store_sha256(store),
        documents=counts,
    )


def _read(
    store: LogProbStore, experts: tuple[str, ...], spec: GateSpec, longest: int, seed: int
) -> dict[str, Packed]:
    """Return documents of every domain to train a gate on and to judge it by."""
    return {
        corpus: Packed.read(
            store, corpus, experts, spec.features, tokens=TOKENS, longest=longest, seed=seed
        )
        for corpus in store.corpora
    }


def _entries(store: LogProbStore, experts: ExpertSet | None) -> tuple[ExpertEntry, ...]:
    """Return the experts of the model, checked against the store."""
    if experts is None:
        return tuple(ExpertEntry(name, store.expert_sha256(name), None) for name in store.entrants)
    for name in experts.names:
        if experts.sha256(name) != store.expert_sha256(name):
            raise ValueError(
                f"{experts.path(name)}: expert {name!r} is another checkpoint than the one whose "
                f"scores {store.path} holds; score it again"
            )
    return tuple(
        ExpertEntry(name, experts.sha256(name), experts.path(name)) for name in experts.names
    )
