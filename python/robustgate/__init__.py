"""Combine frozen expert language models into one model that is good on every mixture of domains."""

__version__ = "0.1.0"

from robustgate import game, lm
from robustgate.ops import (
    backend,
    expert_log_prob,
    generalized_jsd,
    jsd,
    linear_jsd,
    linear_mixture_nll,
    mixture_kl,
    mixture_log_prob,
    mixture_log_softmax,
    mixture_nll,
    sequence_log_prob,
)

__all__ = [
    "__version__",
    "backend",
    "expert_log_prob",
    "game",
    "generalized_jsd",
    "jsd",
    "linear_jsd",
    "linear_mixture_nll",
    "lm",
    "mixture_kl",
    "mixture_log_prob",
    "mixture_log_softmax",
    "mixture_nll",
    "sequence_log_prob",
]
