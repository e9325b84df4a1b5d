"""Training an expert: from a configuration, or as a branch of a seed checkpoint."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from robustgate.lm.checkpoint import (
    context_length,
    load_model,
    new_model,
    no_bars,
)
from robustgate.lm.corpus import Corpus, read_corpus
from robustgate.lm.files import (
    exclusive,
    explain_full_disk,
    new_folder,
    read_json,
    require,
    write_json,
)
from robustgate.lm.tokenizer import encode, load_tokenizer, tokenizer_sha256, train_tokenizer
from robustgate.lm.training.lineage import MANIFEST, describe, tokenizer_data
from robustgate.lm.training.packing import PackedRows
from robustgate.lm.training.recipe import Recipe, StrPath, config_of, data_of, init_of, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_VERSIONED = ("robustgate", "torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Attributes:
        path: the checkpoint folder.
        steps: optimiser steps in all.
        tokens: tokens read in all, steps * batch_size * context.
        parameters: number of weights.
        loss: of the last step, in nats per token.
        seconds: spent by this call.
        resumed_from: the step at which this call began; ``steps`` if there was nothing to do.
    """

    path: Path
    steps: int
    tokens: int
    parameters: int
    loss: float
    seconds: float
    resumed_from: int


def train(
    data: Corpus | StrPath | Sequence[Corpus | StrPath],
    out: StrPath,
    *,
    init: StrPath | None = None,
    config: Mapping[str, Any] | StrPath | None = None,
    tokenizer: PreTrainedTokenizerFast | StrPath | None = None,
    vocab_size: int = 4096,
    context: int = 256,
    steps: int | None = None,
    tokens: int | None = None,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.1,
    warmup: float = 0.05,
    schedule: str = "cosine",
    bf16: bool = False,
    seed: int = 0,
    resume: bool = True,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
) -> TrainResult:
    """Train a causal language model with the Hugging Face Trainer and save it as a checkpoint.

    Documents, each ``[BOS] + tokens + [EOS]``, are laid end to end and cut into rows of
    ``context`` tokens; every pass reads the rows in a new order. AdamW, betas (0.9, 0.95),
    gradients clipped at norm 1, weights in float32.

    A run that was killed goes on from its last checkpoint when it is called again, and on the CPU
    ends with the same bits as one that was not (with the same versions and number of threads). A
    finished ``out`` is not trained again. The Trainer's own files lie in the hidden folder
    ``.<name>.run`` beside ``out`` and vanish with success; ``out`` appears at once, whole.

    Args:
        data: corpora, or files that ``read_corpus`` reads.
        out: the checkpoint folder to make.
        init: a seed checkpoint to start from, with its tokenizer.
        config: the model, as the content or the path of a ``config.json``; ``model_type`` is
            ``llama`` unless it says otherwise, and sizes follow from tokenizer and context.
            ``recipe.DEFAULT_CONFIG`` if neither ``init`` nor ``config`` is given.
        tokenizer: the shared tokenizer or its folder; trained on the data if neither it nor
            ``init`` is given.
        vocab_size: number of tokens of a tokenizer trained here.
        context: T, tokens in a row.
        steps: optimiser steps.
        tokens: tokens to read, instead of ``steps``; one pass over the data if both are left out.
        batch_size: rows in a step.
        learning_rate: peak of the schedule.
        seed: of the weights, the order of the rows and dropout.

    Other:
        weight_decay: of AdamW.
        warmup: share of the steps in which the learning rate rises from 0.
        schedule: ``"cosine"`` and ``"linear"`` fall to 0 afterwards, ``"constant"`` stays at the
            peak: for a seed checkpoint, if the experts that go on from it fall linearly to 0
            (docs/evidence.md has what that is worth).
        bf16: multiply matrices in bfloat16; the weights and AdamW's state stay float32. 1.5 times
            as fast on a processor with AVX512-BF16, slow on one without.
        resume: ``False`` forgets an unfinished run.
        checkpoint_seconds: time between checkpoints of the run.
        progress: show a bar when training takes longer than two seconds.

    Returns:
        Where the checkpoint is, and what was done.

    Raises:
        ValueError: settings that do not fit each other or those of the finished or unfinished run
            found there (all that differ are named), too little data, or a loss that is not finite.
        FileExistsError: ``out`` is something else than a checkpoint trained here.
        BlockingIOError: another process is training ``out``.
        ImportError: an optional dependency is missing.

    Example:
        >>> result = train("wiki/train.txt", "experts/wiki", tokens=1_000_000)  # doctest: +SKIP
        >>> result.loss                                                         # doctest: +SKIP
        3.38
    """
    began = time.monotonic()
    out = Path(out)
    given = [data] if isinstance(data, (Corpus, str, os.PathLike)) else list(data)
    corpora = [part if isinstance(part, Corpus) else read_corpus(part) for part in given]
    if not corpora:
        raise ValueError("data: expected at least one corpus, got none")
    recipe = Recipe(
        data=data_of(corpora),
        init=init_of(init, progress=progress),
        config=config_of(config, init),
        tokenizer=tokenizer_of(tokenizer, init),
        vocab_size=vocab_size if tokenizer is None and init is None else None,
        context=context,
        steps=steps,
        tokens=tokens,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        bf16=bf16,
        seed=seed,
    )
    run = out.parent / f".{out.name}.run"
    if out.exists():
        if not (out / MANIFEST).is_file():
            raise FileExistsError(f"{out}: already exists and was not trained here; choose another")
        manifest = read_json(out / MANIFEST)
        recipe.check_same(out, manifest["settings"])
        shutil.rmtree(run, ignore_errors=True)
        return _result(out, manifest, began, manifest["steps"])
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    with exclusive(run / "lock", wait=False):
        if (run / "settings.json").exists():
            recipe.check_same(run, read_json(run / "settings.json"))
        else:
            write_json(run / "settings.json", recipe.to_json())
        shared = _tokenizer(tokenizer, init, corpora, run, vocab_size, progress)
        source = init if tokenizer is None else tokenizer
        described = describe(corpora) if source is None else tokenizer_data(source)
        manifest, resumed_from = _train(
            corpora, out, run, recipe, init, shared, described, checkpoint_seconds, progress
        )
        shutil.rmtree(run)
    return _result(out, manifest, began, resumed_from)


