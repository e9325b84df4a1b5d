"""The systems of an evaluation: the loss of every document under each, from stored scores.

======================================  ==================================================
expert, monolith, soup                  ``L(x)`` of one model
oracle expert                           ``L_k(d)(x)``, ``k(d)`` the best expert of the domain
best expert per document (hindsight)    ``max_k L_k(x)``
best expert per token (hindsight)       ``sum_t max_k l_k(t)``
static uniform mixture                  ``sum_t log (1/K) sum_k exp l_k(t)``
previous-token gate                     weights ``~ exp l_k(t - 1)``, ``1/K`` at first
uniform Bayes mixture                   ``log (1/K) sum_k exp L_k(x)``
cached-prior Bayes mixture              the same with a prior from the domain's own documents
updating-prior Bayes mixture            the same with the moving average of posteriors so far
fixed-share mixture                     Bayes that mixes the prior in after every token
robust Bayes mixture                    ``log sum_k w_k exp L_k(x)``, ``w`` the certified prior
======================================  ==================================================

and the model's own gate where it is another one. ``L_k(x)`` is the log-probability of a document
under expert k, ``l_k(t)`` that of its token t.

The two in hindsight are no models of text: they bound what any gate of whole documents, and any
gate at all, can reach with these experts. The previous-token gate is what the released code of
DEMix and c-BTM computes in place of the posterior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from robustgate.game import BayesGate, TokenGate, cached_prior, uniform_prior, updating_prior
from robustgate.game.priors import CACHED_DOCUMENTS
from robustgate.lm.gates.spec import BayesOptions, Gate, GateSpec
from robustgate.lm.gates.weigh import document_log_probs
from robustgate.lm.store.batches import Batch, first_documents, read_batches
from robustgate.lm.store.log_probs import LogProbStore
from robustgate.ops import mixture_log_prob

ORACLE = "oracle expert"
PER_DOCUMENT = "best expert per document (hindsight)"
PER_TOKEN = "best expert per token (hindsight)"
STATIC = "static uniform mixture"
PREVIOUS = "previous-token gate"
UNIFORM = "uniform Bayes mixture"
CACHED = "cached-prior Bayes mixture"
UPDATING = "updating-prior Bayes mixture"
SHARE = "fixed-share mixture"
SOUP = "weight-averaged soup"
ROBUST = "robust Bayes mixture"

BASELINES = {
    "experts": ("expert",),
    "oracle": (ORACLE,),
    "bounds": (PER_DOCUMENT, PER_TOKEN),
    "static": (STATIC,),
    "previous": (PREVIOUS,),
    "uniform": (UNIFORM,),
    "cached": (CACHED,),
    "updating": (UPDATING,),
    "share": (SHARE,),
    "soup": (SOUP,),
}
"""What ``evaluate`` can compare with, and the systems that each stands for."""


@dataclass(frozen=True, eq=False)
class Contest:
    """Who is compared, on which scores.

    Attributes:
        store: Scores of all models on all corpora.
        experts: The K experts, in the order of the prior.
        prior: The certified prior, float64 ``[K]``.
        gate: The model's gate.
        spec: What the gate is made of.
        log_normaliser: ``log Z_g`` of a sequence gate.
        ours: Name of the gate's system.
        others: System name of each further model, by its name in the store.
        baselines: Which of ``BASELINES``.
        development: Other documents of the same domains, for the cached prior.
        share: Of the fixed-share mixture.
    """

    store: LogProbStore
    experts: tuple[str, ...]
    prior: Tensor
    gate: Gate
    spec: GateSpec
    log_normaliser: float
    ours: str
    others: Mapping[str, str] = field(default_factory=dict)
    baselines: Sequence[str] = tuple(BASELINES)
    development: LogProbStore | None = None
    share: float = 0.01

    def kinds(self) -> dict[str, str]:
        """Return the kind of every system that is shown, in the order of the tables."""
        wanted = {name for baseline in self.baselines for name in BASELINES[baseline]}
        kinds = dict.fromkeys(self.experts, "expert") if "expert" in wanted else {}
        kinds |= {
            system: "soup" if system == SOUP else "monolith" for system in self.others.values()
        }
        mixtures = (STATIC, PREVIOUS, UNIFORM, CACHED, UPDATING, SHARE)
        kinds |= {name: "baseline" for name in mixtures if name in wanted}
        if self.development is None:
            kinds.pop(CACHED, None)
        kinds |= {ROBUST: "robust", self.ours: "robust"}
        kinds |= {name: "oracle" for name in (ORACLE,) if name in wanted}
        return kinds | {name: "bound" for name in (PER_DOCUMENT, PER_TOKEN) if name in wanted}

    def causal_gates(self) -> dict[str, BayesGate | TokenGate]:
        """Return the gates that can follow a text token by token, by the names of their systems."""
        uniform = uniform_prior(len(self.experts))
        gates: dict[str, BayesGate | TokenGate] = {
            PREVIOUS: BayesGate(uniform, window=1),
            UNIFORM: BayesGate(uniform),
            SHARE: BayesGate(uniform, share=self.share),
            ROBUST: BayesGate(self.prior),
        }
        if isinstance(self.gate, (BayesGate, TokenGate)):
            gates[self.ours] = self.gate
        return {name: gate for name, gate in gates.items() if name in self.kinds()}


@dataclass(frozen=True, eq=False)
class DomainLosses:
    """The losses of every document of a domain.

    Attributes:
        domain: Its name.
        best: The oracle's choice.
        nll: Negative log-likelihood of each document under each system, float64 ``[n]``.
        log_probs: The experts' log-probabilities of each document, float64 ``[n, K]``.
        lengths: Tokens of each document, float64 ``[n]``.
    """

    domain: str
    best: str
    nll: Mapping[str, Tensor]
    log_probs: Tensor
    lengths: Tensor


def gate_name(spec: GateSpec, *, distilled: bool = False) -> str:
    """Return the name of a model's gate among the systems."""
    if spec.kind == "sequence":
        return "sequence gate (not causal)"
    if spec.kind == "token":
        return "distilled token gate" if distilled else "token gate"
    given = ", ".join(
        f"{name} {value:g}"
        for name, value in asdict(spec.bayes).items()
        if value != getattr(BayesOptions, name)
    )
    return f"robust gate ({given})" if given else ROBUST


