"""What the examples share: two texts that every Python carries, tiny Llamas, and a memory meter."""

from __future__ import annotations

import argparse
import inspect
import re
import typing
import unicodedata
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 2048  # V


def texts() -> dict[str, str]:
    """Return the source of some modules, and names of characters."""
    names = (unicodedata.name(chr(point), "") for point in range(0x3000))
    return {
        "code": "".join(inspect.getsource(module) for module in (argparse, inspect, typing)),
        "names": "\n".join(name for name in names if name),
    }


def encode(corpora: dict[str, str]) -> dict[str, Tensor]:  # name -> [tokens]
    """Return token ids over one vocabulary: the most frequent words and signs, 0 for the rest."""
    words = {name: re.findall(r"\w+|\s+|[^\w\s]", text) for name, text in corpora.items()}
    counts = Counter(word for stream in words.values() for word in stream)
    ids = {word: 1 + rank for rank, (word, _) in enumerate(counts.most_common(VOCAB - 1))}
    return {name: torch.tensor([ids.get(w, 0) for w in stream]) for name, stream in words.items()}


def batch(stream: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Return random windows of a stream, ``[rows, length]``."""
    starts = torch.randint(0, len(stream) - length, (rows,), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


def tiny_llama(hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """Return a small Llama with random weights in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, stream: Tensor, steps: int) -> LlamaForCausalLM:
    """Train a model on a stream, in plain torch, and return it."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = batch(stream, 8, 96, generator)
        logits = model(input_ids=tokens).logits[:, :-1]
        F.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1)).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def freeze(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return the model in eval mode, without gradients."""
    return model.eval().requires_grad_(False)


def kept_bytes(loss: Callable[[], Tensor]) -> int:
    """Return the memory that autograd holds between the forward and the backward pass of a loss."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()  # alive, so that no storage is counted twice
    return sum(storages.values()) if value.requires_grad else 0


def relative_difference(got: Tensor, want: Tensor) -> float:
    """Return the relative L2 distance of two tensors."""
    return float((got - want).norm() / want.norm())
