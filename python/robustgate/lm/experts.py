"""A set of frozen experts: Hugging Face causal language models that share one tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from robustgate.lm.checkpoint import (
    checkpoint_sha256,
    context_length,
    load_model,
    read_config,
    weight_files,
)
from robustgate.lm.files import check_name
from robustgate.lm.tokenizer import load_tokenizer, tokenizer_parts, tokenizer_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class _Expert:
    """One checkpoint folder that has passed the checks."""

    path: Path
    context: int


class ExpertSet:
    """Named checkpoints with one tokenizer; models are loaded one at a time, on request.

    Build it with ``ExpertSet.open``.

    Example:
        >>> experts = ExpertSet.open("experts/")                  # doctest: +SKIP
        >>> experts.names                                         # doctest: +SKIP
        ('code', 'wiki')
        >>> model = experts.load("code")                          # doctest: +SKIP
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, source: Path) -> None:
        """Make an empty set for a tokenizer that was loaded from the folder ``source``."""
        self.tokenizer = tokenizer
        self.tokenizer_sha256 = tokenizer_sha256(tokenizer)
        self._source = source
        self._experts: dict[str, _Expert] = {}
        self._sha256: dict[Path, str] = {}

    @classmethod
    def open(cls, paths: StrPath | Sequence[StrPath] | Mapping[str, StrPath]) -> ExpertSet:
        """Check checkpoint folders and put them into one set; no weights are loaded.

        Args:
            paths: a checkpoint folder, a folder of checkpoint folders, a list of either, or a
                mapping from names to checkpoint folders. Without a mapping an expert bears the
                name of its folder.

        Returns:
            The set; its tokenizer is that of the first expert.

        Raises:
            FileNotFoundError: a folder, ``config.json`` or a weight file is missing.
            ValueError: two experts have one name, two tokenizers differ, the weights are not
                safetensors or are truncated, or a model has fewer outputs than the tokenizer has
                tokens; the message names the folder and the remedy.
        """
        if isinstance(paths, Mapping):
            named = [(name, Path(path)) for name, path in paths.items()]
        else:
            given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
            folders = [folder for path in given for folder in _checkpoint_folders(Path(path))]
            named = [(folder.resolve().name, folder) for folder in folders]
        if not named:
            raise ValueError("paths: expected at least one checkpoint folder, got none")
        weight_files(named[0][1])
        read_config(named[0][1])
        experts = cls(load_tokenizer(named[0][1]), named[0][1])
        for name, folder in named:
            experts.add(name, folder)
        return experts

    def add(self, name: str, checkpoint: StrPath) -> None:
        """Check a checkpoint folder and add it.

        Args:
            name: the expert's name.
            checkpoint: its folder.

        Raises:
            FileNotFoundError: as for ``open``.
            ValueError: as for ``open``.
        """
        path = Path(checkpoint)
        if name in self._experts:
            raise ValueError(
                f"two experts are named {name!r}: {self._experts[name].path} and {path}; "
                "rename a folder, or give a mapping from names to folders"
            )
        weight_files(path)
        config = read_config(path)
        self._check_tokenizer(path)
        columns = config.get_text_config().vocab_size
        if columns < self.vocab_size:
            raise ValueError(
                f"{path}: the model has {columns} outputs, fewer than the {self.vocab_size} tokens "
                "of its tokenizer; the two do not belong together"
            )
        self._experts[check_name(name, "expert")] = _Expert(path, context_length(config))

    def remove(self, name: str) -> None:
        """Take an expert out of the set; its folder stays.

        Raises:
            ValueError: no expert has this name.
        """
        self._expert(name)
        del self._experts[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in the order they were added."""
        return tuple(self._experts)

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens; a model's further logit columns are padding."""
        return len(self.tokenizer)

    @property
    def context(self) -> int:
        """The number of tokens that every expert can read at once."""
        return min(expert.context for expert in self._experts.values())

    def path(self, name: str) -> Path:
        """Return the checkpoint folder of an expert."""
        return self._expert(name).path

    def sha256(self, name: str, *, progress: bool = False) -> str:
        """Return the hash of an expert's configuration and weights.

        Args:
            name: the expert's name.
            progress: show a bar when it takes longer than two seconds.

        Returns:
            SHA-256, 64 hexadecimal digits; computed once.
        """
        path = self._expert(name).path
        if path not in self._sha256:
            self._sha256[path] = checkpoint_sha256(path, progress=progress)
        return self._sha256[path]

    def load(
        self,
        name: str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PreTrainedModel:
        """Load an expert, frozen and in evaluation mode.

        Args:
            name: the expert's name.
            device: where to put it; the CPU if left out.
            dtype: its weights' type; that of the checkpoint if left out.

        Returns:
            The model; its logits are [..., >= V].
        """
        return load_model(self._expert(name).path, device=device, dtype=dtype)

    def __len__(self) -> int:
        """Return K, the number of experts."""
        return len(self._experts)

    def __repr__(self) -> str:
        """Return the names and what they share."""
        names = ", ".join(self.names)
        return f"ExpertSet([{names}], vocab_size={self.vocab_size}, context={self.context})"

    def _expert(self, name: str) -> _Expert:
        if name not in self._experts:
            raise ValueError(f"no expert is named {name!r}; there are: {', '.join(self.names)}")
        return self._experts[name]

    def _check_tokenizer(self, path: Path) -> None:
        """Refuse a folder whose tokenizer is another one, naming both and the parts that differ."""
        if path == self._source:
            return
        other = load_tokenizer(path)
        if tokenizer_sha256(other) == self.tokenizer_sha256:
            return
        own, others = tokenizer_parts(self.tokenizer), tokenizer_parts(other)
        differing = ", ".join(part for part in own if own[part] != others[part])
        raise ValueError(
            f"the tokenizers of {self._source} and {path} differ in: {differing}. Experts can be "
            "mixed only if they share one tokenizer; train them with the same one"
        )


def _checkpoint_folders(path: Path) -> list[Path]:
    """Return the folder itself if it is a checkpoint, else the checkpoint folders in it."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; an expert is a local checkpoint folder")
    if (path / "config.json").is_file():
        return [path]
    folders = sorted(child.parent for child in path.glob("[!.]*/config.json"))
    if not folders:
        raise FileNotFoundError(
            f"{path}: neither a checkpoint (no config.json) nor a folder of checkpoints"
        )
    return folders