def _train(
    corpora: Sequence[Corpus],
    out: Path,
    run: Path,
    recipe: Recipe,
    init: StrPath | None,
    tokenizer: PreTrainedTokenizerFast,
    described: list[dict[str, Any]] | None,
    checkpoint_seconds: float,
    progress: bool,
) -> tuple[dict[str, Any], int]:
    """Train in the folder ``run`` and publish ``out``; return its manifest and the first step."""
    require("accelerate")
    from robustgate.lm.training.run import run_trainer, seeded

    documents = [document for corpus in corpora for document in corpus.documents]
    ids = encode(tokenizer, documents, progress=progress).ids
    steps = recipe.total_steps(len(ids))
    rows = PackedRows(ids, recipe.context, steps * recipe.batch_size, recipe.seed)
    with no_bars(), seeded(recipe.seed):
        model = _model(recipe, init, tokenizer)
        with explain_full_disk(run):
            loss, resumed_from = run_trainer(model, rows, run, recipe, checkpoint_seconds, progress)
        manifest = {
            "format": "robustgate training manifest",
            "version": 1,
            "settings": recipe.to_json(),
            "data": describe(corpora),
            "tokenizer_data": described,
            "ancestor": _ancestor(init),
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "steps": steps,
            "tokens": len(rows) * recipe.context,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "loss": loss,
            "versions": {
                "python": platform.python_version(),
                **{name: require(name).__version__ for name in _VERSIONED},
            },
        }
        with new_folder(out) as folder:
            model.cpu().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            write_json(folder / MANIFEST, manifest)
            for weights in folder.glob("*.safetensors"):  # written for their owner alone
                weights.chmod((folder / MANIFEST).stat().st_mode)
    return manifest, resumed_from


def _model(
    recipe: Recipe, init: StrPath | None, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    """Return the model that training starts from."""
    if recipe.config is not None:
        return new_model(recipe.config, tokenizer, recipe.context)
    model = load_model(Path(str(init)), dtype=torch.float32).requires_grad_(True)
    if recipe.context > (limit := context_length(model.config)):
        raise ValueError(f"context: {init} reads at most {limit} tokens, got {recipe.context}")
    return model


def _tokenizer(
    tokenizer: PreTrainedTokenizerFast | StrPath | None,
    init: StrPath | None,
    corpora: Sequence[Corpus],
    run: Path,
    vocab_size: int,
    progress: bool,
) -> PreTrainedTokenizerFast:
    """Return the tokenizer given, or that of the seed checkpoint, or one trained on the data."""
    source = init if tokenizer is None else tokenizer
    if source is None:
        source = run / "tokenizer"
        if not source.exists():
            documents = [document for corpus in corpora for document in corpus.documents]
            return train_tokenizer(documents, vocab_size, source, progress=progress)
    return load_tokenizer(source) if isinstance(source, (str, os.PathLike)) else source


def _ancestor(init: StrPath | None) -> dict[str, Any] | None:
    """Return the training manifest of the seed checkpoint, for the expert carries its data too."""
    if init is None:
        return None
    path = Path(init) / MANIFEST
    known: dict[str, Any] = read_json(path) if path.is_file() else {"data": "unknown"}
    return known


def _result(out: Path, manifest: Mapping[str, Any], began: float, resumed_from: int) -> TrainResult:
    """Return what the manifest says and what this call did."""
    return TrainResult(
        path=out,
        steps=manifest["steps"],
        tokens=manifest["tokens"],
        parameters=manifest["parameters"],
        loss=manifest["loss"],
        seconds=time.monotonic() - began,
        resumed_from=resumed_from,
    )
