"""Tokenizer, experts and the single models they are compared with. What is finished is skipped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from presets import DOMAINS, Preset

from robustgate.lm import Corpus, read_corpus, train, train_tokenizer

Task = Callable[[Path, Path, Preset, int], None]
"""What runs by itself, with the arguments data, out, preset and seed."""


def corpora(data: Path, split: str, preset: Preset) -> list[Corpus]:
    """Read one split of every domain, ``preset.documents`` of each at most."""
    whole = [read_corpus(data / name / f"{split}.txt", name) for name in preset.domains]
    limit = preset.documents
    return [Corpus.of(c.name, c.documents[:limit]) for c in whole] if limit else whole


def union(parts: list[Corpus]) -> Corpus:
    """All documents of all domains; training reads its rows in random order."""
    return Corpus.of("union", [text for part in parts for text in part.documents])


def tokenizer(data: Path, out: Path, preset: Preset) -> None:
    """Train the shared tokenizer on the training text of all domains."""
    if not (out / "tokenizer").exists():
        train_tokenizer(corpora(data, "train", preset), preset.vocab_size, out / "tokenizer")


def experts(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """Branch-Train-Merge: a seed model reads the union, each expert goes on from it on its own.

    The learning rate may stay at its peak in the seed model, for it falls to 0 in the experts.
    """
    parts = corpora(data, "train", preset)
    place = out / f"seed{seed}"
    train(
        union(parts),
        place / "seed",
        config=preset.expert,
        tokenizer=out / "tokenizer",
        steps=preset.seed_steps,
        learning_rate=preset.expert_rate,
        schedule=preset.seed_schedule,
        **_common(preset, seed),
    )
    for part in parts:
        train(
            part,
            place / "experts" / part.name,
            init=place / "seed",
            steps=preset.branch_steps,
            learning_rate=preset.branch_rate,
            schedule=preset.schedule,
            **_common(preset, seed),
        )


def scratch(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """Experts without a seed model: the same tokens in all, nothing shared but the tokenizer."""
    for part in corpora(data, "train", preset):
        train(
            part,
            out / f"seed{seed}" / "scratch" / part.name,
            config=preset.expert,
            tokenizer=out / "tokenizer",
            steps=preset.total_steps // len(preset.domains),
            learning_rate=preset.expert_rate,
            schedule=preset.schedule,
            **_common(preset, seed),
        )


def monolith(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """One model with the weights of all experts and as many tokens."""
    steps = preset.total_steps
    _single(data, out, "monolith", preset, seed, preset.monolith, preset.monolith_rate, steps)


def brief(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """One model with the weights of all experts and their training arithmetic."""
    steps = preset.total_steps // len(DOMAINS)  # a token passes through so many experts' weights
    _single(data, out, "brief", preset, seed, preset.monolith, preset.brief_rate, steps)


def small(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """One model with an expert's weights and as many tokens as all: their training arithmetic."""
    steps = preset.total_steps
    _single(data, out, "small", preset, seed, preset.expert, preset.expert_rate, steps)


def _single(
    data: Path,
    out: Path,
    name: str,
    preset: Preset,
    seed: int,
    config: dict[str, Any],
    rate: float,
    steps: int,
) -> None:
    """Train one model on the union of all domains."""
    train(
        union(corpora(data, "train", preset)),
        out / f"seed{seed}" / name,
        config=config,
        tokenizer=out / "tokenizer",
        steps=steps,
        learning_rate=rate,
        schedule=preset.schedule,
        **_common(preset, seed),
    )


def _common(preset: Preset, seed: int) -> dict[str, Any]:
    return {
        "context": preset.context,
        "batch_size": preset.batch_size,
        "bf16": preset.bf16,
        "seed": seed,
        "progress": False,
    }
