"""What must hold before an expert is taken out, asked while nothing is changed yet."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from robustgate.lm.checkpoint import checkpoint_sha256, weight_files
from robustgate.lm.lifecycle.optout import interrupted
from robustgate.lm.modular import ExpertEntry, ModularModel
from robustgate.lm.store.log_probs import LogProbStore
from robustgate.lm.store.manifest import Manifest, read_manifest
from robustgate.lm.store.reader import read_shard
from robustgate.lm.store.shards import LOG_PROBS, Shard, offsets_path


def check_store(leaving: ExpertEntry, model: ModularModel, store: LogProbStore) -> None:
    """Refuse a store that is not that of the model, or cannot be fitted or proven.

    The leaving expert may be gone from it: another model on the same store had it too.

    Args:
        leaving: the expert to be removed.
        model: the model that has it.
        store: the log-prob store that the model was fitted on.

    Raises:
        ValueError: what is wrong with it, and what to do.
    """
    check_domains(leaving, model, store)
    others = [entry for entry in model.experts if entry.name != leaving.name]
    for entry in others:
        if entry.name not in store.experts or store.expert_sha256(entry.name) != entry.sha256:
            if interrupted(model, entry.name) is not None:
                raise ValueError(
                    f"{model.path}: the removal of expert {entry.name!r} was interrupted; finish "
                    "that first, by the same command"
                )
            raise ValueError(
                f"{store.path}: does not hold expert {entry.name!r} of {model.path}; give the "
                "store that the model was fitted on, or fit the model again to what this one holds"
            )
    for entry in others:
        for corpus in store.corpora:
            for shard in store.shards(entry.name, corpus):
                if not shard.path.is_file():
                    raise ValueError(
                        f"{shard.path}: no such file; score expert {entry.name!r} again first"
                    )
    strangers = {*store.entrants} - {*model.names}
    if strangers and any(entry.path is None for entry in model.experts):
        raise ValueError(
            f"{store.path}: holds experts that are not in {model.path} "
            f"({', '.join(sorted(strangers))}), which does not know where its own lie; fit it "
            "again with --experts"
        )
    _check_files(leaving, {entry.name for entry in others}, store)


def check_domains(leaving: ExpertEntry, model: ModularModel, store: LogProbStore) -> None:
    """Refuse a store of other corpora, or of another checkpoint under the leaving expert's name."""
    name = leaving.name
    if name in store.experts and store.expert_sha256(name) != leaving.sha256:
        raise ValueError(
            f"{store.path}: holds another checkpoint as expert {name!r} than the one that is to "
            f"leave {model.path}; fit the model again, or take the other out first: "
            f"LogProbStore.open({str(store.path)!r}).remove_expert({name!r})"
        )
    missing = set(model.domains).symmetric_difference(store.corpora)
    if missing:
        raise ValueError(
            f"{store.path}: its corpora are not the domains of {model.path} (differing: "
            f"{', '.join(sorted(missing))}); give the store that the model was fitted on"
        )


def _check_files(leaving: ExpertEntry, others: Collection[str], store: LogProbStore) -> None:
    """Refuse a store with a damaged shard, or with a file that no copy of the store would have."""
    whole = read_manifest(store.path)
    experts = {
        name: entry
        for name, entry in whole.experts.items()
        if name in others or entry.sha256 != leaving.sha256
    }
    joint = {folder: names for folder, names in whole.joint.items() if {*names} <= experts.keys()}
    manifest = replace(whole, experts=experts, joint=joint)
    known = {shard.path: shard for shard in _shards(store, manifest)}
    own = {store.path / name for name in ("manifest.json", "manifest.lock")}
    own |= {offsets_path(store.path, corpus) for corpus in manifest.corpora}
    for file in sorted(path for path in store.path.rglob("*") if path.is_file()):
        if file in own or _passes(file.relative_to(store.path), manifest):
            continue
        if file not in known:
            raise ValueError(
                f"{file}: is no file of this store, so that the store cannot be compared with one "
                "written without the expert; move it away, or delete it"
            )
        read_shard(known[file])


def _shards(store: LogProbStore, manifest: Manifest) -> Iterator[Shard]:
    """Yield every shard that may be there; of features, those of the kinds that are there."""
    for corpus in manifest.corpora:
        for expert in manifest.experts:
            files = (store.path / "shards" / expert / corpus).glob("*.safetensors")
            for kind in {LOG_PROBS, *(file.name.split(".")[1] for file in files)} - {"safetensors"}:
                yield from store.shards(expert, corpus, kind)
        for members in manifest.joint.values():
            yield from store.joint_shards(members, corpus)


def _passes(file: Path, manifest: Manifest) -> bool:
    """Whether a file of a store, by its relative path, goes with the expert or by ``clean``.

    One that is being written counts too: its writer may be done before the comparison.
    """
    place, *rest = file.parts
    known = {"shards": {*manifest.experts}, "joint": {*manifest.joint}}.get(place, set())
    return (
        any(part.endswith("~.tmp") for part in file.parts)
        or (place in ("shards", "joint") and len(rest) > 1 and rest[0] not in known)
        or (place in ("shards", "joint") and len(rest) > 2 and rest[1] not in manifest.corpora)
        or (place == "offsets" and len(rest) == 1 and file.suffix == ".safetensors")
    )


def check_weights(
    leaving: ExpertEntry, model: ModularModel, store: LogProbStore, keep: bool
) -> str:
    """Return what becomes of a checkpoint folder, if it is safe to delete.

    Args:
        leaving: the expert to be removed.
        model: the model that has it.
        store: the log-prob store that the model was fitted on.
        keep: leave the folder where it is.

    Returns:
        ``"deleted"``, ``"kept"`` or ``"gone before"``.

    Raises:
        ValueError: it is another checkpoint by now, or deleting it would delete too little or too
            much.
        FileNotFoundError: the folder is no checkpoint.
    """
    path = leaving.path
    if keep:
        return "kept"
    if path is None:
        raise ValueError(
            f"{model.path}: does not know where expert {leaving.name!r} lies; delete its "
            "checkpoint yourself and pass --keep-weights"
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
    if checkpoint_sha256(path) != leaving.sha256:
        raise ValueError(
            f"{path}: is not the checkpoint of expert {leaving.name!r} any more, so it is not "
            "deleted; move it away, or pass --keep-weights"
        )
    needed = [other.path for other in model.experts if other.path and other.name != leaving.name]
    for other in (*needed, model.path, store.path):
        if other.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{path}: cannot be deleted, for {other} is or lies in it; move that")
    return "deleted"
