"""The opt-out manifest: what is removed with an expert, and what still carries its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from robustgate import __version__
from robustgate.lm.files import read_json, write_json
from robustgate.lm.lifecycle.carriers import Carrier
from robustgate.lm.modular import ModularModel

FORMAT = "robustgate opt-out manifest"
VERSION = 1


@dataclass(frozen=True)
class OptOut:
    """A removal, planned or done: the content of ``opt-out-<name>-<hash>.json``.

    Attributes:
        name: the expert's name.
        sha256: hash of its checkpoint.
        path: its checkpoint folder; ``None`` if the model did not know it.
        weights: ``"deleted"``, ``"kept"`` or ``"gone before"``.
        data: name and hash of every corpus it was trained on; ``None`` without a training record.
        carriers: what carries, or may carry, its data.
        prior: of the other experts: before, with its weight shared out in proportion
            (``"renormalised"``), and solved again without it (``"solved"``).
        baseline: of the certificate.
        delta: floor of the prior.
        verified: what was compared after the removal, and found equal to the last bit.
        finished: when, in UTC; ``None`` until then.
    """

    name: str
    sha256: str
    path: str | None
    weights: str
    data: tuple[Mapping[str, Any], ...] | None
    carriers: tuple[Carrier, ...]
    prior: Mapping[str, Mapping[str, float]]
    baseline: str
    delta: float
    verified: tuple[str, ...] = ()
    finished: str | None = None

    @classmethod
    def read(cls, file: Path) -> OptOut:
        """Read an opt-out manifest.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        content = read_json(file)
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError(f"{file}: not an opt-out manifest of version {VERSION}")
        try:
            known: dict[str, Any] = {field.name: content[field.name] for field in fields(cls)}
            known["carriers"] = tuple(Carrier(**entry) for entry in known["carriers"])
            known["data"] = None if known["data"] is None else tuple(known["data"])
            known["verified"] = tuple(known["verified"])
            return cls(**known)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); delete it and remove again") from error

    def write(self, file: Path) -> None:
        """Write the manifest atomically."""
        about = {"format": FORMAT, "version": VERSION, "robustgate": __version__}
        write_json(file, {**about, **asdict(self)})


def manifest_path(model: ModularModel, name: str, sha256: str) -> Path:
    """Return the file of an expert's opt-out manifest; each checkpoint of a name has its own."""
    return model.path / f"opt-out-{name}-{sha256[:8]}.json"


def interrupted(model: ModularModel, name: str) -> OptOut | None:
    """Return the plan of a removal that was begun and not finished, if there is one.

    Args:
        model: the modular model.
        name: the expert's name. If the model has such an expert, only a plan for that very
            checkpoint counts.

    Raises:
        ValueError: an opt-out manifest of this name is damaged.
    """
    current = {entry.name: entry.sha256 for entry in model.experts}.get(name)
    for file in sorted(model.path.glob(manifest_path(model, name, "?" * 8).name)):
        plan = OptOut.read(file)
        if plan.name == name and plan.finished is None and current in (None, plan.sha256):
            return plan
    return None
