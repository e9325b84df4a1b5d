"""Scores, gates and evaluations of one seed. What is finished is skipped."""

from pathlib import Path

from presets import DOMAINS, FEATURES, NETWORKS, Preset
from training import corpora

from robustgate.lm import ExpertSet, LogProbStore, score
from robustgate.lm.evaluate import evaluate_model
from robustgate.lm.fit import fit
from robustgate.lm.results import Evaluation

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
        documents = corpora(data, "test", preset.documents)
        score(model, documents, place / "scores" / "experts-test", progress=False)


def judge(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """Fit every gate on validation and evaluate it on test."""
    place = out / f"seed{seed}"
    for kind in KINDS:
        if not (place / kind).exists():
            continue
        store = LogProbStore.open(place / "scores" / f"{kind}-valid")
        experts = _experts(place, kind)
        for name, network in {"prior": None, **NETWORKS}.items():
            folder = place / "models" / kind / name.replace(" ", "-")
            if (folder / "evaluation.json").exists():
                continue
            model = fit(
                store,
                folder,
                gate="prior" if network is None else "token",
                experts=experts,
                network=network,
                features=None if network is None else FEATURES,
                steps=preset.gate_steps,
                seed=seed,
                progress=False,
            )
            evaluate_model(
                model,
                corpora(data, "test", preset.documents),
                store=place / "scores" / f"{kind}-test",
                monolith=_monoliths(place) if kind == "experts" else None,
                development=store,
                gradients=network is None and kind == "experts",
                progress=False,
            )


def evaluations(out: Path, seed: int, kind: str) -> dict[str, Evaluation]:
    """Read the evaluations of one seed, by the name of the gate; none where none was made."""
    place = out / f"seed{seed}" / "models" / kind
    names = {"prior": "prior", **{name: name.replace(" ", "-") for name in NETWORKS}}
    return {
        name: Evaluation.load(place / folder)
        for name, folder in names.items()
        if (place / folder / "evaluation.json").exists()
    }


def _score(data: Path, place: Path, split: str, preset: Preset) -> None:
    for kind in KINDS:
        if (place / kind).exists():
            score(
                _experts(place, kind),
                corpora(data, split, preset.documents),
                place / "scores" / f"{kind}-{split}",
                features=FEATURES,
                stride=3 * preset.context // 4,
                progress=False,
            )


def _experts(place: Path, kind: str) -> ExpertSet:
    return ExpertSet.open([place / kind / name for name in DOMAINS])


def _monoliths(place: Path) -> dict[str, Path]:
    return {"monolith": place / "monolith", "monolith-small": place / "small"}
