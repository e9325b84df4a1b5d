"""The folder of a modular model that transformers loads.

::

    model/
      config.json               experts with paths and hashes, the gate's make, tokenizer
      model.safetensors         the gate's parameters
      generation_config.json    how to generate unless told otherwise
      tokenizer.json, ...       of all experts
      experts/<name>/           their checkpoints, if bundled, each with an empty file BUNDLED
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from robustgate.lm.causal.config import ModularConfig, sizes
from robustgate.lm.causal.options import dtype_of
from robustgate.lm.checkpoint import checkpoint_sha256, load_model, no_bars, weight_files
from robustgate.lm.files import (
    explain_full_disk,
    first_line,
    new_folder,
    remove_folder,
    write_atomic,
)
from robustgate.lm.gates.spec import Gate, GateSpec
from robustgate.lm.tokenizer import load_tokenizer, special_ids, tokenizer_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from robustgate.lm.causal import ModularForCausalLM
    from robustgate.lm.experts import ExpertSet
    from robustgate.lm.modular import ModularModel

GATE_FILE = "model.safetensors"
BUNDLED = "BUNDLED"
"""A file that marks a checkpoint as a bundle's copy, which may be deleted with its expert."""

_GATE = "gate."  # before the names of its tensors, as in the state of the whole model
_COPIED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def describe(
    modular: ModularModel,
    opened: ExpertSet,
    experts: Sequence[PreTrainedModel],
    *,
    dtype: torch.dtype | None,
    top_k: int | None,
) -> ModularConfig:
    """Return the configuration of a modular model.

    Args:
        modular: what ``robustgate fit`` made.
        opened: its experts' checkpoints.
        experts: the experts, in the order of ``modular.names``.
        dtype: that was asked for.
        top_k: how many experts ``generate`` keeps after the prompt.
    """
    bos, eos = special_ids(opened.tokenizer)
    stops = _stops(eos, experts)
    pad = opened.tokenizer.pad_token_id
    entries = [
        {
            "name": name,
            "path": str(opened.path(name).resolve()),
            "sha256": opened.sha256(name),
            "config": expert.config.to_dict(),
        }
        for name, expert in zip(modular.names, experts, strict=True)
    ]
    return ModularConfig(
        experts=entries,
        gate=modular.spec.to_json(),
        top_k_experts=top_k,
        tokenizer_sha256=opened.tokenizer_sha256,
        vocab_size=opened.vocab_size,
        bos_token_id=bos,
        eos_token_id=stops if len(stops) > 1 else eos,
        pad_token_id=eos if pad is None else pad,
        dtype=dtype,
        **sizes([expert.config for expert in experts]),
    )


