"""What still carries an expert's data once the expert is gone, found and named."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from robustgate.lm.checkpoint import checkpoint_sha256, weight_files
from robustgate.lm.modular import FORMAT, ModularModel
from robustgate.lm.store import manifest as stores
from robustgate.lm.store.log_probs import LogProbStore
from robustgate.lm.training.lineage import (
    RUN_SETTINGS,
    Data,
    Origin,
    origins,
    read_object,
    run_folder,
)

_SAME = "it is the same checkpoint"
_AVERAGE = "it is an average of weights, this expert's among them"
_STRANGER = "the store holds its scores, and it is no expert of the model: it may be an average"


@dataclass(frozen=True)
class Carrier:
    """Something that holds, or was made with, the data of a removed expert.

    Attributes:
        kind: ``"checkpoint"``, ``"seed"``, ``"tokenizer"``, ``"gate"``, ``"model"``, ``"store"``,
            ``"corpus"``, ``"evaluation"``, ``"report"`` or ``"file"``.
        name: which one: a name or a path.
        status: ``"carries"``, ``"may carry"`` where no record says, or ``"deleted"``, by the
            removal.
        reason: why, in a sentence.
        remedy: what to do about it, in a sentence; empty where nothing is left to do.
    """

    kind: str
    name: str
    status: str
    reason: str
    remedy: str = ""


def find_carriers(
    name: str, sha256: str, origin: Sequence[Origin], model: ModularModel, store: LogProbStore
) -> tuple[Carrier, ...]:
    """Find everything in reach that carries the data of an expert about to be removed.

    Looked at are the expert's own training record, the model's other experts, the checkpoints,
    models and stores in the folders beside them, the store, and what the model's folder holds.

    Args:
        name: the expert's name in the model.
        sha256: hash of its checkpoint.
        origin: ``lineage.origins`` of its checkpoint.
        model: the modular model.
        store: the log-prob store that it was fitted on.

    Returns:
        The carriers; the removal deletes those that say so.
    """
    data = origin[0].data
    found: list[Carrier] = []
    if data is None:
        found.append(
            Carrier(
                "seed",
                "unknown",
                "may carry",
                f"expert {name!r} has no training record, so that neither its data nor the "
                "checkpoint that it started from is known",
                "ask whoever trained it",
            )
        )
    else:
        found += _seeds(data, origin)
    found += _tokenizer(data, origin[0])
    found += _checkpoints(name, sha256, data, model)
    found += _made_here(name, model)
    found += _elsewhere(sha256, model, store)
    for corpus in store.corpora if data is not None else ():
        if store.corpus(corpus).sha256 in {part.sha256 for part in data or ()}:
            reason = "the other experts' log-probabilities of that data are in the store"
            remedy = f"LogProbStore.open({str(store.path)!r}).remove_corpus({corpus!r}), fit again"
            found.append(Carrier("corpus", corpus, "carries", reason, remedy))
    made_from = store.compared
    for other in sorted({*store.experts} - {*model.names}):
        if sha256 in made_from.get(other, {}).values():
            remedy = "robustgate evaluate makes a new one"
            found.append(Carrier("store", f"expert {other}", "deleted", _AVERAGE, remedy))
        elif store.expert_sha256(other) != sha256:  # the removal takes that out too
            remedy = f"LogProbStore.open({str(store.path)!r}).remove_expert({other!r}), if it is"
            found.append(Carrier("store", f"expert {other}", "may carry", _STRANGER, remedy))
    return tuple(found)


def _seeds(data: Sequence[Data], origin: Sequence[Origin]) -> Iterator[Carrier]:
    """Yield the checkpoints that the expert descends from."""
    for child, seed in pairwise(origin):
        name = f"checkpoint {str(child.init)[:16]}"
        remedy = "train it again without that data, and the experts that start from it"
        if seed.data is None:
            reason = "the expert started from it, and there is no record of its data"
            yield Carrier("seed", name, "may carry", reason, remedy)
        elif shared := _shared(data, seed.data):
            yield Carrier(
                "seed", name, shared[0], f"the expert started from it; {shared[1]}", remedy
            )


def _tokenizer(data: Sequence[Data] | None, origin: Origin) -> Iterator[Carrier]:
    """Yield the shared tokenizer."""
    remedy = "train a tokenizer without that data, and all experts again with it"
    if origin.tokenizer is None:
        reason = "there is no record of what the shared tokenizer was trained on"
        yield Carrier("tokenizer", "shared tokenizer", "may carry", reason, remedy)
    elif data is None:
        reason = "it has a training record, but this expert has none to compare with"
        yield Carrier("tokenizer", "shared tokenizer", "may carry", reason, remedy)
    elif shared := _shared(data, origin.tokenizer):
        yield Carrier("tokenizer", "shared tokenizer", *shared, remedy)


def _checkpoints(
    name: str, sha256: str, data: Sequence[Data] | None, model: ModularModel
) -> Iterator[Carrier]:
    """Yield the model's other experts, and the checkpoints and unfinished runs beside them."""
    known = {entry.path.resolve(): entry for entry in model.experts if entry.path is not None}
    own = next((path for path, entry in known.items() if entry.name == name), None)
    for folder in _beside(known, "config.json"):
        if folder != own and any(folder.glob("*.safetensors")):
            entry = known.get(folder)
            same = _same_weights(folder, own, sha256) if entry is None else entry.sha256 == sha256
            yield from _checkpoint(folder, sha256, data, same)
    for folder in _beside(known, RUN_SETTINGS, run_folder(Path("*")).name):
        if own is None or folder != run_folder(own):
            yield from _checkpoint(folder, sha256, data, False)
    for entry in model.experts:
        if entry.path is None and entry.name != name:
            found = ("may carry", "the model does not know where it lies, nor its training record")
            status, reason = ("carries", _SAME) if entry.sha256 == sha256 else found
            yield Carrier("checkpoint", f"expert {entry.name}", status, reason, "remove it too")


