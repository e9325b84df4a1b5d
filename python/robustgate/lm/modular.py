"""The modular model: frozen experts, a gate, and the certificate that says what it is worth.

::

    modular/
      manifest.json                experts with paths and hashes, tokenizer, certificate, store
      gate-<hash>.safetensors      prior, mixture, and the solver's trajectory
      evaluation.json, trace.json  written by ``robustgate evaluate``
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from torch import Tensor

from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import read_json

FORMAT = "robustgate modular model"
VERSION = 1

BASELINES = {
    "hindsight": " more than choosing the best expert for every single document with hindsight",
    "excess": " more than the best expert of each document's domain",
    "raw": "",
}
"""What a certificate can measure from, and how its sentence says so."""


@dataclass(frozen=True)
class CertificateRecord:
    """The numbers of a certificate as the manifest keeps them, in nats per document.

    The loss of domain ``d`` is ``l_d(w) = E_x[-log sum_k w_k exp L_k(x)] - b_d``, over the
    documents the prior was fitted on; the worst case is the maximum of
    ``sum_d lambda_d l_d(w)`` over all mixtures ``lambda``.

    Attributes:
        baseline: What ``b_d`` is: ``"hindsight"`` for ``E_x[-max_k L_k(x)]``, the best expert of
            every single document; ``"excess"`` for ``min_k E_x[-L_k(x)]``, the best expert of the
            domain; ``"raw"`` for 0. The first is the smaller of the two, so its certificate holds
            for the second as well.
        documents: Documents the prior was fitted on.
        lower_bound: No prior over these experts has a smaller worst case.
        upper_bound: The solver's prior has no larger worst case.
        worst_case: Worst case of the prior in this model, after its floor.
        delta: The floor: ``w = (1 - delta) w* + delta / K``.
        guarantee: On every document whatsoever this model loses at most so much against every
            expert, ``-log min_k w_k``.
    """

    baseline: str
    documents: int
    lower_bound: float
    upper_bound: float
    worst_case: float
    delta: float
    guarantee: float

    @property
    def gap(self) -> float:
        """Return ``upper_bound - lower_bound``."""
        return self.upper_bound - self.lower_bound


@dataclass(frozen=True)
class ExpertEntry:
    """An expert of a modular model.

    Attributes:
        name: Its name.
        sha256: Hash of its configuration and weights.
        path: Its checkpoint folder; ``None`` if the model was fitted without it at hand.
    """

    name: str
    sha256: str
    path: Path | None


@dataclass(frozen=True, eq=False)
class ModularModel:
    """A robust prior over frozen experts.

    Attributes:
        path: Its folder.
        experts: The K experts.
        tokenizer_sha256: Hash of their tokenizer.
        domains: The D domains it was fitted on.
        prior: Prior over the experts, float64 ``[K]``.
        mixture: Least favourable mixture of the domains ``lambda*``, float64 ``[D]``.
        baseline: ``b_d`` of the certificate, float64 ``[D]``.
        trajectory: Of the solver: ``lower_bound`` and ``upper_bound`` ``[I]``, ``mixtures``
            ``[I, D]``, float64.
        certificate: What is proven.
        store_sha256: Hash of what the store held when it was fitted.
    """

    path: Path
    experts: tuple[ExpertEntry, ...]
    tokenizer_sha256: str
    domains: tuple[str, ...]
    prior: Tensor  # [K]
    mixture: Tensor  # [D]
    baseline: Tensor  # [D]
    trajectory: Mapping[str, Tensor]
    certificate: CertificateRecord
    store_sha256: str

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the experts."""
        return tuple(expert.name for expert in self.experts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModularModel:
        """Read a model and check that its files belong together.

        Args:
            path: Folder that ``fit`` wrote.

        Returns:
            The model; no expert is loaded.

        Raises:
            FileNotFoundError: The folder holds no modular model, or its gate is missing.
            ValueError: A file is damaged, of another version, or does not belong to the others.
        """
        folder = Path(path)
        file = folder / "manifest.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder}: not a modular model (no manifest.json); `robustgate fit` makes one"
            )
        manifest = read_json(file)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(f"{file}: not the manifest of a {FORMAT}")
        if manifest.get("version") != VERSION:
            raise ValueError(
                f"{file}: version {manifest.get('version')}, but this release reads version "
                f"{VERSION}; upgrade robustgate, or fit again"
            )
        try:
            tensors = _read_gate(folder / manifest["gate"]["file"], manifest["gate"]["sha256"])
            return cls(
                folder,
                tuple(_entry(folder, expert) for expert in manifest["experts"]),
                manifest["tokenizer_sha256"],
                tuple(manifest["domains"]),
                tensors.pop("prior"),
                tensors.pop("mixture"),
                tensors.pop("baseline"),
                tensors,
                CertificateRecord(**manifest["certificate"]),
                manifest["store_sha256"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); fit again") from error

    def open_experts(self) -> ExpertSet:
        """Open the experts' checkpoints, after checking that they are the ones of the fit.

        Returns:
            The experts, in the order of ``prior``.

        Raises:
            FileNotFoundError: A checkpoint is missing, or the model does not know where it lies.
            ValueError: A checkpoint or its tokenizer is another one than at the fit.
        """
        paths = {expert.name: expert.path for expert in self.experts}
        known = {name: path for name, path in paths.items() if path is not None}
        if len(known) < len(paths):
            raise FileNotFoundError(
                f"{self.path}: does not know where its experts lie; fit again with --experts"
            )
        experts = ExpertSet.open(known)
        if experts.tokenizer_sha256 != self.tokenizer_sha256:
            raise ValueError(f"{self.path}: the experts' tokenizer has changed since the fit")
        for expert in self.experts:
            if experts.sha256(expert.name) != expert.sha256:
                raise ValueError(
                    f"{expert.path}: expert {expert.name!r} has changed since the fit; score it "
                    "and fit again"
                )
        return experts

    def to_json(self) -> dict[str, Any]:
        """Return experts, prior, least favourable mixture and certificate as JSON values."""
        return {
            "path": str(self.path),
            "prior": dict(zip(self.names, self.prior.tolist(), strict=True)),
            "mixture": dict(zip(self.domains, self.mixture.tolist(), strict=True)),
            "certificate": {**asdict(self.certificate), "sentence": self.sentence()},
        }

    def sentence(self) -> str:
        """Return the certificate in one sentence."""
        proven = self.certificate
        return (
            f"Whatever the mixture of the {len(self.domains)} domains, the robust mixture pays on "
            f"average at most {proven.worst_case:.3f} nats per document"
            f"{BASELINES[proven.baseline]}, and no fixed weights of these experts can promise less "
            f"than {proven.lower_bound:.3f} (proven on the {proven.documents:,} documents of the "
            "fit)."
        )


def _read_gate(file: Path, sha256: str) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; fit again")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{file}: truncated or altered; fit again")
    return load_tensors(content)


def _entry(folder: Path, expert: Mapping[str, Any]) -> ExpertEntry:
    path = expert["path"]
    return ExpertEntry(expert["name"], expert["sha256"], None if path is None else folder / path)