def save(model: ModularForCausalLM, folder: Path, *, bundle: bool) -> None:
    """Write a model; its configuration last, so that a folder without one is not finished.

    Copies of experts that an earlier bundle left in the folder and this model does not have are
    deleted then.

    Args:
        model: the model.
        folder: made if needed.
        bundle: copy the experts' checkpoints into the folder.

    Raises:
        ValueError: an expert has no checkpoint to refer to, it has changed, or another model has
            taken its place in memory.
        FileNotFoundError: an expert's checkpoint is gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    known = zip(model.experts, model.loaded_experts, model.config.experts, strict=True)
    for expert, loaded, entry in known:
        if expert is not loaded:
            raise ValueError(
                f"expert {entry['name']!r}: replaced since the model was made; make a model of the "
                "experts you want to save"
            )
        entry = {**entry, "dtype": str(expert.dtype).removeprefix("torch.")}
        if bundle:
            place = folder / "experts" / entry["name"]
            sha256 = _copy(expert, entry, place)
            entries.append({**entry, "path": os.path.relpath(place, folder), "sha256": sha256})
        elif entry.get("path") is None:
            raise ValueError(
                f"expert {entry['name']!r}: has no checkpoint to refer to; save with bundle=True"
            )
        else:
            weight_files(Path(entry["path"]))
            entries.append({**entry, "path": os.path.relpath(entry["path"], folder.resolve())})
    source = next((entry["path"] for entry in model.config.experts if entry.get("path")), None)
    if source is not None and model.config.tokenizer_sha256 is not None:
        load_tokenizer(source).save_pretrained(folder)
    state = model.gate.state_dict()
    gate = save_tensors(
        {_GATE + name: value.detach().cpu().contiguous() for name, value in state.items()},
        {"format": "pt"},
    )
    write_atomic(folder / GATE_FILE, gate)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    content = {**model.config.to_dict(), "experts": entries}
    content["architectures"] = [type(model).__name__]
    content["gate_sha256"] = hashlib.sha256(gate).hexdigest()
    dtypes = {entry["dtype"] for entry in entries}
    content["dtype"] = dtypes.pop() if len(dtypes) == 1 else None
    config = ModularConfig.from_dict(content)
    write_atomic(folder / "config.json", config.to_json_string(use_diff=False).encode())
    _delete_copies(folder, keep={entry["path"] for entry in entries})


def load(
    folder: Path, config: ModularConfig, dtype: torch.dtype | None
) -> tuple[ModularConfig, list[PreTrainedModel], Gate]:
    """Read what :func:`save` wrote.

    Args:
        folder: the folder.
        config: its configuration; takes the experts' paths.
        dtype: of the experts; what each had when saved if left out.

    Returns:
        The arguments of ``ModularForCausalLM``.

    Raises:
        FileNotFoundError: the gate or an expert is missing.
        ValueError: an expert, its tokenizer or the gate is another one than when it was saved.
    """
    gate = _load_gate(folder / GATE_FILE, config)
    config.dtype = dtype or config.dtype
    entries, experts = [], []
    for entry in config.experts:
        path = (folder / entry["path"]).resolve()
        _check(path, entry, config.tokenizer_sha256)
        had = dtype_of(entry.get("dtype") or config.dtype)
        experts.append(load_model(path, dtype=dtype or had))
        entries.append({**entry, "path": str(path)})
    config.experts = entries
    return config, experts, gate


def _load_gate(file: Path, config: ModularConfig) -> Gate:
    """Read the gate of a model."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; save the model again")
    size = len(config.experts)
    gate = GateSpec.from_json(config.gate).build(torch.full((size,), 1 / size, dtype=torch.float64))
    content = file.read_bytes()
    try:
        named = load_tensors(content).items()
        state = {name.removeprefix(_GATE): value.clone() for name, value in named}
        gate.load_state_dict(state, assign=True)  # in the dtypes that it had
    except Exception as error:  # safetensors and torch raise several types
        raise ValueError(f"{file}: damaged ({first_line(error)}); save the model again") from error
    if config.gate_sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise ValueError(
            f"{file}: not the gate that config.json was written with; a save was interrupted, or "
            "the file was replaced, so save the model again"
        )
    return gate


def _stops(eos: int, experts: Sequence[PreTrainedModel]) -> list[int]:
    """Return the tokens that end a document: the tokenizer's, and those any expert stops at."""
    stops = {eos: None}
    for expert in experts:
        own = None if expert.generation_config is None else expert.generation_config.eos_token_id
        stops.update(dict.fromkeys([own] if isinstance(own, int) else own or []))
    return list(stops)


def _delete_copies(folder: Path, keep: set[str]) -> None:
    """Delete the copies that earlier bundles left in a folder."""
    for mark in sorted(folder.glob(f"experts/*/{BUNDLED}")):
        if os.path.relpath(mark.parent, folder) not in keep:
            remove_folder(mark.parent)


def _check(path: Path, entry: dict[str, Any], tokenizer: str | None) -> None:
    """Refuse a checkpoint that is not the one the model was saved with."""
    weight_files(path)
    if checkpoint_sha256(path) != entry["sha256"]:
        raise ValueError(
            f"{path}: expert {entry['name']!r} has changed since the model was saved; score it, "
            "fit again and save again"
        )
    if tokenizer is not None and tokenizer_sha256(load_tokenizer(path)) != tokenizer:
        raise ValueError(f"{path}: the tokenizer has changed since the model was saved")


def _copy(expert: Any, entry: dict[str, Any], place: Path) -> str:
    """Put an expert's checkpoint at a place and return its hash."""
    source = entry.get("path")
    if source is not None and Path(source).resolve() == place.resolve():
        return str(entry["sha256"])
    if place.exists():
        remove_folder(place)
    place.parent.mkdir(exist_ok=True)
    with new_folder(place) as folder, explain_full_disk(place), no_bars():
        if source is None:
            expert.save_pretrained(folder)
        else:
            weight_files(Path(source))
            for pattern in _COPIED:
                for file in sorted(Path(source).glob(pattern)):
                    shutil.copyfile(file, folder / file.name)
        (folder / BUNDLED).touch()
        sha256 = checkpoint_sha256(folder)
        if source is not None and sha256 != entry["sha256"]:
            raise ValueError(f"{source}: expert {entry['name']!r} has changed since it was loaded")
    return sha256
