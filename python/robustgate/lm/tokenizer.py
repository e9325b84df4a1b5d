"""Tokenizers: one shared by all experts, and its identity as a hash."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robustgate.lm.corpus import Corpus
from robustgate.lm.files import first_line, new_folder, require, sha256_json, write_json
from robustgate.lm.progress import ProgressBar
from robustgate.lm.training.lineage import MANIFEST, describe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
"""Special tokens of a trained tokenizer: they start and end a document, and fill a batch."""

_BATCH = 512  # documents encoded per call


@dataclass(frozen=True)
class Tokens:
    """Encoded documents, each one ``[BOS] + tokens + [EOS]``, one behind the other.

    Attributes:
        ids: token numbers, int64 [sum of lengths].
        offsets: where each document starts in ``ids``, int64 [n_docs + 1].
    """

    ids: Tensor  # [tokens + n_docs]
    offsets: Tensor  # [n_docs + 1]

    @property
    def gold_offsets(self) -> Tensor:  # [n_docs + 1]
        """Where each document starts among the scored tokens (all but the BOS), int64."""
        return self.offsets - torch.arange(len(self.offsets))

    def documents(self, first: int, last: int) -> Tokens:
        """Return the documents from ``first`` to ``last - 1``."""
        start, end = int(self.offsets[first]), int(self.offsets[last])
        return Tokens(self.ids[start:end], self.offsets[first : last + 1] - start)


def train_tokenizer(
    documents: Sequence[str | Corpus],
    vocab_size: int,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer and save it as a folder ``AutoTokenizer`` loads.

    Every text can be encoded (the 256 bytes are in the vocabulary), and decoding gives it back.
    The result depends on the documents and ``vocab_size`` alone. A record of the data lies beside
    it, see ``lineage``.

    Args:
        documents: the texts, or corpora, which the record then names.
        vocab_size: number of tokens at most, the three special ones included; at least 259.
        out: the folder to make.
        progress: show a bar when it takes longer than two seconds.

    Returns:
        The tokenizer as loaded from ``out``.

    Raises:
        FileExistsError: ``out`` is already there.
        ValueError: ``vocab_size`` is below 259.
        ImportError: an optional dependency is missing.

    Source:
        Sennrich, Haddow, Birch (2016), arXiv 1508.07909; byte level as in GPT-2.
    """
    if vocab_size < 259:
        raise ValueError(
            f"vocab_size: expected at least 259 (256 bytes, 3 special), got {vocab_size}"
        )
    tokenizers, transformers = require("tokenizers"), require("transformers")
    corpora = [part for part in documents if isinstance(part, Corpus)]
    if loose := [part for part in documents if isinstance(part, str)]:
        corpora.append(Corpus.of("documents", loose))
    texts = [text for corpus in corpora for text in corpus.documents]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with ProgressBar("train tokenizer", len(texts), show=progress) as bar:
        bpe.train_from_iterator(bar.over(texts), trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    with new_folder(Path(out)) as folder:
        fast.save_pretrained(folder)
        record = {"format": "robustgate tokenizer record", "version": 1}
        write_json(folder / MANIFEST, {**record, "tokenizer_data": describe(corpora)})
    return load_tokenizer(out)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder; nothing is downloaded and no code of the folder runs.

    Args:
        path: a folder that ``save_pretrained`` wrote.

    Returns:
        The fast tokenizer.

    Raises:
        ValueError: there is none, it cannot be read, or it is not a fast one; names the folder.
        ImportError: an optional dependency is missing.
    """
    transformers = require("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            Path(path), use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the loaders raise many types, tokenizers a plain Exception
        raise ValueError(
            f"{path}: no readable tokenizer ({first_line(error)}); save one there with "
            "tokenizer.save_pretrained(folder)"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{path}: {type(tokenizer).__name__} is a slow tokenizer; save its fast version there"
        )
    return tokenizer  # type: ignore[no-any-return]


def special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Return the numbers of the tokens that start and end a document.

    A tokenizer without a BOS token starts documents with its EOS token, as GPT-2 does.

    Raises:
        ValueError: it has no EOS token either.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no EOS token; set eos_token in its "
            "tokenizer_config.json"
        )
    return (eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id), eos


def encode(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], *, progress: bool = False
) -> Tokens:
    """Encode documents as ``[BOS] + tokens + [EOS]``.

    Text that looks like a special token is encoded as text.

    Args:
        tokenizer: the shared tokenizer.
        documents: the texts.
        progress: show a bar when it takes longer than two seconds.

    Returns:
        The token numbers and offsets.
    """
    bos, eos = special_ids(tokenizer)
    ids: list[Tensor] = []
    with ProgressBar("tokenise", len(documents), show=progress) as bar:
        for start in range(0, len(documents), _BATCH):
            batch = tokenizer(
                list(documents[start : start + _BATCH]),
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                truncation=False,
                padding=False,
                verbose=False,
            )["input_ids"]
            ids.extend(torch.tensor([bos, *tokens, eos]) for tokens in batch)
            bar.advance(len(batch))
    lengths = torch.tensor([0, *(len(document) for document in ids)])
    return Tokens(torch.cat(ids), lengths.cumsum(0))


def tokenizer_parts(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Return one hash for each part of a tokenizer that decides what a text becomes.

    Args:
        tokenizer: a fast tokenizer.

    Returns:
        Hashes of the vocabulary, merges, other settings of the model, normalizer, pre_tokenizer,
        post_processor, decoder, added_tokens, and of the tokens that start and end a document.
        Settings for truncation and padding do not enter, nor does the order of keys.
    """
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = dict(state["model"])
    parts = {
        "vocabulary": model.pop("vocab", None),
        "merges": model.pop("merges", None),
        "model": model,
        "added_tokens": sorted(state["added_tokens"], key=lambda token: int(token["id"])),
        "bos_eos": [tokenizer.bos_token, tokenizer.eos_token],
    }
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        parts[part] = state[part]
    return {name: sha256_json(value) for name, value in parts.items()}


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the hash that identifies a tokenizer: equal hashes encode every text equally.

    Args:
        tokenizer: a fast tokenizer.

    Returns:
        SHA-256 over ``tokenizer_parts``, 64 hexadecimal digits.
    """
    return sha256_json(tokenizer_parts(tokenizer))
