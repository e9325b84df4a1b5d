"""Floor 2: the robust gate as mathematics, on log-probability tensors."""

from robustgate.game.active_set import ActiveSet, active_set
from robustgate.game.averages import AveragedGate
from robustgate.game.bootstrap import bootstrap_worst_case
from robustgate.game.bounds import Bounds, bounds
from robustgate.game.box_mixtures import Box, CVaR, Floor
from robustgate.game.capacity import Capacity, capacity
from robustgate.game.certificate import Certificate, certificate
from robustgate.game.constant_gate import ConstantGate
from robustgate.game.diagnostics import (
    GradientConflict,
    Interference,
    expert_capacity,
    generalisation_gap,
    gradient_conflict,
    interference,
)
from robustgate.game.distill import Distillation, distill
from robustgate.game.documents import Documents, TokenDocuments
from robustgate.game.exact_certificate import ExactCertificate, exact_certificate
from robustgate.game.finite_gate import maximum_entropy_gate
from robustgate.game.gates import BayesGate
from robustgate.game.iterate import Iterate
from robustgate.game.kl_ball import KLBall
from robustgate.game.mixtures import MixtureSet, Simplex
from robustgate.game.normaliser import Normaliser, normaliser
from robustgate.game.primal_dual import PrimalDual
from robustgate.game.priors import cached_prior, uniform_prior, updating_prior
from robustgate.game.robust_prior import (
    FlooredPrior,
    RobustPrior,
    maximum_likelihood_prior,
    robust_prior,
)
from robustgate.game.sample import Sample, finite_samplers, sample
from robustgate.game.sequence_gate import SequenceGate
from robustgate.game.sequence_jsd import SequenceDivergence, sequence_jsd
from robustgate.game.solve_exact import ExactSolution, solve_exact
from robustgate.game.token_gate import TokenGate, TokenState
from robustgate.game.token_training import TokenTraining, train_token_gate
from robustgate.game.vertices import Vertices

__all__ = [
    "ActiveSet",
    "AveragedGate",
    "BayesGate",
    "Bounds",
    "Box",
    "CVaR",
    "Capacity",
    "Certificate",
    "ConstantGate",
    "Distillation",
    "Documents",
    "ExactCertificate",
    "ExactSolution",
    "Floor",
    "FlooredPrior",
    "GradientConflict",
    "Interference",
    "Iterate",
    "KLBall",
    "MixtureSet",
    "Normaliser",
    "PrimalDual",
    "RobustPrior",
    "Sample",
    "SequenceDivergence",
    "SequenceGate",
    "Simplex",
    "TokenDocuments",
    "TokenGate",
    "TokenState",
    "TokenTraining",
    "Vertices",
    "active_set",
    "bootstrap_worst_case",
    "bounds",
    "cached_prior",
    "capacity",
    "certificate",
    "distill",
    "exact_certificate",
    "expert_capacity",
    "finite_samplers",
    "generalisation_gap",
    "gradient_conflict",
    "interference",
    "maximum_entropy_gate",
    "maximum_likelihood_prior",
    "normaliser",
    "robust_prior",
    "sample",
    "sequence_jsd",
    "solve_exact",
    "train_token_gate",
    "uniform_prior",
    "updating_prior",
]