def _same_weights(folder: Path, own: Path | None, sha256: str) -> bool:
    """Whether a folder has the expert's files of weights, or its hash where those are gone."""
    try:
        theirs = weight_files(folder)
        if own is None or not own.exists():
            return checkpoint_sha256(folder) == sha256
        ours = weight_files(own)
        return len(ours) == len(theirs) and all(
            filecmp.cmp(one, other, shallow=False) for one, other in zip(ours, theirs, strict=True)
        )
    except (OSError, ValueError):
        return False


def _checkpoint(
    folder: Path, sha256: str, data: Sequence[Data] | None, same: bool
) -> Iterator[Carrier]:
    """Yield another checkpoint if it is a copy, descends from the expert or has seen its data."""
    remedy = "train it again without that data, or remove it too"
    line = origins(folder)
    if same:
        yield Carrier("checkpoint", str(folder), "carries", _SAME, "remove it too")
    elif any(ancestor.init == sha256 for ancestor in line):
        yield Carrier("checkpoint", str(folder), "carries", "it started from this expert", remedy)
    elif data is None:
        reason = "this expert has no training record to compare with"
        yield Carrier("checkpoint", str(folder), "may carry", reason, remedy)
    else:
        for generation, ancestor in enumerate(line):
            whose = "the data of the seed it started from" if generation else "its training data"
            if ancestor.data is None:
                reason = f"there is no record of {whose}"
                yield Carrier("checkpoint", str(folder), "may carry", reason, remedy)
            elif shared := _shared(data, ancestor.data):
                reason = f"{whose}: {shared[1]}"
                yield Carrier("checkpoint", str(folder), shared[0], reason, remedy)


def _shared(data: Sequence[Data], other: Sequence[Data]) -> tuple[str, str] | None:
    """Return status and reason if corpora have documents in common, or may have."""
    unknown = []
    for own in data:
        for corpus in other:
            if own.sha256 == corpus.sha256:
                return "carries", f"it was trained on corpus {own.name!r} itself"
            share, part = own.share_in(corpus), corpus.share_in(own)
            if share:
                seen = f"about {share:.0%} of the documents of {own.name!r} are in {corpus.name!r}"
                return "carries", f"{seen}, which it was trained on"
            if part:
                seen = f"about {part:.0%} of the documents of {corpus.name!r}"
                return "carries", f"{seen}, which it was trained on, are in {own.name!r}"
            if share is None or part is None:
                unknown.append(f"{own.name!r} with {corpus.name!r}")
    if unknown:
        return "may carry", f"the records do not suffice to compare {', '.join(unknown)}"
    return None


