"""Tokenizer, experts and the single models they are compared with. What is finished is skipped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from presets import DOMAINS, Preset

from robustgate.lm import Corpus, read_corpus, train, train_tokenizer

Task = Callable[[Path, Path, Preset, int], None]
"""What runs by itself, with the arguments data, out, preset and seed."""


def corpora(data: Path, split: str, limit: int = 0) -> list[Corpus]:
    """Read one split of every domain; ``limit`` documents of each at most, 0 for all."""
    whole = [read_corpus(data / name / f"{split}.txt", name) for name in DOMAINS]
    return [Corpus.of(c.name, c.documents[:limit]) for c in whole] if limit else whole


def union(parts: list[Corpus]) -> Corpus:
    """All documents of all domains; training reads its rows in random order."""
    return Corpus.of("union", [text for part in parts for text in part.documents])


def tokenizer(data: Path, out: Path, preset: Preset) -> None:
    """Train the shared tokenizer on the training text of all domains."""
    if not (out / "tokenizer").exists():
        train_tokenizer(
            corpora(data, "train", preset.documents), preset.vocab_size, out / "tokenizer"
        )


def experts(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """Branch-Train-Merge: a seed model reads the union, each expert goes on from it on its own."""
    parts = corpora(data, "train", preset.documents)
    place = out / f"seed{seed}"
    with _precision(preset):
        train(
            union(parts),
            place / "seed",
            config=preset.expert,
            tokenizer=out / "tokenizer",
            steps=preset.seed_steps,
            learning_rate=preset.expert_rate,
            **_common(preset, seed),
        )
        for part in parts:
            train(
                part,
                place / "experts" / part.name,
                init=place / "seed",
                steps=preset.branch_steps,
                learning_rate=preset.branch_rate,
                **_common(preset, seed),
            )


def scratch(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """Experts without a seed model: the same tokens in all, nothing shared but the tokenizer."""
    with _precision(preset):
        for part in corpora(data, "train", preset.documents):
            train(
                part,
                out / f"seed{seed}" / "scratch" / part.name,
                config=preset.expert,
                tokenizer=out / "tokenizer",
                steps=preset.total_steps(len(DOMAINS)) // len(DOMAINS),
                learning_rate=preset.expert_rate,
                **_common(preset, seed),
            )


def monolith(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """One model with as many weights as all experts, and as many tokens."""
    _single(data, out / f"seed{seed}" / "monolith", out, preset, seed, large=True)


def small(data: Path, out: Path, preset: Preset, seed: int) -> None:
    """One model of an expert's size with as many tokens as all: equal training arithmetic."""
    _single(data, out / f"seed{seed}" / "small", out, preset, seed, large=False)


def _single(data: Path, place: Path, out: Path, preset: Preset, seed: int, *, large: bool) -> None:
    with _precision(preset):
        train(
            union(corpora(data, "train", preset.documents)),
            place,
            config=preset.monolith if large else preset.expert,
            tokenizer=out / "tokenizer",
            steps=preset.total_steps(len(DOMAINS)),
            learning_rate=preset.monolith_rate if large else preset.expert_rate,
            **_common(preset, seed),
        )


def _common(preset: Preset, seed: int) -> dict[str, Any]:
    return {
        "context": preset.context,
        "batch_size": preset.batch_size,
        "seed": seed,
        "progress": False,
    }


@contextmanager
def _precision(preset: Preset) -> Iterator[None]:
    """Run matrix products in bfloat16 where the preset says so; the weights stay float32."""
    with torch.autocast("cuda", torch.bfloat16, enabled=preset.bf16):
        yield
