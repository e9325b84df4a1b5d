"""Floor 1: fused ops on the logits and log-probabilities of K experts.

A public function checks its arguments and calls a raw op of ``torch.ops.robustgate``; torch's
dispatcher picks the device and :mod:`robustgate.ops.library` the backend. Nothing here knows what a
language model is.
"""

from robustgate.ops.expert_log_prob import expert_log_prob
from robustgate.ops.library import backend
from robustgate.ops.mixture_log_prob import mixture_log_prob
from robustgate.ops.mixture_nll import mixture_nll

from robustgate.ops import backends  # isort: skip  (registers kernels on the schemas above)

__all__ = ["backend", "backends", "expert_log_prob", "mixture_log_prob", "mixture_nll"]
