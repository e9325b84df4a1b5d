"""Fitting the robust prior to a log-prob store, and writing the modular model."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from robustgate import __version__
from robustgate.game import certificate, robust_prior
from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import sha256_json, write_atomic, write_json
from robustgate.lm.modular import BASELINES, FORMAT, VERSION, CertificateRecord, ModularModel
from robustgate.lm.store import LogProbStore


def fit(
    store: LogProbStore,
    out: str | os.PathLike[str],
    *,
    experts: ExpertSet | None = None,
    baseline: str = "hindsight",
    delta: float = 0.01,
    tol: float = 1e-6,
) -> ModularModel:
    """Fit the robust prior to everything a store holds and write the modular model.

    Args:
        store: Log-probabilities of the experts on one corpus per domain.
        out: Folder of the model, made or replaced.
        experts: The checkpoints, checked against the store and remembered in the model; without
            them the model can be evaluated only where they are given.
        baseline: ``"hindsight"``, ``"excess"`` or ``"raw"``, see ``CertificateRecord``. Measured
            with hindsight a document's loss lies between 0 and ``-log min_k w_k``; measured as
            excess it has the scale of a log-likelihood ratio, hundreds of nats, and a single odd
            document can talk the prior out of an expert that other documents need.
        delta: Share of the uniform prior mixed into the solution, in (0, 1).
        tol: Largest gap between the certificate's bounds, in nats per document.

    Returns:
        The model, as read back from ``out``.

    Raises:
        ValueError: The store is empty, an expert is another one than it scored, or an argument is
            out of range.
        FileExistsError: ``out`` holds other files.
        OSError: A file could not be written; a model that was there stays whole.

    Example:
        >>> model = fit(LogProbStore.open("store/"), "modular/")              # doctest: +SKIP
        >>> print(model.sentence())                                           # doctest: +SKIP
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline: expected one of {', '.join(BASELINES)}, got {baseline!r}")
    names = store.experts if experts is None else experts.names
    if not names or not store.corpora:
        raise ValueError(f"{store.path}: holds no scored experts and corpora; score some first")
    folder = Path(out)
    entries = _entries(store, experts, folder)
    log_probs = {name: store.document_log_probs(name, names) for name in store.corpora}
    hindsight = torch.stack([-part.amax(dim=1).mean() for part in log_probs.values()])  # [D]
    offset = hindsight if baseline == "hindsight" else baseline
    solution = robust_prior(log_probs, baseline=offset, tol=tol)
    shipped = solution.floor(delta)
    proof = certificate(log_probs, shipped.prior, solution.mixture, baseline=solution.baseline)
    record = CertificateRecord(
        baseline=baseline,
        documents=sum(len(part) for part in log_probs.values()),
        lower_bound=solution.lower_bound,
        upper_bound=solution.upper_bound,
        worst_case=proof.upper_bound,
        delta=delta,
        guarantee=shipped.guarantee,
    )
    tensors = {
        "prior": shipped.prior,
        "mixture": solution.mixture,
        "baseline": solution.baseline,
        "lower_bound": torch.tensor([step.lower_bound for step in solution.trajectory]).double(),
        "upper_bound": torch.tensor([step.upper_bound for step in solution.trajectory]).double(),
        "mixtures": torch.stack([step.mixture for step in solution.trajectory]),
    }
    content = save(tensors)
    sha256 = hashlib.sha256(content).hexdigest()
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "robustgate": __version__,
        "experts": entries,
        "tokenizer_sha256": store.tokenizer_sha256,
        "domains": list(log_probs),
        "gate": {"file": f"gate-{sha256[:8]}.safetensors", "sha256": sha256},
        "certificate": asdict(record),
        "store_sha256": store_sha256(store),
    }
    _publish(folder, content, manifest)
    return ModularModel.load(folder)


def store_sha256(store: LogProbStore) -> str:
    """Return the hash of what a store holds: its tokenizer, experts and corpora."""
    return sha256_json(
        {
            "tokenizer": store.tokenizer_sha256,
            "experts": {name: store.expert_sha256(name) for name in store.experts},
            "corpora": {name: asdict(store.corpus(name)) for name in store.corpora},
        }
    )


def _entries(
    store: LogProbStore, experts: ExpertSet | None, folder: Path
) -> list[dict[str, str | None]]:
    """Return the manifest's entries of the experts, checked against the store."""
    if experts is None:
        return [
            {"name": name, "sha256": store.expert_sha256(name), "path": None}
            for name in store.experts
        ]
    for name in experts.names:
        if experts.sha256(name) != store.expert_sha256(name):
            raise ValueError(
                f"{experts.path(name)}: expert {name!r} is another checkpoint than the one whose "
                f"scores {store.path} holds; score it again"
            )
    return [
        {
            "name": name,
            "sha256": experts.sha256(name),
            "path": Path(os.path.relpath(experts.path(name), folder)).as_posix(),
        }
        for name in experts.names
    ]


def _publish(folder: Path, gate: bytes, manifest: dict[str, Any]) -> None:
    """Write the files of a model so that a kill at any point leaves the old one or the new one.

    The manifest names the gate's file by its hash and is what makes a model: the new gate comes
    before it, the old gate goes after it. Evaluations of the old model go first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "manifest.json").exists() and any(folder.glob("[!.]*")):
        raise FileExistsError(f"{folder}: holds other files; choose another folder")
    write_atomic(folder / manifest["gate"]["file"], gate)
    for name in ("evaluation.json", "trace.json"):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "manifest.json", manifest)
    for file in folder.glob("gate-*.safetensors"):
        if file.name != manifest["gate"]["file"]:
            file.unlink()
