"""Floor 2: the robust gate as mathematics, on log-probability tensors."""

from robustgate.game.bootstrap import bootstrap_worst_case
from robustgate.game.capacity import Capacity, capacity
from robustgate.game.certificate import Certificate, certificate
from robustgate.game.gates import BayesGate
from robustgate.game.mixtures import MixtureSet, Simplex
from robustgate.game.robust_prior import (
    FlooredPrior,
    RobustPrior,
    maximum_likelihood_prior,
    robust_prior,
)

__all__ = [
    "BayesGate",
    "Capacity",
    "Certificate",
    "FlooredPrior",
    "MixtureSet",
    "RobustPrior",
    "Simplex",
    "bootstrap_worst_case",
    "capacity",
    "certificate",
    "maximum_likelihood_prior",
    "robust_prior",
]
