"""Taking an expert out: its weights, its scores, its place in the prior, with a proof.

Everything that happens is written down first, in ``opt-out-<name>-<hash>.json`` in the model's
folder, and one process at a time does it, under the model's lock.
Each step can be done again, so that a removal that was killed is finished by calling it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from robustgate.lm.checkpoint import checkpoint_sha256
from robustgate.lm.evaluation.soup import remove_averages
from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import remove_abandoned, remove_folder
from robustgate.lm.gates.fit import fit
from robustgate.lm.lifecycle.carriers import Carrier, find_carriers
from robustgate.lm.lifecycle.optout import OptOut, interrupted, manifest_path
from robustgate.lm.lifecycle.proof import prove
from robustgate.lm.lifecycle.removable import check_domains, check_store, check_weights
from robustgate.lm.modular import ExpertEntry, ModularModel
from robustgate.lm.publish import locked
from robustgate.lm.store.log_probs import LogProbStore
from robustgate.lm.training.lineage import Data, Origin, origins, run_folder


def plan_removal(
    name: str, model: ModularModel, store: LogProbStore, *, keep_weights: bool = False
) -> OptOut:
    """Check that an expert can be removed, and say what will happen; nothing is changed.

    Args:
        name: the expert.
        model: the modular model that has it.
        store: the log-prob store that the model was fitted on.
        keep_weights: leave the checkpoint where it is.

    Returns:
        The plan, unfinished; that of an earlier call if it was killed, with ``keep_weights`` as
        it is now.

    Raises:
        ValueError: no such expert, the only one, a checkpoint that may not be deleted, or can no
            longer be kept, or a store that is not that of the model, not complete, damaged, or
            mixed with other files.
        FileNotFoundError: another expert's checkpoint is missing.
    """
    if (begun := interrupted(model, name)) is not None:
        return _resumed(begun, model, store, keep_weights)
    if name not in model.names:
        raise ValueError(f"{model.path}: no expert {name!r}; it has: {', '.join(model.names)}")
    if len(model.names) == 1:
        raise ValueError(f"{model.path}: {name!r} is its only expert; delete the model instead")
    entry = model.experts[model.names.index(name)]
    check_store(entry, model, store)
    _open([other for other in model.experts if other.name != name])
    weights = check_weights(entry, model, store, keep_weights)
    origin = [Origin(None, None, None)] if entry.path is None else origins(entry.path)
    prior = dict(zip(model.names, model.prior.tolist(), strict=True))
    rest = 1.0 - prior[name]
    others = {other: weight for other, weight in prior.items() if other != name}
    return OptOut(
        name=name,
        sha256=entry.sha256,
        path=None if entry.path is None else str(entry.path.resolve()),
        weights=weights,
        data=None if origin[0].data is None else tuple(map(_named, origin[0].data)),
        carriers=find_carriers(name, entry.sha256, origin, model, store),
        prior={
            "before": prior,
            "renormalised": {other: weight / rest for other, weight in others.items()},
        },
        baseline=model.certificate.baseline,
        delta=model.certificate.delta,
    )


def remove_expert(
    name: str,
    model: ModularModel,
    store: LogProbStore,
    *,
    keep_weights: bool = False,
    plan: OptOut | None = None,
) -> OptOut:
    """Remove an expert from a model, its store and the disk, and prove that it is gone.

    The expert's log-probabilities and features are deleted from the store, and from the model's
    own store of evaluations, with those of models made from it (the soup, a monolith); the robust
    prior is solved again from what remains, which replaces a learned gate too; evaluations go.
    Then the store is written anew from its values and a model fitted to that, and both are
    compared byte by byte. With that proof the checkpoint folder is deleted.

    Args:
        name: the expert.
        model: the modular model that has it.
        store: the log-prob store that the model was fitted on.
        keep_weights: leave the checkpoint where it is.
        plan: what ``plan_removal`` has just returned; made here if left out.

    Returns:
        The finished manifest, as written to ``opt-out-<name>-<hash>.json`` in the model's folder.

    Raises:
        ValueError: as for ``plan_removal``, or the model on disk is not ``model`` any more, and
            then nothing is changed; or another expert's checkpoint has changed since the fit: put
            it back and call again.
        RuntimeError: the store or the model are not what they would be without the expert; the
            checkpoint is still there.
        OSError: a file could not be written or deleted; call again to finish.

    Example:
        >>> model = ModularModel.load("modular")                              # doctest: +SKIP
        >>> done = remove_expert("code", model, LogProbStore.open("store"))   # doctest: +SKIP
        >>> [carrier.name for carrier in done.carriers]                       # doctest: +SKIP
        ['checkpoint 5f0c5e3b9a7d1c24', 'shared tokenizer']
    """
    with locked(model.path):
        now = ModularModel.load(model.path)
        if (now.experts, now.to_json()) != (model.experts, model.to_json()):
            raise ValueError(f"{model.path}: has changed since it was read; load it again")
        if plan is None:
            plan = plan_removal(name, model, store, keep_weights=keep_weights)
        elif plan.name != name or (keep_weights and plan.weights == "deleted"):
            raise ValueError(
                f"plan: removes expert {plan.name!r}, weights: {plan.weights}; plan again for "
                f"{name!r} with keep_weights={keep_weights}"
            )
        return _remove(plan, model, store)


def _remove(plan: OptOut, model: ModularModel, store: LogProbStore) -> OptOut:
    """Do what a plan says, from wherever an earlier call was stopped."""
    others = [entry for entry in model.experts if entry.name != plan.name]
    staying = [entry for entry in others if entry.name in store.experts]
    resumed = interrupted(model, plan.name) is not None
    if not staying or (len(staying) < len(others) and not resumed):
        missing = ", ".join(entry.name for entry in others if entry not in staying)
        raise ValueError(
            f"{store.path}: does not hold other experts of {model.path}: {missing}; give the store "
            "that the model was fitted on, or fit the model again to what this one holds"
        )
    experts = _open(staying)
    file = manifest_path(model, plan.name, plan.sha256)
    remove_abandoned(model.path)
    remove_averages(model.path)
    plan.write(file)
    _forget(plan, {entry.name: entry.sha256 for entry in staying}, model, store)
    names = [entry.name for entry in staying]
    fitted = _fit(store, model.path, experts, names, plan)
    verified = prove(
        plan.name,
        plan.sha256,
        fitted,
        store,
        names,
        lambda fresh, folder: _fit(fresh, folder, experts, names, plan),
    )
    if plan.weights == "deleted" and plan.path is not None:
        _delete(Path(plan.path), plan.sha256)
    done = replace(
        plan,
        carriers=(*plan.carriers, *_unfinished(plan)),
        prior={
            **plan.prior,
            "solved": dict(zip(fitted.names, fitted.prior.tolist(), strict=True)),
        },
        verified=verified,
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    done.write(file)
    return done


def _resumed(begun: OptOut, model: ModularModel, store: LogProbStore, keep_weights: bool) -> OptOut:
    """Return an interrupted plan, with the weights' fate as it is asked for now."""
    path = None if begun.path is None else Path(begun.path)
    planned = ExpertEntry(begun.name, begun.sha256, path)
    entry = next((one for one in model.experts if one.name == begun.name), planned)
    check_domains(entry, model, store)
    gone = entry.path is not None and not entry.path.exists()
    if gone and begun.weights == "deleted" and keep_weights:
        raise ValueError(
            f"{entry.path}: is deleted already by the removal of expert {begun.name!r} that was "
            "interrupted, so it cannot be kept; finish without --keep-weights"
        )
    weights = check_weights(entry, model, store, keep_weights)
    return replace(
        begun,
        path=None if entry.path is None else str(entry.path.resolve()),
        weights="deleted" if gone and begun.weights == "deleted" else weights,
    )


