"""Log-prob stores with given numbers, for tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from robustgate.lm.store.log_probs import LogProbStore


def make_store(
    path: Path,
    corpora: Mapping[str, tuple[list[int], Tensor]],  # lengths, [tokens, K]
    experts: tuple[str, ...],
) -> LogProbStore:
    """Return a store that holds the log-probabilities, expert by column."""
    store = LogProbStore.create(path, "T" * 64)
    for corpus, (lengths, log_probs) in corpora.items():
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        store.add_corpus(corpus, sha256=f"sha of {corpus}", offsets=offsets, window=8, stride=4)
        for k, expert in enumerate(experts):
            store.add_expert(expert, sha256=f"sha of {expert}")
            store.write(expert, corpus, 0, log_probs[:, k].float().contiguous())
    return store


def random_corpora(
    domains: tuple[str, ...], experts: int, documents: int = 12, gap: float = 0.4, seed: int = 0
) -> dict[str, tuple[list[int], Tensor]]:
    """Return log-probabilities; on domain ``d`` expert ``d`` is better by ``gap`` a token."""
    generator = torch.Generator().manual_seed(seed)
    corpora = {}
    for d, domain in enumerate(domains):
        lengths = torch.randint(1, 9, (documents,), generator=generator).tolist()
        log_probs = -3 * torch.rand(sum(lengths), experts, generator=generator) - gap
        log_probs[:, d % experts] += gap
        corpora[domain] = (lengths, log_probs.float())
    return corpora
