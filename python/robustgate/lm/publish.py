"""Writing a modular model so that a kill at any point leaves the old one or the new one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save

from robustgate import __version__
from robustgate.lm.files import exclusive, sha256_json, write_atomic, write_json
from robustgate.lm.modular import FORMAT, PARAMETERS, VERSION, ExpertEntry, ModularModel
from robustgate.lm.store.log_probs import LogProbStore

_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one writer at a time change a model; who holds the lock may take it again.

    Args:
        folder: that of the model; the file ``.lock`` in it is made if needed and left there.
    """
    held, own = _HELD.get(), folder.resolve()
    if own in held:
        yield
        return
    with exclusive(own / ".lock"):
        token = _HELD.set(held | {own})
        try:
            yield
        finally:
            _HELD.reset(token)


def publish(model: ModularModel) -> ModularModel:
    """Write a model into its folder.

    The manifest names the gate's file by its hash and is what makes a model: the new gate comes
    before it, the old gate goes after it. Evaluations of the old model go first.

    Args:
        model: Its ``path`` is the folder, made or replaced.

    Returns:
        The model, as read back.

    Raises:
        FileExistsError: The folder holds other files.
        OSError: A file could not be written; a model that was there stays whole.
    """
    folder = model.path
    tensors = {
        "prior": model.prior,
        "mixture": model.mixture,
        "baseline": model.baseline,
        **model.trajectory,
        **{f"{PARAMETERS}{name}": value for name, value in model.parameters.items()},
    }
    content = save({name: value.contiguous() for name, value in tensors.items()})
    sha256 = hashlib.sha256(content).hexdigest()
    file = f"gate-{sha256[:8]}.safetensors"
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "robustgate": __version__,
        "experts": [_entry(folder, expert) for expert in model.experts],
        "tokenizer_sha256": model.tokenizer_sha256,
        "domains": list(model.domains),
        "documents": list(model.documents),
        "gate": {"file": file, "sha256": sha256, "spec": model.spec.to_json()},
        "certificate": asdict(model.certificate),
        "training": None if model.training is None else asdict(model.training),
        "store_sha256": model.store_sha256,
    }
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        write_atomic(folder / file, content)
        for name in ("evaluation.json", "trace.json"):
            (folder / name).unlink(missing_ok=True)
        write_json(folder / "manifest.json", manifest)
        for other in folder.glob("gate-*.safetensors"):
            if other.name != file:
                other.unlink()
        return ModularModel.load(folder)


def check_place(folder: Path) -> None:
    """Raise ``FileExistsError`` if a folder holds files that are not a modular model.

    A gate without a manifest is one: that of a model that is being written, or was to be.
    """
    others = [file for file in folder.glob("[!.]*") if not file.match("gate-*.safetensors")]
    if others and not (folder / "manifest.json").exists():
        raise FileExistsError(f"{folder}: holds other files; choose another folder")


def store_sha256(store: LogProbStore) -> str:
    """Return the hash of what a store holds: its tokenizer, experts and corpora."""
    return sha256_json(
        {
            "tokenizer": store.tokenizer_sha256,
            "experts": {name: store.expert_sha256(name) for name in store.experts},
            "corpora": {name: asdict(store.corpus(name)) for name in store.corpora},
        }
    )


def _entry(folder: Path, expert: ExpertEntry) -> dict[str, str | None]:
    """Return an expert's entry in the manifest; its path leads there from the model's real folder.

    A checkpoint that is itself a link stays one.
    """
    path = None
    if expert.path is not None:
        place = expert.path.parent.resolve() / expert.path.name
        path = Path(os.path.relpath(place, folder.resolve())).as_posix()
    return {"name": expert.name, "sha256": expert.sha256, "path": path}