def _named(data: Data) -> dict[str, Any]:
    return {"name": data.name, "sha256": data.sha256}


def _forget(
    plan: OptOut, staying: Mapping[str, str], model: ModularModel, store: LogProbStore
) -> None:
    """Delete what the expert has said from the store, and from the model's own of evaluations.

    The latter may also hold the weight-averaged soup and a monolith: only experts that stay, stay.
    """
    store.clean()
    made_from = store.compared
    for other in store.experts:
        itself = store.expert_sha256(other) == plan.sha256 and other not in staying
        if itself or plan.sha256 in made_from.get(other, {}).values():
            store.remove_expert(other)
    if (model.path / "scores" / "manifest.json").exists():
        scores = LogProbStore(model.path / "scores")
        scores.clean()
        for other in scores.experts:
            if staying.get(other) != scores.expert_sha256(other):
                scores.remove_expert(other)


def _delete(folder: Path, sha256: str) -> None:
    """Delete a checkpoint, and what an unfinished training of it has left."""
    if folder.exists():
        if checkpoint_sha256(folder) != sha256:
            raise ValueError(
                f"{folder}: is another checkpoint than before; move it away, then go on"
            )
        remove_folder(run_folder(folder))  # first, for without the checkpoint it may be a new run
    remove_folder(folder)


def _unfinished(plan: OptOut) -> tuple[Carrier, ...]:
    """Return the folder of an unfinished training under the expert's name, if it stays."""
    run = None if plan.path is None else run_folder(Path(plan.path))
    if run is None or not run.exists():
        return ()
    reason = "an unfinished training of this expert, or of another in its place, lies there"
    return (Carrier("checkpoint", str(run), "may carry", reason, "look at it, or delete it"),)


def _open(entries: Sequence[ExpertEntry]) -> ExpertSet | None:
    """Open checkpoints; ``None`` if the model does not know where they lie."""
    known = {entry.name: entry.path for entry in entries if entry.path is not None}
    return ExpertSet.open(known) if len(known) == len(entries) else None


def _fit(
    store: LogProbStore,
    folder: Path,
    experts: ExpertSet | None,
    names: Sequence[str],
    plan: OptOut,
) -> ModularModel:
    """Solve the prior from a store, as the plan says."""
    if experts is None and {*store.entrants} != {*names}:
        raise ValueError(f"{store.path}: holds other experts than {', '.join(names)}")
    return fit(
        store,
        folder,
        experts=experts,
        baseline=plan.baseline,  # type: ignore[arg-type]
        delta=plan.delta,
        progress=False,
    )
