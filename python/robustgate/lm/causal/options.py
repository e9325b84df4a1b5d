"""The arguments of ``from_pretrained`` besides the folder: what they change, or a refusal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import torch

from robustgate.lm.causal.config import ModularConfig

# What transformers passes along for the hub and for its own loader: true of every local folder of
# safetensors, or of no meaning there.
_WITHOUT_EFFECT: Final = frozenset(
    {
        "adapter_kwargs",
        "cache_dir",
        "code_revision",
        "force_download",
        "local_files_only",
        "low_cpu_mem_usage",
        "proxies",
        "revision",
        "token",
        "trust_remote_code",
        "use_safetensors",
        "weights_only",
    }
)


def overridden(
    folder: Path, config: ModularConfig | None, options: dict[str, Any]
) -> tuple[ModularConfig, str | dict[str, str] | None]:
    """Return the configuration with what a caller changed, and the experts' attention.

    Args:
        folder: of the model, where its configuration is read if it is not given.
        config: the configuration; left as it is.
        options: further arguments: entries of the configuration, and ``attn_implementation``.

    Raises:
        FileNotFoundError: the folder has no configuration.
        ValueError: an argument that cannot be honoured.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no config.json; model.save_pretrained(folder) writes a modular model, "
            "ModularForCausalLM.from_modular reads what `robustgate fit` wrote"
        )
    config = ModularConfig.from_pretrained(folder) if config is None else copy.deepcopy(config)
    attention = options.get("attn_implementation") or config._attn_implementation_internal
    for name, value in options.items():
        if name == "attn_implementation" or name in _WITHOUT_EFFECT or name.startswith("_"):
            continue
        if hasattr(config, name):
            setattr(config, name, value)
        elif value:
            raise ValueError(
                f"{name}: not supported; the experts are loaded as they are, on one device, "
                "in the dtype that is asked for"
            )
    return config, attention


def dtype_of(name: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that is meant; None for ``"auto"``.

    Raises:
        ValueError: there is no such dtype.
    """
    if name is None or name == "auto" or isinstance(name, torch.dtype):
        return None if isinstance(name, str) else name
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: expected one of torch's, such as 'bfloat16', got {name!r}")
    return found


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