def _made_here(name: str, model: ModularModel) -> Iterator[Carrier]:
    """Yield what was made with the expert in the model's own folder."""
    if model.kind != "prior":
        reason = f"the {model.kind} gate was trained on this expert's log-probabilities"
        remedy = f"robustgate fit --gate {model.kind} trains a new one, without the expert"
        yield Carrier("gate", str(model.path), "deleted", reason, remedy)
    made = [file for file in ("evaluation.json", "trace.json") if (model.path / file).exists()]
    for file in made:
        reason = "it was computed with this expert"
        yield Carrier("evaluation", file, "deleted", reason, "robustgate evaluate")
    if made:
        reason = "reports written from this model show this expert"
        remedy = "delete them, or write them again with robustgate report"
        yield Carrier("report", "reports of this model", "may carry", reason, remedy)
    ours = ("manifest.json", "gate-*.safetensors", "opt-out-*.json", "scores", *made)
    for other in sorted(model.path.glob("[!.]*")):
        if not any(other.match(pattern) for pattern in ours):
            reason = "it lies in the model's folder and may have been made with this expert"
            yield Carrier("file", str(other), "may carry", reason, "look at it, or delete it")


def _elsewhere(sha256: str, model: ModularModel, store: LogProbStore) -> Iterator[Carrier]:
    """Yield other models and stores beside this model and this store that hold the expert."""
    mine = {model.path.resolve(), store.path.resolve(), (model.path / "scores").resolve()}
    ours = {entry.sha256 for entry in model.experts}
    for folder in _beside([model.path.resolve(), store.path.resolve()], "manifest.json"):
        content = read_object(folder / "manifest.json")
        kind = {FORMAT: "model", stores.FORMAT: "store"}.get(str(content.get("format")))
        if kind is None or folder in mine:
            continue
        hashes = _hashes(content.get("experts"))
        if hashes is None:
            reason = "its manifest is damaged, so that its experts are not known"
            yield Carrier(kind, str(folder), "may carry", reason, "look at it, or delete it")
        for name, other in hashes or ():
            take_out = f"LogProbStore.open({str(folder)!r}).remove_expert({name!r})"
            if other == sha256 and kind == "model":
                remedy = f"robustgate expert remove {name} --model {folder} --store STORE"
                yield Carrier(kind, str(folder), "carries", "it has this expert", remedy)
            elif other == sha256:
                reason = "it holds this expert's log-probabilities"
                yield Carrier(kind, str(folder), "carries", reason, take_out)
            elif sha256 in _members(content, name):
                place = f"expert {name} in {folder}"
                yield Carrier(kind, place, "carries", _AVERAGE, take_out)
            elif kind == "store" and other not in ours and ours & {own for _, own in hashes or ()}:
                place = f"expert {name} in {folder}"
                yield Carrier(kind, place, "may carry", _STRANGER, f"{take_out}, if it is")
    for folder in _beside([model.path.resolve()], "config.json"):
        if sha256 in json.dumps(read_object(folder / "config.json")):
            remedy = "save it again from the model without this expert"
            yield Carrier("model", str(folder), "carries", "it names this expert", remedy)


def _hashes(experts: Any) -> list[tuple[str, str]] | None:
    """Return names and hashes of the experts of another manifest; ``None`` if it is damaged."""
    try:
        named = [(entry["name"], entry) for entry in experts] if isinstance(experts, list) else None
        entries = experts.items() if named is None else named
        return [(str(name), str(entry["sha256"])) for name, entry in entries]
    except (KeyError, TypeError, AttributeError):
        return None


def _members(content: Mapping[str, Any], name: str) -> list[Any]:
    """Return the hashes of what a model in a store was made from, as its manifest says."""
    compared = content.get("compared")
    members = compared.get(name) if isinstance(compared, dict) else None
    return [*members.values()] if isinstance(members, dict) else []


def _beside(paths: Iterable[Path], file: str, folders: str = "[!.]*") -> list[Path]:
    """Return the given folders and their neighbours, one and two levels up, that hold a file."""
    places = {place for path in paths for place in (path.parent, path.parent.parent)}
    found = {holder.parent for place in places for holder in place.glob(f"{folders}/{file}")}
    return sorted(found | {path for path in paths if (path / file).is_file()})
