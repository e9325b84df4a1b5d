"""Tiny experts, a tokenizer and corpora, and processes that are killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from robustgate.lm.corpus import Corpus

WORDS = {
    "code": "def return for in range import self class if else print None True yield",
    "prose": "the river ran through a quiet town where nobody had ever seen snow",
}


def make_documents(domain: str, count: int, seed: int = 0) -> list[str]:
    """Return documents of 1 to 60 words of a domain."""
    draw, words = random.Random(f"{domain} {seed}"), WORDS[domain].split()
    return [" ".join(draw.choices(words, k=draw.randint(1, 60))) + "\n" for _ in range(count)]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer with 300 tokens."""
    from robustgate.lm.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("lm") / "tokenizer"
    train_tokenizer([*make_documents("code", 40), *make_documents("prose", 40)], 300, path)
    return path


@pytest.fixture(scope="session")
def make_checkpoint(tokenizer_path: Path) -> Callable[..., Path]:
    """A function that saves a random Llama of width 32 with the tokenizer's vocabulary."""
    from robustgate.lm.checkpoint import new_model, no_bars
    from robustgate.lm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)

    def make(path: Path, seed: int = 0, context: int = 32, **config: object) -> Path:
        tiny = {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "initializer_range": 0.2,  # so that experts differ clearly
            **config,
        }
        with torch.random.fork_rng(), no_bars():
            torch.manual_seed(seed)
            new_model(tiny, tokenizer, context).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def experts_path(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]
) -> Path:
    """A folder with the experts ``code`` and ``prose``, context 32."""
    folder = tmp_path_factory.mktemp("experts")
    make_checkpoint(folder / "code", seed=1)
    make_checkpoint(folder / "prose", seed=2)
    return folder


@pytest.fixture(scope="session")
def corpora() -> tuple[Corpus, Corpus]:
    """Corpora ``code`` and ``prose``; most documents are longer than the experts' context."""
    return (
        Corpus.of("code", make_documents("code", 12, seed=1)),
        Corpus.of("prose", make_documents("prose", 9, seed=1)),
    )


@pytest.fixture(scope="session")
def made_life(
    tmp_path_factory: pytest.TempPathFactory,
    make_checkpoint: Callable[..., Path],
    corpora: tuple[Corpus, Corpus],
) -> Path:
    """What ``lives.make_life`` makes; ``life`` is a copy to change."""
    from .lives import make_life

    return make_life(tmp_path_factory.mktemp("life"), make_checkpoint, corpora)


@pytest.fixture
def life(made_life: Path, tmp_path: Path) -> Path:
    """A copy of three experts, their store and their model."""
    return Path(shutil.copytree(made_life, tmp_path / "life"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, here and in processes of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """A function that runs work in a process of its own and kills it; true if it was in time.

    ``after`` kills it after so many seconds; ``at`` kills it just before the call of that number,
    from 0, to ``os.fsync`` or ``os.replace``, that is, around every step of an atomic write.
    """
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork

    def run(work: Callable[[], object], *, after: float | None = None, at: int = -1) -> bool:
        child = fork(work, at)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), "the work failed by itself"
        return status == signal.SIGKILL

    return run


def fork(work: Callable[[], object], kill_at: int = -1) -> int:
    """Start work in a process of its own and return its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks with threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
            _kill_at(kill_at)
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def _kill_at(at: int) -> None:
    """Let this process die at a call to ``os.fsync`` or ``os.replace``."""
    left = at

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object, **keywords: object) -> object:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*arguments, **keywords)

        return wrapper

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)  # type: ignore[assignment]


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Run a test without gradients."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def experts() -> list[torch.nn.Module]:
    """Three small models of different families, for one mixture."""
    from causal_models import make_experts

    return make_experts()


@pytest.fixture(scope="module")
def modular_path(
    tmp_path_factory: pytest.TempPathFactory, experts_path: Path, corpora: tuple[Corpus, Corpus]
) -> Path:
    """The folder of a robust prior fitted to two experts."""
    from robustgate.lm import ExpertSet, score
    from robustgate.lm.gates.fit import fit

    folder = tmp_path_factory.mktemp("modular")
    experts = ExpertSet.open(experts_path)
    store = score(experts, corpora, folder / "store", progress=False)
    fit(store, folder / "modular", experts=experts, progress=False)
    return folder / "modular"
