"""One tensor in one safetensors file, with what it is and a checksum in the header."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustgate.lm.files import write_atomic

_KEY = "robustgate"  # a single metadata entry: safetensors writes several in random order


class DamagedFileError(ValueError):
    """A file is truncated or altered, or holds something else than its place says."""


def write_tensor(path: Path, tensor: Tensor, identity: dict[str, Any]) -> None:
    """Write a tensor atomically; equal arguments give equal bytes.

    Args:
        path: a ``.safetensors`` file; its folder must exist.
        tensor: any dtype and shape, on the CPU.
        identity: what the tensor is, a JSON object; asked for again when it is read.

    Raises:
        OSError: the file could not be written; nothing half-written stays.
    """
    about = {"identity": identity, "sha256": _checksum(tensor)}
    metadata = {_KEY: json.dumps(about, sort_keys=True)}
    write_atomic(path, save({"values": tensor.contiguous()}, metadata))


def read_tensor(path: Path, identity: dict[str, Any]) -> Tensor:
    """Read a tensor that ``write_tensor`` wrote, and check it.

    Args:
        path: the file.
        identity: what the tensor must be.

    Returns:
        The tensor.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is truncated or altered, or its identity is another one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            tensor: Tensor = file.get_tensor("values").clone()
    except (SafetensorError, json.JSONDecodeError) as error:
        raise DamagedFileError(f"{path}: truncated or damaged ({error})") from error
    found = about.get("identity", {})
    for key, expected in identity.items():
        if found.get(key) != expected:
            raise DamagedFileError(f"{path}: {key} is {found.get(key)}, expected {expected}")
    if _checksum(tensor) != about.get("sha256"):
        raise DamagedFileError(f"{path}: the values do not match their checksum")
    return tensor


def _checksum(tensor: Tensor) -> str:
    """Return the hash of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
