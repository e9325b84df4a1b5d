"""Floor 3: experts, scoring, the log-prob store, evaluation and reports."""

from robustgate.lm.corpus import Corpus, read_corpus, write_corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.score import score
from robustgate.lm.store import LogProbStore
from robustgate.lm.tokenizer import tokenizer_sha256, train_tokenizer
from robustgate.lm.train import TrainResult, train

__all__ = [
    "Corpus",
    "ExpertSet",
    "LogProbStore",
    "TrainResult",
    "read_corpus",
    "score",
    "tokenizer_sha256",
    "train",
    "train_tokenizer",
    "write_corpus",
]
