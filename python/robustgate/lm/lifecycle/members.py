"""An expert's life in a modular system: who is there, and how one more comes in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from robustgate.lm.checkpoint import context_length, parameter_count, read_config
from robustgate.lm.experts import ExpertSet
from robustgate.lm.modular import ModularModel
from robustgate.lm.store.log_probs import LogProbStore


@dataclass(frozen=True)
class ExpertInfo:
    """What is known of one expert.

    Attributes:
        name: its name.
        sha256: hash of its configuration and weights.
        path: its checkpoint folder; ``None`` where only its scores are known.
        context: tokens it reads at once; ``None`` without the checkpoint.
        parameters: its weights; ``None`` without the checkpoint.
        scored: for each corpus of the store, how many of its slices are there, and how many make
            the whole.
        prior: its weight in the model's certified prior; ``None`` if it is not in the model.
    """

    name: str
    sha256: str
    path: Path | None = None
    context: int | None = None
    parameters: int | None = None
    scored: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    prior: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a JSON object."""
        return {**asdict(self), "path": None if self.path is None else str(self.path)}


def list_experts(
    *,
    experts: ExpertSet | None = None,
    store: LogProbStore | None = None,
    model: ModularModel | None = None,
) -> list[ExpertInfo]:
    """List the experts of checkpoints, a store and a model, any of them.

    Args:
        experts: checkpoints.
        store: a log-prob store.
        model: a modular model; checkpoints that it knows and that are there are described too.

    Returns:
        The experts, sorted by name.

    Raises:
        ValueError: two of the three have different checkpoints under one name.

    Example:
        >>> for expert in list_experts(store=LogProbStore.open("store")):       # doctest: +SKIP
        ...     print(expert.name, expert.scored)
        code {'code': (3, 3), 'wiki': (2, 2)}
    """
    paths: dict[str, Path] = {}
    hashes: dict[str, str] = {}
    if model is not None:
        for entry in model.experts:
            hashes[entry.name] = entry.sha256
            if entry.path is not None and entry.path.is_dir():
                paths[entry.name] = tidy(entry.path)
    for name in store.experts if store is not None else ():
        _agree(hashes, name, store.expert_sha256(name) if store is not None else "")
    for name in experts.names if experts is not None else ():
        if experts is not None:
            _agree(hashes, name, experts.sha256(name))
            paths[name] = experts.path(name)
    prior = {} if model is None else dict(zip(model.names, model.prior.tolist(), strict=True))
    return [
        ExpertInfo(
            name,
            hashes[name],
            **({} if name not in paths else _describe(paths[name])),
            scored={} if store is None or name not in store.experts else _scored(store, name),
            prior=prior.get(name),
        )
        for name in sorted(hashes)
    ]


def add_expert(
    checkpoint: str | os.PathLike[str],
    store: LogProbStore,
    *,
    name: str | None = None,
    model: ModularModel | None = None,
) -> ExpertInfo:
    """Check that a checkpoint can join, and register it in a store; nothing is scored.

    It will be scored in the type that all experts of the store are scored in, if there is one.

    Args:
        checkpoint: its folder.
        store: the log-prob store.
        name: the expert's name; that of the folder if left out.
        model: a modular model whose experts it will join; their checkpoints must be there.

    Returns:
        What is known of the expert.

    Raises:
        FileNotFoundError: no such checkpoint, or one of the model's is missing.
        ValueError: another tokenizer, too short a context, or the name is taken.

    Example:
        >>> add_expert("experts/law", LogProbStore.open("store")).scored        # doctest: +SKIP
        {'code': (0, 3), 'wiki': (0, 2)}
    """
    path = Path(checkpoint)
    name = path.resolve().name if name is None else name
    if model is None:
        experts = ExpertSet.open({name: path})
    else:
        experts = model.open_experts()
        experts.add(name, path)
    if experts.tokenizer_sha256 != store.tokenizer_sha256:
        raise ValueError(
            f"{path}: its tokenizer is not that of {store.path}; experts can be mixed only if they "
            "share one tokenizer"
        )
    info = _describe(path)
    for corpus in store.corpora:
        if info["context"] < (window := store.corpus(corpus).window):
            raise ValueError(
                f"{path}: reads {info['context']} tokens at once, but corpus {corpus!r} of "
                f"{store.path} is scored in windows of {window}; score all experts into a new "
                "store with a smaller window"
            )
    store.add_expert(name, sha256=experts.sha256(name), dtype=_dtype(store, name))
    return ExpertInfo(name, experts.sha256(name), **info, scored=_scored(store, name))


def tidy(path: Path) -> Path:
    """Return a path without the detours ``folder/..``, if it leads to the same place."""
    short = Path(os.path.normpath(path))
    return short if short.resolve() == path.resolve() else path


def _describe(path: Path) -> dict[str, Any]:
    """Return what a checkpoint folder says without loading weights."""
    return {
        "path": path,
        "context": context_length(read_config(path)),
        "parameters": parameter_count(path),
    }


def _dtype(store: LogProbStore, name: str) -> str | None:
    """Return the type that a store has for an expert, or for all; ``None`` for their own."""
    if name in store.experts:
        return store.expert(name).dtype
    common = {store.expert(other).dtype for other in store.experts}
    return common.pop() if len(common) == 1 else None


def _scored(store: LogProbStore, name: str) -> dict[str, tuple[int, int]]:
    """Return how many slices of each corpus are there, and how many there will be."""
    files = {
        corpus: [shard.path.is_file() for shard in store.shards(name, corpus)]
        for corpus in store.corpora
    }
    return {corpus: (sum(there), len(there)) for corpus, there in files.items()}


def _agree(hashes: dict[str, str], name: str, sha256: str) -> None:
    """Note a hash, or refuse one that differs from that noted before."""
    if hashes.setdefault(name, sha256) != sha256:
        raise ValueError(
            f"expert {name!r} is another checkpoint in one place ({hashes[name][:12]}) than in "
            f"another ({sha256[:12]}); score and fit again what is older"
        )
