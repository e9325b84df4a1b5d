"""Floor 1: fused ops on the logits and log-probabilities of K experts.

A public function checks its arguments and calls a raw op of ``torch.ops.robustgate``; torch's
dispatcher picks the device and :mod:`robustgate.ops.library` the backend. Nothing here knows what a
language model is.
"""

from robustgate.ops.expert_log_prob import expert_log_prob
from robustgate.ops.generalized_jsd import generalized_jsd
from robustgate.ops.jsd import jsd
from robustgate.ops.library import backend
from robustgate.ops.linear_jsd import linear_jsd
from robustgate.ops.linear_mixture_nll import linear_mixture_nll
from robustgate.ops.mixture_kl import mixture_kl
from robustgate.ops.mixture_log_prob import mixture_log_prob
from robustgate.ops.mixture_log_softmax import mixture_log_softmax
from robustgate.ops.mixture_nll import mixture_nll
from robustgate.ops.sequence_log_prob import sequence_log_prob

from robustgate.ops import backends  # isort: skip  (registers kernels on the schemas above)

__all__ = [
    "backend",
    "backends",
    "expert_log_prob",
    "generalized_jsd",
    "jsd",
    "linear_jsd",
    "linear_mixture_nll",
    "mixture_kl",
    "mixture_log_prob",
    "mixture_log_softmax",
    "mixture_nll",
    "sequence_log_prob",
]
