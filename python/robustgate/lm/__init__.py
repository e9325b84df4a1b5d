"""Floor 3: experts, scoring, the log-prob store, the modular model, evaluation and reports."""

from typing import TYPE_CHECKING

from robustgate.lm.corpus import Corpus, read_corpus, write_corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import require
from robustgate.lm.score import score
from robustgate.lm.store import LogProbStore
from robustgate.lm.tokenizer import tokenizer_sha256, train_tokenizer
from robustgate.lm.train import TrainResult, train

if TYPE_CHECKING:
    from robustgate.lm.causal import ModularForCausalLM

__all__ = [
    "Corpus",
    "ExpertSet",
    "LogProbStore",
    "ModularForCausalLM",
    "TrainResult",
    "read_corpus",
    "score",
    "tokenizer_sha256",
    "train",
    "train_tokenizer",
    "write_corpus",
]


def __getattr__(name: str) -> object:
    """Import ``ModularForCausalLM``, which needs transformers, when it is asked for."""
    if name != "ModularForCausalLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("transformers")
    from robustgate.lm.causal import ModularForCausalLM

    return ModularForCausalLM
