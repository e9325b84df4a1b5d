"""Peak memory of a log-prob store of 10^7 tokens and 5 experts: filling it, and reading it.

Every step runs in a process of its own; what is printed is its peak resident memory above that of
a process that has only imported the package. The experts are random numbers: no model runs.

    python benchmarks/store_memory.py [--tokens 10000000] [--experts 5]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from robustgate.lm import FeatureSpec, LogProbStore

DOCUMENT = 500  # tokens of a document, on average


def start(store: LogProbStore, tokens: int, experts: int) -> None:
    """Import everything, open nothing: what the other steps are measured against."""


def fill(store: LogProbStore, tokens: int, experts: int) -> None:
    """Write all shards, with one feature."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 2 * DOCUMENT, (tokens // DOCUMENT,), generator=generator)
    lengths[-1] += tokens - int(lengths.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    LogProbStore.create(store.path, "T")
    store.add_corpus("corpus", sha256="C", offsets=offsets, window=1024, stride=512)
    for name in (f"expert-{k}" for k in range(experts)):
        store.add_expert(name, sha256=name)
        for log_probs, entropy in zip(
            store.shards(name, "corpus"), store.shards(name, "corpus", "entropy"), strict=True
        ):
            values = -torch.rand(log_probs.tokens, generator=generator)
            log_probs.write(values)
            entropy.write(-values)


def document_log_probs(store: LogProbStore, tokens: int, experts: int) -> None:
    """Read float64 [documents, K], from which priors are solved."""
    assert store.document_log_probs("corpus").shape[1] == experts


def token_log_probs(store: LogProbStore, tokens: int, experts: int) -> None:
    """Read float32 [tokens, K], from which token gates are trained."""
    assert store.token_log_probs("corpus").shape == (tokens, experts)


def context_features(store: LogProbStore, tokens: int, experts: int) -> None:
    """Read float32 [tokens, K] of entropies."""
    features = store.context_features("corpus", FeatureSpec(entropy=True))
    assert features.shape == (tokens, experts)


def copy(store: LogProbStore, tokens: int, experts: int) -> None:
    """Write the store anew, as the proof of a removal does."""
    with tempfile.TemporaryDirectory(dir=store.path.parent) as folder:
        store.copy_to(LogProbStore.create(folder, "T"))


STEPS = (start, fill, document_log_probs, token_log_probs, context_features, copy)


def main() -> None:
    """Run every step in a process of its own, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        began = time.perf_counter()
        {step.__name__: step for step in STEPS}[given.step](
            LogProbStore(given.store), given.tokens, given.experts
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(peak, time.perf_counter() - began)
        return
    sizes = ["--tokens", f"{given.tokens}", "--experts", f"{given.experts}"]
    print(f"{given.tokens:,} tokens, {given.experts} experts")
    with tempfile.TemporaryDirectory() as folder:
        base = 0.0
        for step in STEPS:
            command = [sys.executable, __file__, *sizes, "--step", step.__name__]
            command += ["--store", str(Path(folder) / "store")]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peak, seconds = (float(word) for word in answer.split())
            base = base or peak
            print(f"{step.__name__:20} {(peak - base) / 1024:8.0f} MiB {seconds:8.2f} s")


if __name__ == "__main__":
    main()
