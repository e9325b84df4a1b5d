"""Combine frozen expert language models into one model that is good on every mixture of domains."""

__version__ = "0.1.0"

from robustgate import game, lm
from robustgate.ops import (
    backend,
    expert_log_prob,
    mixture_log_prob,
    mixture_nll,
)

__all__ = [
    "__version__",
    "backend",
    "expert_log_prob",
    "game",
    "lm",
    "mixture_log_prob",
    "mixture_nll",
]
