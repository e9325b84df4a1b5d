"""The benchmarks: one for each public op of :mod:`robustgate`."""

from robustgate.bench.benchmark import Benchmark
from robustgate.bench.ops.divergences import GENERALIZED_JSD, JSD, MIXTURE_KL
from robustgate.bench.ops.likelihoods import EXPERT_LOG_PROB, MIXTURE_LOG_SOFTMAX, MIXTURE_NLL
from robustgate.bench.ops.linear import LINEAR_JSD, LINEAR_MIXTURE_NLL
from robustgate.bench.ops.log_probs import MIXTURE_LOG_PROB, SEQUENCE_LOG_PROB

BENCHMARKS: tuple[Benchmark, ...] = (
    MIXTURE_NLL,
    EXPERT_LOG_PROB,
    MIXTURE_LOG_SOFTMAX,
    JSD,
    GENERALIZED_JSD,
    MIXTURE_KL,
    LINEAR_MIXTURE_NLL,
    LINEAR_JSD,
    MIXTURE_LOG_PROB,
    SEQUENCE_LOG_PROB,
)
"""In the order in which they are measured and shown."""
