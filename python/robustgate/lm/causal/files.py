"""The folder of a modular model that transformers loads.

::

    model/
      config.json               experts with paths and hashes, the gate's make, tokenizer
      model.safetensors         the gate's parameters
      generation_config.json    how to generate unless told otherwise
      tokenizer.json, ...       of all experts
      experts/<name>/           their checkpoints, if bundled
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from robustgate.lm.causal.config import ModularConfig, sizes
from robustgate.lm.checkpoint import checkpoint_sha256, load_model, no_bars, weight_files
from robustgate.lm.files import (
    explain_full_disk,
    first_line,
    new_folder,
    remove_folder,
    write_atomic,
)
from robustgate.lm.gates import Gate, GateSpec
from robustgate.lm.tokenizer import load_tokenizer, special_ids, tokenizer_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from robustgate.lm.causal import ModularForCausalLM
    from robustgate.lm.experts import ExpertSet
    from robustgate.lm.modular import ModularModel

GATE_FILE = "model.safetensors"
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
        eos_token_id=eos,
        pad_token_id=eos if pad is None else pad,
        dtype=dtype,
        **sizes([expert.config for expert in experts]),
    )


def save(model: ModularForCausalLM, folder: Path, *, bundle: bool) -> None:
    """Write a model; its configuration last, so that a folder without one is not finished.

    Args:
        model: the model.
        folder: made if needed.
        bundle: copy the experts' checkpoints into the folder.

    Raises:
        ValueError: an expert has no checkpoint to refer to, or it has changed.
        FileNotFoundError: an expert's checkpoint is gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for expert, entry in zip(model.experts, model.config.experts, strict=True):
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
    gate = {name: value.detach().cpu().contiguous() for name, value in _state(model.gate).items()}
    write_atomic(folder / GATE_FILE, save_tensors(gate, {"format": "pt"}))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    content = {**model.config.to_dict(), "experts": entries}
    content["architectures"] = [type(model).__name__]
    config = ModularConfig.from_dict(content)
    write_atomic(folder / "config.json", config.to_json_string(use_diff=False).encode())


def load(
    folder: Path, config: ModularConfig | None, dtype: torch.dtype | None
) -> tuple[ModularConfig, list[PreTrainedModel], Gate]:
    """Read what :func:`save` wrote.

    Args:
        folder: the folder.
        config: its configuration, read if left out.
        dtype: of the experts; what they had when saved if left out.

    Returns:
        The arguments of ``ModularForCausalLM``.

    Raises:
        FileNotFoundError: the folder, the gate or an expert is missing.
        ValueError: an expert or its tokenizer is another one than when it was saved.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no config.json; model.save_pretrained(folder) writes a modular model, "
            "ModularForCausalLM.from_modular reads what `robustgate fit` wrote"
        )
    config = ModularConfig.from_pretrained(folder) if config is None else config
    file = folder / GATE_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; save the model again")
    config.dtype = dtype or config.dtype
    wanted = config.dtype if isinstance(config.dtype, torch.dtype) else None
    entries, experts = [], []
    for entry in config.experts:
        path = (folder / entry["path"]).resolve()
        _check(path, entry, config.tokenizer_sha256)
        experts.append(load_model(path, dtype=wanted))
        entries.append({**entry, "path": str(path)})
    config.experts = entries
    gate = GateSpec.from_json(config.gate).build(
        torch.full((len(experts),), 1 / len(experts), dtype=torch.float64)
    )
    try:
        gate.load_state_dict(load_tensors(file.read_bytes()))
    except Exception as error:  # safetensors and torch raise several types
        raise ValueError(f"{file}: damaged ({first_line(error)}); save the model again") from error
    return config, experts, gate


def device_of(device_map: Any) -> torch.device:
    """Return the one device of a ``device_map``.

    Raises:
        ValueError: it spreads the model over several devices.
    """
    if isinstance(device_map, dict):
        if len(set(device_map.values())) != 1:
            raise ValueError("device_map: expected one device for all experts")
        device_map = next(iter(device_map.values()))
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device_map)


def _state(gate: Gate) -> dict[str, torch.Tensor]:
    return dict(gate.state_dict())


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
        sha256 = checkpoint_sha256(folder)
        if source is not None and sha256 != entry["sha256"]:
            raise ValueError(f"{source}: expert {entry['name']!r} has changed since it was loaded")
    return sha256