def domain_losses(contest: Contest, domain: str) -> DomainLosses:
    """Return the loss of every document of a domain under every system.

    The scores are read in batches of documents; only numbers per document are kept.

    Args:
        contest: The systems and the scores.
        domain: Name of a corpus in the store.
    """
    size = len(contest.experts)
    names = (*contest.experts, *contest.others)
    features = contest.spec.features
    count = contest.store.corpus(domain).documents
    log_probs = torch.empty(count, size, dtype=torch.float64)
    lengths = torch.empty(count, dtype=torch.float64)
    nll: dict[str, Tensor] = {}
    first = 0
    for batch in read_batches(contest.store, domain, names, features, among=size):
        rows = slice(first, first + len(batch.offsets) - 1)
        first = rows.stop
        sums = batch.sum(batch.log_probs)  # [n, K + others]
        log_probs[rows], lengths[rows] = sums[:, :size], batch.offsets.diff().double()
        found = _mixtures(contest, Batch(batch.log_probs[:, :size], batch.offsets, batch.features))
        for column, name in enumerate(contest.others.values(), start=size):
            found[name] = -sums[:, column]
        for name, losses in found.items():
            if name not in nll:  # one tensor for all: pieces kept till the end fragment the heap
                nll[name] = torch.empty(count, dtype=torch.float64)
            nll[name][rows] = losses
    nll |= {name: -log_probs[:, k] for k, name in enumerate(contest.experts)}
    best = min(contest.experts, key=lambda name: float(nll[name].sum()))
    nll[ORACLE] = nll[best]
    nll[PER_DOCUMENT] = -log_probs.amax(dim=1)
    _add_estimated_priors(contest, domain, log_probs, nll)
    return DomainLosses(domain, best, nll, log_probs, lengths)


def _mixtures(contest: Contest, batch: Batch) -> dict[str, Tensor]:
    """Return the losses ``[n]`` of what is computed token by token."""
    shown = contest.kinds()
    found = {
        name: -document_log_probs(gate, batch) for name, gate in contest.causal_gates().items()
    }
    if contest.ours not in found:
        found[contest.ours] = -document_log_probs(
            contest.gate, batch, span=contest.spec.span, log_normaliser=contest.log_normaliser
        )
    if STATIC in shown:
        uniform = torch.zeros(batch.log_probs.shape[1], dtype=torch.float64)
        found[STATIC] = -batch.sum(mixture_log_prob(batch.log_probs.double(), uniform))
    if PER_TOKEN in shown:
        found[PER_TOKEN] = -batch.sum(batch.log_probs.amax(dim=1))
    return found


def _add_estimated_priors(
    contest: Contest,
    domain: str,
    log_probs: Tensor,  # [n, K]
    nll: dict[str, Tensor],  # name -> [n]
) -> None:
    """Add the Bayes mixtures whose prior is estimated from documents read before."""
    shown = contest.kinds()
    if UPDATING in shown:
        priors = updating_prior(log_probs)[:-1]  # [n, K]; row i before document i
        nll[UPDATING] = -mixture_log_prob(log_probs, priors.log())
    if CACHED in shown and contest.development is not None:
        seen = first_documents(
            contest.development, domain, contest.experts, documents=CACHED_DOCUMENTS
        )
        prior = cached_prior(seen.sum(seen.log_probs))
        nll[CACHED] = -mixture_log_prob(log_probs, prior.log())
