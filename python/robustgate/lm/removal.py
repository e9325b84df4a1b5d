"""Taking an expert out: its weights, its scores, its place in the prior, with a proof.

Everything that happens is written down first, in ``opt-out-<name>.json`` in the model's folder.
Each step can be done again, so that a removal that was killed is finished by calling it again.
"""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from robustgate.lm.carriers import find_carriers
from robustgate.lm.checkpoint import checkpoint_sha256, weight_files
from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import read_json, remove_abandoned, remove_folder, scratch_folder
from robustgate.lm.fit import fit
from robustgate.lm.lineage import Data, Origin, origins
from robustgate.lm.modular import ExpertEntry, ModularModel
from robustgate.lm.optout import OptOut, manifest_path
from robustgate.lm.store import LogProbStore


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
        The plan, unfinished; that of an earlier call if it was killed.

    Raises:
        ValueError: no such expert, the only one, a checkpoint that may not be deleted, or a store
            that is not that of the model, or not complete.
        FileNotFoundError: another expert's checkpoint is missing.
    """
    file = manifest_path(model, name)
    if file.exists() and (begun := OptOut.read(file)).finished is None:
        return begun
    if name not in model.names:
        raise ValueError(f"{model.path}: no expert {name!r}; it has: {', '.join(model.names)}")
    if len(model.names) == 1:
        raise ValueError(f"{model.path}: {name!r} is its only expert; delete the model instead")
    entry = model.experts[model.names.index(name)]
    _check_store(model, store)
    _others(name, model)
    weights = _check_weights(entry, model, store, keep_weights)
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
    prior is solved again from what remains, which replaces a learned gate too; evaluations go; the
    checkpoint folder is deleted. Then the store is written anew from its values and a model fitted
    to that, and both are compared byte by byte.

    Args:
        name: the expert.
        model: the modular model that has it.
        store: the log-prob store that the model was fitted on.
        keep_weights: leave the checkpoint where it is.
        plan: what ``plan_removal`` has just returned; made here if left out.

    Returns:
        The finished manifest, as written to ``opt-out-<name>.json`` in the model's folder.

    Raises:
        ValueError: as for ``plan_removal``, and then nothing is changed; or another expert's
            checkpoint has changed since the fit: put it back and call again.
        RuntimeError: the store or the model are not what they would be without the expert.
        OSError: a file could not be written or deleted; call again to finish.

    Example:
        >>> model = ModularModel.load("modular")                              # doctest: +SKIP
        >>> done = remove_expert("code", model, LogProbStore.open("store"))   # doctest: +SKIP
        >>> [carrier.name for carrier in done.carriers]                       # doctest: +SKIP
        ['checkpoint 5f0c5e3b9a7d1c24', 'shared tokenizer']
    """
    if plan is None:
        plan = plan_removal(name, model, store, keep_weights=keep_weights)
    file = manifest_path(model, name)
    remove_abandoned(model.path)
    plan.write(file)
    _forget(name, plan.sha256, model, store)
    experts = _others(name, model)
    names = [other for other in model.names if other != name]
    fitted = _fit(store, model.path, experts, names, plan)
    if plan.weights == "deleted" and plan.path is not None:
        _delete(Path(plan.path), plan.sha256)
    done = replace(
        plan,
        prior={
            **plan.prior,
            "solved": dict(zip(fitted.names, fitted.prior.tolist(), strict=True)),
        },
        verified=_verify(fitted, store, experts, names, plan),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    done.write(file)
    return done


def _named(data: Data) -> dict[str, Any]:
    return {"name": data.name, "sha256": data.sha256}


def _check_store(model: ModularModel, store: LogProbStore) -> None:
    """Refuse a store that is not that of the model, or cannot be fitted."""
    for entry in model.experts:
        if entry.name not in store.experts or store.expert_sha256(entry.name) != entry.sha256:
            raise ValueError(
                f"{store.path}: does not hold expert {entry.name!r} of {model.path}; give the "
                "store that the model was fitted on"
            )
    missing = set(model.domains).symmetric_difference(store.corpora)
    if missing:
        raise ValueError(
            f"{store.path}: its corpora are not the domains of {model.path} (differing: "
            f"{', '.join(sorted(missing))}); give the store that the model was fitted on"
        )
    shards = [shard for own in model.names for c in store.corpora for shard in store.shards(own, c)]
    if lost := next((shard for shard in shards if not shard.path.is_file()), None):
        raise ValueError(f"{lost.path}: no such file; score expert {lost.experts[0]!r} again first")
    if any(entry.path is None for entry in model.experts) and set(store.experts) != set(
        model.names
    ):
        raise ValueError(
            f"{store.path}: holds experts that are not in {model.path}, which does not know where "
            "its own lie; fit it again with --experts"
        )


def _check_weights(entry: ExpertEntry, model: ModularModel, store: LogProbStore, keep: bool) -> str:
    """Return what becomes of a checkpoint folder, if it is safe to delete."""
    path = entry.path
    if keep:
        return "kept"
    if path is None:
        raise ValueError(
            f"{model.path}: does not know where expert {entry.name!r} lies; delete its checkpoint "
            "yourself and pass --keep-weights"
        )
    links = [path, *path.rglob("*")] if path.is_dir() else [path]
    if link := next((link for link in links if link.is_symlink()), None):
        raise ValueError(
            f"{link}: is a symbolic link, so deleting {path} would leave weights where it points; "
            "delete them yourself and pass --keep-weights"
        )
    if not path.exists():
        return "gone before"
    weight_files(path)
    if checkpoint_sha256(path) != entry.sha256:
        raise ValueError(
            f"{path}: is not the checkpoint of expert {entry.name!r} any more, so it is not "
            "deleted; move it away, or pass --keep-weights"
        )
    needed = [other.path for other in model.experts if other.path and other.name != entry.name]
    for other in (*needed, model.path, store.path):
        if other.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{path}: cannot be deleted, for {other} is or lies in it; move that")
    return "deleted"


def _forget(name: str, sha256: str, model: ModularModel, store: LogProbStore) -> None:
    """Delete what the expert has said from the store, and from the model's own of evaluations.

    The latter may also hold the weight-averaged soup and a monolith: only experts that stay, stay.
    """
    store.clean()
    if name in store.experts and store.expert_sha256(name) == sha256:
        store.remove_expert(name)
    if (model.path / "scores" / "manifest.json").exists():
        scores = LogProbStore(model.path / "scores")
        scores.clean()
        kept = {entry.name: entry.sha256 for entry in model.experts if entry.name != name}
        for other in scores.experts:
            if kept.get(other) != scores.expert_sha256(other):
                scores.remove_expert(other)


def _delete(folder: Path, sha256: str) -> None:
    """Delete a checkpoint, and what an unfinished training of it has left."""
    if folder.exists() and checkpoint_sha256(folder) != sha256:
        raise ValueError(f"{folder}: is another checkpoint than before; move it away, then go on")
    remove_folder(folder)
    remove_folder(folder.with_name(f".{folder.name}.run"))


def _others(name: str, model: ModularModel) -> ExpertSet | None:
    """Open the checkpoints of all experts but one; ``None`` if the model does not know them."""
    paths = {entry.name: entry.path for entry in model.experts if entry.name != name}
    known = {other: path for other, path in paths.items() if path is not None}
    return ExpertSet.open(known) if len(known) == len(paths) else None


def _fit(
    store: LogProbStore,
    folder: Path,
    experts: ExpertSet | None,
    names: Sequence[str],
    plan: OptOut,
) -> ModularModel:
    """Solve the prior from a store, as the plan says."""
    if experts is None and set(store.experts) != set(names):
        raise ValueError(f"{store.path}: holds other experts than {', '.join(names)}")
    return fit(
        store,
        folder,
        experts=experts,
        baseline=plan.baseline,  # type: ignore[arg-type]
        delta=plan.delta,
        progress=False,
    )


def _verify(
    fitted: ModularModel,
    store: LogProbStore,
    experts: ExpertSet | None,
    names: Sequence[str],
    plan: OptOut,
) -> tuple[str, ...]:
    """Compare store and model with ones that are made without the expert."""
    with scratch_folder(store.path) as scratch:
        fresh = LogProbStore.create(scratch / "store", store.tokenizer_sha256)
        store.copy_to(fresh)
        ours, theirs = _files(store.path), _files(fresh.path)
        for file in sorted(ours | theirs):
            if file not in ours & theirs or not filecmp.cmp(
                store.path / file, fresh.path / file, shallow=False
            ):
                raise RuntimeError(
                    f"{store.path / file}: is not what a store without expert {plan.name!r} has "
                    "there; score into a new store and fit again"
                )
        again = _content(_fit(fresh, scratch / "model", experts, names, plan))
        for what, value in _content(fitted).items():
            if value != again[what]:
                raise RuntimeError(
                    f"{fitted.path}: {what} is {value}, but {again[what]} in a model fitted from a "
                    f"store without expert {plan.name!r}; fit again"
                )
    return (
        f"{len(ours)} files of the store, with those of a store written without the expert",
        "prior, least favourable mixture and certificate, with those of a model fitted from that",
    )


def _content(model: ModularModel) -> dict[str, Any]:
    """Return a model's manifest, with the hash of its numbers, but for where the experts lie."""
    content: dict[str, Any] = read_json(model.path / "manifest.json")
    experts = [{"name": entry["name"], "sha256": entry["sha256"]} for entry in content["experts"]]
    return {**content, "experts": experts}


def _files(folder: Path) -> set[str]:
    """Return the files of a store by their relative paths, but for its lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.lock")
    return {path.relative_to(folder).as_posix() for path in files}
