"""What this installation can do: versions, devices, and which backend serves which op and why."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from robustgate import __version__
from robustgate.ops import backends, library

_PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "accelerate", "safetensors")


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()


def collect() -> dict[str, Any]:
    """Return versions, devices and the backend of every op, ready for JSON.

    Keys: ``robustgate``, ``python``, ``platform``, ``packages`` (name -> version or None), ``cpu``
    (``name``, ``threads``, ``instruction_set``), ``cuda`` (``compiled`` version or None,
    ``devices``), ``xpu`` (``devices``), ``backend`` (what is asked for), ``serving`` (device type
    -> op -> backends, the preferred one first), ``left_to_eager`` (backend -> what eager torch runs
    in its place) and ``unavailable`` (backend -> reason).
    """
    native = backends.native.import_error is None
    if native:
        from robustgate import _C
    gpus = {
        kind: [module.get_device_name(i) for i in range(module.device_count())]
        for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu))
    }
    return {
        "robustgate": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _package_version(name) for name in _PACKAGES},
        "cpu": {
            "name": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": _C.instruction_set() if native else None,
        },
        "cuda": {"compiled": _C.cuda_version if native else None, "devices": gpus["cuda"]},
        "xpu": {"devices": gpus["xpu"]},
        "backend": library.requested_backend(),
        "serving": {
            device: library.serving(device)
            for device in ("cpu", *(kind for kind, names in gpus.items() if names))
        },
        "left_to_eager": backends.left_to_eager(),
        "unavailable": backends.unavailable(),
    }
