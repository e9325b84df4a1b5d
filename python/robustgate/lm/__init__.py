"""Floor 3: experts, scoring, the log-prob store, the modular model, evaluation and reports."""

from typing import TYPE_CHECKING

from robustgate.lm.corpus import Corpus, read_corpus, write_corpus
from robustgate.lm.evaluation.evaluate import evaluate, evaluate_model
from robustgate.lm.evaluation.results import Evaluation
from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import require
from robustgate.lm.gates.data_weights import data_weights
from robustgate.lm.gates.distill import distill
from robustgate.lm.gates.fit import fit
from robustgate.lm.gates.spec import Network
from robustgate.lm.lifecycle.members import add_expert, list_experts
from robustgate.lm.lifecycle.removal import remove_expert
from robustgate.lm.modular import ModularModel
from robustgate.lm.scoring.score import score
from robustgate.lm.store.features import FeatureSpec
from robustgate.lm.store.log_probs import LogProbStore
from robustgate.lm.tokenizer import tokenizer_sha256, train_tokenizer
from robustgate.lm.training.train import TrainResult, train

if TYPE_CHECKING:
    from robustgate.lm.causal import ModularForCausalLM

__all__ = [
    "Corpus",
    "Evaluation",
    "ExpertSet",
    "FeatureSpec",
    "LogProbStore",
    "ModularForCausalLM",
    "ModularModel",
    "Network",
    "TrainResult",
    "add_expert",
    "data_weights",
    "distill",
    "evaluate",
    "evaluate_model",
    "fit",
    "list_experts",
    "read_corpus",
    "remove_expert",
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
