"""The proof that an expert is gone: nothing of it, and all else as if it had never been there."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from robustgate.lm.files import read_json, scratch_folder
from robustgate.lm.modular import ModularModel
from robustgate.lm.store.log_probs import LogProbStore


def prove(
    name: str,
    sha256: str,
    fitted: ModularModel,
    store: LogProbStore,
    staying: Collection[str],
    refit: Callable[[LogProbStore, Path], ModularModel],
) -> tuple[str, ...]:
    """Look for an expert in a store and a model, and compare both with ones made without it.

    Args:
        name: the expert's name.
        sha256: hash of its checkpoint.
        fitted: the model that was fitted without it.
        store: the store that this was fitted to.
        staying: names of the model's experts; one may be the same checkpoint, which the carriers
            say.
        refit: fits a model to another store in a folder, as ``fitted`` was fitted to this one.

    Returns:
        What was compared and found equal.

    Raises:
        RuntimeError: the expert is there, or something differs.
        ValueError: a shard is damaged.
    """
    for place in (store.path, fitted.path / "scores"):
        if (place / "manifest.json").exists():
            _check_gone(name, sha256, LogProbStore(place), staying)
    with scratch_folder(store.path) as scratch:
        fresh = LogProbStore.create(scratch / "store", store.tokenizer_sha256)
        store.copy_to(fresh)
        ours, theirs = _files(store.path), _files(fresh.path)
        for file in sorted(ours | theirs):
            if file not in ours & theirs or not filecmp.cmp(
                store.path / file, fresh.path / file, shallow=False
            ):
                raise RuntimeError(
                    f"{store.path / file}: is not what a store without expert {name!r} has there. "
                    "If something scores into this store, let it end, else move that file away; "
                    "then remove the expert again, which goes on from here"
                )
        again = _content(refit(fresh, scratch / "model"))
        for what, value in _content(fitted).items():
            if value != again[what]:
                raise RuntimeError(
                    f"{fitted.path}: {what} is {value}, but {again[what]} in a model fitted from a "
                    f"store without expert {name!r}; remove it again, which fits again"
                )
    return (
        f"{len(ours)} files of the store, with those of a store written without the expert",
        "prior, least favourable mixture and certificate, with those of a model fitted from that",
    )


def _check_gone(name: str, sha256: str, store: LogProbStore, staying: Collection[str]) -> None:
    """Raise ``RuntimeError`` if a store has the name, or the checkpoint under another name."""
    for other in store.experts:
        same = store.expert_sha256(other) == sha256 and other not in staying
        if other == name or same:
            raise RuntimeError(
                f"{store.path}: still holds expert {other!r}; if something scores into this store, "
                "let it end, then remove the expert again"
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
