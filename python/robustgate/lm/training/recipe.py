"""All that the weights of a trained expert depend on, so that a run can be known again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustgate.lm.checkpoint import checkpoint_sha256
from robustgate.lm.corpus import Corpus
from robustgate.lm.files import read_json
from robustgate.lm.tokenizer import load_tokenizer, tokenizer_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

StrPath = str | os.PathLike[str]

DEFAULT_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}
"""The Llama trained when neither a configuration nor a seed checkpoint is given."""

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""Ours, and the Trainer's names for what the learning rate does after its warmup."""

_ADDED = {"bf16": False}
"""Settings that earlier versions did not write down, and what they did."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run.

    Attributes:
        data: name and hash of each corpus.
        init: hash of the seed checkpoint, or None.
        config: content of the new model's ``config.json``, or None with a seed checkpoint.
        tokenizer: hash of the tokenizer, or None if one is trained on the data.
        vocab_size: number of tokens of a tokenizer trained on the data, else None.
        context: T, tokens in a row.
        steps: optimiser steps, or None.
        tokens: tokens to read, or None; with ``steps`` also None, one pass over the data.
        batch_size: rows in a step.
        learning_rate: peak of the schedule.
        weight_decay: of AdamW.
        warmup: share of the steps in which the learning rate rises from 0.
        schedule: how it goes on afterwards, a key of ``SCHEDULES``.
        bf16: matrix products in bfloat16.
        seed: of the weights, the order of the rows and dropout.
    """

    data: Sequence[Mapping[str, str]]
    init: str | None
    config: Mapping[str, Any] | None
    tokenizer: str | None
    vocab_size: int | None
    context: int
    steps: int | None
    tokens: int | None
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: float
    schedule: str
    bf16: bool
    seed: int

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        least = {"context": 2, "batch_size": 1, "steps": 1, "tokens": 1, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}: expected at least {bound}, got {value}")
        if self.steps is not None and self.tokens is not None:
            raise ValueError(f"steps, tokens: expected one, got {self.steps} and {self.tokens}")
        if self.schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise ValueError(f"schedule: expected one of {known}, got {self.schedule!r}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup: expected a share from 0 to 1, got {self.warmup}")

    def total_steps(self, data_tokens: int) -> int:
        """Return the number of steps, at least one, given the number of tokens in the data."""
        if self.steps is not None:
            return self.steps
        budget = data_tokens if self.tokens is None else self.tokens
        return max(1, budget // (self.batch_size * self.context))

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON object."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    def check_same(self, folder: Path, known: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` naming every setting that differs from those found in a folder."""
        there = {**_ADDED, **known}
        differing = [
            f"{name} {there.get(name)} there, {value} here"
            for name, value in self.to_json().items()
            if there.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{folder}: trained with other settings ({'; '.join(differing)}); delete the "
                "folder to train again, or choose another"
            )


def data_of(corpora: Sequence[Corpus]) -> list[dict[str, str]]:
    """Return the names and hashes of corpora."""
    return [{"name": corpus.name, "sha256": corpus.sha256} for corpus in corpora]


def init_of(init: StrPath | None, *, progress: bool) -> str | None:
    """Return the hash of a seed checkpoint."""
    return None if init is None else checkpoint_sha256(Path(init), progress=progress)


def config_of(
    config: Mapping[str, Any] | StrPath | None, init: StrPath | None
) -> dict[str, Any] | None:
    """Return the configuration of a new model, or None if the model comes from ``init``.

    Raises:
        ValueError: both are given.
    """
    if init is not None:
        if config is not None:
            raise ValueError("config: a model started from init keeps its own; leave config out")
        return None
    if config is None:
        content: Mapping[str, Any] = DEFAULT_CONFIG
    elif isinstance(config, Mapping):
        content = config
    else:
        content = read_json(Path(config))
    return {"model_type": "llama", **content}


def tokenizer_of(
    tokenizer: PreTrainedTokenizerFast | StrPath | None, init: StrPath | None
) -> str | None:
    """Return the hash of the tokenizer given, or None if neither argument gives one.

    Raises:
        ValueError: both are given and differ.
    """
    hashes = [
        tokenizer_sha256(load_tokenizer(given) if isinstance(given, (str, os.PathLike)) else given)
        for given in (tokenizer, init)
        if given is not None
    ]
    if len(set(hashes)) > 1:
        raise ValueError(f"tokenizer: not that of {init}; leave it out to use that one")
    return hashes[0] if hashes else None
