"""Scores, gates and evaluations of one seed. What is finished is skipped."""

import re
from pathlib import Path

from presets import FEATURES, GATES, Gate, Preset
from training import corpora

from robustgate.lm import (
    Evaluation,
    ExpertSet,
    LogProbStore,
    ModularModel,
    distill,
    evaluate_model,
    fit,
    score,
)
from robustgate.lm.evaluation.systems import BASELINES

KINDS = ("experts", "scratch")
"""Sets of experts: branches of a seed model, and trained from nothing."""


def valid(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """Score the validation documents, which gates are fitted on."""
    _score(data, out / f"seed{seed}", "valid", preset)


def test(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """Score the test documents, which nothing is chosen on; the single models too."""
    place = out / f"seed{seed}"
    _score(data, place, "test", preset)
    for name, path in _monoliths(place).items():
        model = ExpertSet.open({name: path})
        documents = corpora(data, "test", preset)
        score(model, documents, place / "scores" / "experts-test", progress=False)


def judge(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """Fit every gate on validation and evaluate it on test, the prior beside everything else."""
    place = out / f"seed{seed}"
    for kind in KINDS:
        if not (place / kind).exists():
            continue
        store = LogProbStore.open(place / "scores" / f"{kind}-valid")
        for name, gate in GATES.items():
            folder = _folder(place, kind, name)
            if (folder / "evaluation.json").exists():
                continue
            everything = gate.kind == "prior"
            alone = everything and kind == "experts"
            evaluate_model(
                _fit(gate, store, folder, _experts(place, kind, preset), preset, seed),
                corpora(data, "test", preset),
                store=place / "scores" / f"{kind}-test",
                monolith=_monoliths(place) if alone else None,
                baselines=tuple(BASELINES) if everything else ("oracle",),
                development=store if everything else None,
                divergence_tokens=256 if everything else 0,
                gradients=alone,
                progress=False,
            )


def _fit(
    gate: Gate, store: LogProbStore, folder: Path, experts: ExpertSet, preset: Preset, seed: int
) -> ModularModel:
    shared = {"network": gate.network, "steps": preset.gate_steps, "seed": seed, "progress": False}
    if gate.kind == "distilled":
        names = [name for name, other in GATES.items() if other.kind == "sequence"]
        teacher = ModularModel.load(folder.parent / _slug(names[0]))
        return distill(teacher, folder, **shared)
    return fit(store, folder, gate=gate.kind, experts=experts, features=gate.features, **shared)


def evaluations(out: Path, seed: int, kind: str) -> dict[str, Evaluation]:
    """Read the evaluations of one seed, by the name of the gate; none where none was made."""
    folders = {name: _folder(out / f"seed{seed}", kind, name) for name in GATES}
    return {
        name: Evaluation.load(folder)
        for name, folder in folders.items()
        if (folder / "evaluation.json").exists()
    }


def model_of(out: Path, seed: int, kind: str, gate: str) -> ModularModel:
    """Read a gate's model of one seed."""
    return ModularModel.load(_folder(out / f"seed{seed}", kind, gate))


def _folder(place: Path, kind: str, name: str) -> Path:
    return place / "models" / kind / _slug(name)


def _slug(name: str) -> str:
    return re.sub("[^a-z]+", "-", name).strip("-")


def _score(data: Path, place: Path, split: str, preset: Preset) -> None:
    for kind in KINDS:
        if (place / kind).exists():
            score(
                _experts(place, kind, preset),
                corpora(data, split, preset),
                place / "scores" / f"{kind}-{split}",
                features=FEATURES,
                stride=3 * preset.context // 4,
                progress=False,
            )


def _experts(place: Path, kind: str, preset: Preset) -> ExpertSet:
    return ExpertSet.open([place / kind / name for name in preset.domains])


def _monoliths(place: Path) -> dict[str, Path]:
    names = {"monolith": "monolith", "monolith-brief": "brief", "monolith-small": "small"}
    return {name: place / folder for name, folder in names.items()}
