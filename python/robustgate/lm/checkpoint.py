"""Hugging Face checkpoint folders: checks before loading, and the hash of what they hold."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from robustgate.lm.files import first_line, read_json, require, sha256_json
from robustgate.lm.progress import ProgressBar
from robustgate.lm.tokenizer import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DEFAULT_CONTEXT = 2048
"""Context of a model whose configuration states no limit."""

_VOLATILE = ("transformers_version", "_name_or_path")  # entries of config.json that say nothing


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, after checking that they are whole.

    Args:
        path: the checkpoint's folder.

    Returns:
        The files, sorted by name.

    Raises:
        FileNotFoundError: no such folder, no ``config.json`` or a weight file is missing.
        ValueError: the weights are not safetensors, or a file is truncated.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; an expert is a local checkpoint folder")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: no config.json, so this is no checkpoint folder; write one with "
            "model.save_pretrained(folder)"
        )
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    files = [single]
    if index.is_file() and not single.is_file():
        files = sorted({path / name for name in read_json(index).get("weight_map", {}).values()})
        if not files:
            raise ValueError(f"{index}: names no weight files; copy the whole checkpoint again")
    elif not single.is_file() and (pickles := sorted(path.glob("*.bin"))):
        raise ValueError(
            f"{path}: {pickles[0].name} is a pickle, which can run code when loaded; load it once "
            "where you trust it and call model.save_pretrained(folder), which writes safetensors"
        )
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing; copy the whole checkpoint again")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{file}: truncated or damaged ({error}); copy the checkpoint again"
            ) from error
    return files


def checkpoint_sha256(path: Path, *, progress: bool = False) -> str:
    """Return the hash of a checkpoint's configuration and weights.

    Every tensor enters with its name, dtype, shape and bytes, in the order of the names: how the
    weights are divided into files does not matter, nor does the version that wrote them.

    Args:
        path: the checkpoint's folder.
        progress: show a bar when it takes longer than two seconds.

    Returns:
        SHA-256, 64 hexadecimal digits.

    Raises:
        FileNotFoundError: as for ``weight_files``.
        ValueError: as for ``weight_files``.
    """
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in weight_files(path):
            tensors = stack.enter_context(safe_open(file, framework="pt"))
            where.update(dict.fromkeys(tensors.keys(), tensors))
        bar = stack.enter_context(ProgressBar(f"hash {path.name}", len(where), show=progress))
        config = read_json(path / "config.json")
        digest = hashlib.sha256(
            sha256_json({key: config[key] for key in config if key not in _VOLATILE}).encode()
        )
        for name in sorted(where):
            tensor = where[name].get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            bar.advance()
    return digest.hexdigest()


def parameter_count(path: Path) -> int:
    """Return how many weights a checkpoint holds, from its files' headers.

    Args:
        path: the checkpoint's folder.

    Returns:
        The number; a weight that two layers share counts once.

    Raises:
        FileNotFoundError: as for ``weight_files``.
        ValueError: as for ``weight_files``.
    """
    count = 0
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return count


def read_config(path: Path) -> PreTrainedConfig:
    """Read the configuration of a checkpoint; no code of the folder runs.

    Args:
        path: the checkpoint's folder.

    Returns:
        The configuration.

    Raises:
        ValueError: it is damaged, asks for code of the folder, or its model type is unknown or no
            causal language model.
    """
    transformers = require("transformers")
    content = read_json(path / "config.json")
    kind = content.get("model_type")
    if "auto_map" in content and kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{path}: model type {kind!r} needs the code in this folder, which is not run; use a "
            "checkpoint of a type that transformers knows"
        )
    try:
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"{path / 'config.json'}: not a usable configuration ({first_line(error)})"
        ) from error
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{path}: model type {kind!r} is no causal language model")
    return config


def context_length(config: PreTrainedConfig) -> int:
    """Return how many tokens a model reads at once: ``max_position_embeddings``, or 2048."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else DEFAULT_CONTEXT


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers from drawing its own bars."""
    logging = require("transformers").utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def new_model(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, context: int
) -> PreTrainedModel:
    """Make a causal language model with random weights in float32, from torch's generator.

    Args:
        config: the content of a ``config.json``; what it leaves out of vocabulary size, context
            and special tokens follows from the other arguments.
        tokenizer: the tokenizer it will be used with.
        context: how many tokens it must be able to read.

    Returns:
        The model.

    Raises:
        ValueError: unknown ``model_type``, or a vocabulary or context that is too small.
    """
    transformers = require("transformers")
    bos, eos = special_ids(tokenizer)
    given = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": context,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": tokenizer.pad_token_id,
        **config,
    }
    try:
        made = transformers.AutoConfig.for_model(**given)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
            made, dtype=torch.float32, trust_remote_code=False
        )
    except ValueError as error:
        raise ValueError(
            f"config: no causal language model can be made of it ({first_line(error)})"
        ) from error
    if made.vocab_size < len(tokenizer):
        raise ValueError(
            f"config: vocab_size is {made.vocab_size}, the tokenizer has {len(tokenizer)} tokens"
        )
    if context_length(made) < context:
        raise ValueError(
            f"config: max_position_embeddings is {context_length(made)}, context is {context}"
        )
    return model


def load_model(
    path: Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a causal language model from safetensors, frozen and in evaluation mode.

    Args:
        path: the checkpoint's folder.
        device: where to put it; the CPU if left out.
        dtype: its weights' type; that of the checkpoint if left out.

    Returns:
        The model.

    Raises:
        ValueError: the folder is no usable checkpoint, or weights are missing or do not fit.
        FileNotFoundError: a file is missing.
    """
    transformers = require("transformers")
    weight_files(path)
    config = read_config(path)
    try:
        with no_bars():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: the weights cannot be loaded ({first_line(error)})") from error
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"{path}: {len(info['missing_keys'])} weights of the model are not in the checkpoint "
            f"({names}); copy the checkpoint again"
        )
    model = model.eval().requires_grad_(False)
    return model if device is None else model.to(device)  # type: ignore[no-any-return]
