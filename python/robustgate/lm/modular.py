"""The modular model: frozen experts, a gate, and the certificate that says what it is worth.

::

    modular/
      manifest.json                experts with paths and hashes, tokenizer, the gate's make,
                                   certificate, what training found, store
      gate-<hash>.safetensors      prior, mixture, the solver's trajectory, the gate's parameters
      evaluation.json, trace.json  written by ``robustgate evaluate``
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import first_line, read_json
from robustgate.lm.gates.records import BASELINES, CertificateRecord, GateFit, TrainingRecord
from robustgate.lm.gates.spec import BayesOptions, Gate, GateKind, GateSpec

if TYPE_CHECKING:
    from robustgate.lm.store.features import FeatureSpec

FORMAT = "robustgate modular model"
VERSION = 2
PARAMETERS = "parameters."
"""What the names of a learned gate's tensors begin with, in the gate's file."""


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
    """Frozen experts, a certified robust prior over them, and the gate that starts from it.

    The certificate is that of the prior. A learned gate was trained and kept for what it does on
    held-out documents (``training``); nothing is proven of it.

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
        spec: What the gate is made of.
        parameters: Of a learned gate, its ``state_dict``.
        training: Of a learned gate, what its training found.
        documents: Documents of each domain that the prior was fitted on, ``[D]``; empty for a
            model that was written before they were counted.
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
    spec: GateSpec = field(default_factory=GateSpec)
    parameters: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    training: TrainingRecord | None = None
    documents: tuple[int, ...] = ()

    @property
    def kind(self) -> GateKind:
        """``"prior"``, ``"token"`` or ``"sequence"``."""
        return self.spec.kind

    @property
    def features(self) -> FeatureSpec:
        """What the gate is told before each token; all off for ``"prior"``."""
        return self.spec.features

    @property
    def bayes(self) -> BayesOptions:
        """Options of the Bayes gate, that of a token gate included."""
        return self.spec.bayes

    def gate(self) -> Gate:
        """Return the gate, in evaluation mode.

        Returns:
            By kind a ``BayesGate``, a ``TokenGate`` (whose ``context`` is the width of
            ``features``) or a ``SequenceGate`` (whose inputs are ``gates.spec.document_features``).
        """
        with torch.random.fork_rng(devices=[]):  # of the initial numbers, which are replaced
            gate = self.spec.build(self.prior)
        if self.kind != "prior":
            gate.load_state_dict(dict(self.parameters))
        return gate.eval().requires_grad_(False)

    def with_gate(self, fitted: GateFit) -> ModularModel:
        """Return this model with a learned gate; the prior and its certificate stay."""
        state = fitted.gate.state_dict()
        parameters = {name: value.detach().clone() for name, value in state.items()}
        return replace(self, spec=fitted.spec, parameters=parameters, training=fitted.record)

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
        if manifest.get("version") not in range(1, VERSION + 1):
            raise ValueError(
                f"{file}: version {manifest.get('version')}, but this release reads versions up to "
                f"{VERSION}; upgrade robustgate, or fit again"
            )
        try:
            tensors = _read_gate(folder / manifest["gate"]["file"], manifest["gate"]["sha256"])
            own = {name for name in tensors if name.startswith(PARAMETERS)}
            parameters = {name.removeprefix(PARAMETERS): tensors.pop(name) for name in sorted(own)}
            spec = manifest["gate"].get("spec")  # version 1 knows the prior alone
            training = manifest.get("training")
            model = cls(
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
                GateSpec() if spec is None else GateSpec.from_json(spec),
                parameters,
                None if training is None else TrainingRecord.from_json(training),
                tuple(manifest.get("documents", ())),
            )
            model.gate()
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{file}: damaged ({first_line(error)}); fit again") from error
        return model

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
            "gate": self.spec.to_json(),
            "training": None if self.training is None else asdict(self.training),
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
