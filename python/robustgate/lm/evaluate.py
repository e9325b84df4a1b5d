"""Evaluation from the log-prob store: every expert and every mixture, on every domain.

Nothing here runs a model. With ``L_k(x)`` the log-probability of a document ``x`` under expert
``k`` and ``l_k(t)`` that of its token ``t``, the systems are

======================  ==========================================================================
expert                  ``L_k(x)``
monolith                ``L(x)`` of one model trained on everything
oracle expert           ``L_k(d)(x)``, ``k(d)`` the best single expert on domain ``d``
static uniform mixture  ``sum_t log (1/K) sum_k exp l_k(t)``
uniform Bayes mixture   ``log (1/K) sum_k exp L_k(x)``
robust Bayes mixture    ``log sum_k w_k exp L_k(x)``, ``w`` the robust prior
======================  ==========================================================================

A Bayes mixture is causal (see ``robustgate.game.BayesGate``) and normalised, as an expert is.

The *worst-case excess* of a system is its largest excess over the oracle expert when documents
come from a mixture of the domains, over all mixtures ``lambda``:

    per document   max_lambda sum_d lambda_d (n_d - n*_d)
    per token      max_lambda sum_d lambda_d (n_d - n*_d) / sum_d lambda_d t_d

with ``n_d`` and ``n*_d`` the mean nats per document of the system and of the oracle on ``d`` and
``t_d`` the mean tokens per document. Both are attained at a single domain. The first is what the
certificate of a robust prior bounds, on the documents it was fitted on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from robustgate.game import BayesGate, bootstrap_worst_case
from robustgate.lm.corpus import Corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.modular import ModularModel
from robustgate.lm.results import DomainResult, Estimate, Evaluation, SystemResult
from robustgate.lm.score import score
from robustgate.lm.store import LogProbStore
from robustgate.lm.trace import trace_gate
from robustgate.ops import mixture_log_prob

ORACLE = "oracle expert"
STATIC = "static uniform mixture"
UNIFORM = "uniform Bayes mixture"
ROBUST = "robust Bayes mixture"

BASELINES = ("experts", "oracle", "static", "uniform")
"""Systems that ``evaluate`` compares with: all experts, the oracle expert, two mixtures."""


def evaluate(
    store: LogProbStore,
    prior: Tensor,  # [K]
    *,
    experts: Sequence[str],
    corpora: Sequence[str] | None = None,
    monoliths: Sequence[str] = (),
    baselines: Sequence[str] = BASELINES,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a prior over experts, and what it should be compared with, from a store.

    Intervals are those of ``robustgate.game.bootstrap_worst_case``: documents are resampled
    within each domain, and the oracle's choices ``k(d)`` stay as they are. Documents cut from one
    source are alike, which no resampling of documents can show.

    Args:
        store: Log-probabilities of all experts, and of the monoliths, on all corpora.
        prior: Prior over ``experts``, float ``[K]``, sums to 1.
        experts: Names in the store, in the order of ``prior``.
        corpora: Corpora to use as domains; all of the store when omitted.
        monoliths: Further models in the store, compared with but not part of any mixture.
        baselines: Which of ``BASELINES`` to compare with.

    Other:
        confidence: Coverage of the intervals.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        The evaluation, systems in the order experts, monoliths, oracle, static, uniform, robust.

    Raises:
        ValueError: ``prior`` and ``experts`` disagree, the store lacks an expert or a corpus, a
            baseline is unknown, a domain has fewer than two documents, or an expert rules out a
            document.

    Example:
        >>> evaluation = evaluate(store, gate.prior, experts=gate.experts)   # doctest: +SKIP
        >>> evaluation.system("robust Bayes mixture").worst_excess_per_document.value
        0.62

    Source: docs/theory.md, the robust prior.
    """
    _check(prior, experts, baselines)
    domains = tuple(store.corpora if corpora is None else corpora)
    systems = dict.fromkeys(experts, "expert") | dict.fromkeys(monoliths, "monolith")
    mixtures = (("static", STATIC), ("uniform", UNIFORM))
    systems |= {name: "baseline" for key, name in mixtures if key in baselines}
    systems |= {ROBUST: "robust", ORACLE: "oracle"}
    nll, best = [], []
    for domain in domains:
        column = _document_nll(store, domain, prior, experts, monoliths, "static" in baselines)
        best.append(min(experts, key=lambda name: float(column[name].sum())))
        column[ORACLE] = column[best[-1]]
        nll.append(column)
    tokens = [store.offsets(domain).diff().double() for domain in domains]  # D x [n_d]
    shown = {"expert": "experts" in baselines, "oracle": "oracle" in baselines}
    results = tuple(
        _result(name, kind, domains, nll, tokens, confidence, resamples, seed)
        for name, kind in systems.items()
        if shown.get(kind, True)
    )
    return Evaluation(domains, tuple(best), results, confidence, resamples, seed)


def evaluate_model(
    model: ModularModel,
    corpora: Sequence[Corpus],
    *,
    store: str | os.PathLike[str] | None = None,
    monolith: str | os.PathLike[str] | None = None,
    baselines: Sequence[str] = BASELINES,
    progress: bool = True,
) -> Evaluation:
    """Score a modular model on held-out documents, evaluate it, and keep the result with it.

    Args:
        model: The model.
        corpora: One corpus per domain, of documents that the model was not fitted on.
        store: Log-prob store to use and fill; ``scores`` in the model's folder when omitted.
        monolith: Checkpoint of one model trained on everything, to compare with.
        baselines: Which of ``BASELINES`` to compare with.

    Other:
        progress: Show bars for what takes longer than two seconds.

    Returns:
        The evaluation, also written to ``evaluation.json`` in the model's folder, with the gate's
        weights along a document of several domains in ``trace.json``.

    Raises:
        FileNotFoundError: A checkpoint is missing.
        ValueError: A checkpoint, a tokenizer or the store does not belong to the model.
    """
    experts = model.open_experts()
    place = model.path / "scores" if store is None else store
    filled = score(experts, corpora, place, progress=progress)
    if monolith is not None:
        score(ExpertSet.open({"monolith": monolith}), corpora, place, progress=progress)
    evaluation = evaluate(
        filled,
        model.prior,
        experts=experts.names,
        corpora=[corpus.name for corpus in corpora],
        monoliths=() if monolith is None else ("monolith",),
        baselines=baselines,
    )
    evaluation.save(model.path)
    trace = trace_gate(BayesGate(model.prior), experts, corpora, progress=progress)
    trace.save(model.path)
    return evaluation


def _document_nll(
    store: LogProbStore,
    corpus: str,
    prior: Tensor,  # [K]
    experts: Sequence[str],
    monoliths: Sequence[str],
    static: bool,
) -> dict[str, Tensor]:  # name -> [n] float64
    """Return the negative log-likelihood of every document under every system."""
    log_prob = store.document_log_probs(corpus, experts)  # [n, K]
    nll = {name: -log_prob[:, k] for k, name in enumerate(experts)}
    for name in monoliths:
        nll[name] = -store.document_log_probs(corpus, [name])[:, 0]
    uniform = torch.zeros(len(experts), dtype=torch.float64)
    nll[UNIFORM] = -mixture_log_prob(log_prob, uniform)
    nll[ROBUST] = -mixture_log_prob(log_prob, prior.double().log())
    if static:
        token = mixture_log_prob(store.token_log_probs(corpus, experts).double(), uniform)
        nll[STATIC] = -torch.segment_reduce(token, "sum", offsets=store.offsets(corpus))
    return nll


def _result(
    name: str,
    kind: str,
    domains: Sequence[str],
    nll: Sequence[Mapping[str, Tensor]],  # D x name -> [n_d]
    tokens: Sequence[Tensor],  # D x [n_d]
    confidence: float,
    resamples: int,
    seed: int,
) -> SystemResult:
    """Summarise one system."""
    results, per_document, per_token = [], {}, {}
    for domain, column, length in zip(domains, nll, tokens, strict=True):
        own = column[name]  # [n_d]
        excess = own - column[ORACLE]  # [n_d]
        rate = excess.sum() / length.sum()
        per_document[domain] = excess
        # A mean with the value of the ratio and, to first order, its sampling error.
        per_token[domain] = rate + (excess - rate * length) / length.mean()
        results.append(
            DomainResult(
                domain=domain,
                documents=len(length),
                tokens=int(length.sum()),
                nll_per_token=float(own.sum() / length.sum()),
                nll_per_document=float(own.mean()),
                perplexity=float((own.sum() / length.sum()).exp()),
                excess_per_token=float(rate),
                excess_per_document=float(excess.mean()),
            )
        )
    worst = max(results, key=lambda result: result.excess_per_document)
    intervals = [
        bootstrap_worst_case(losses, level=confidence, samples=resamples, seed=seed)
        for losses in (per_document, per_token)
    ]
    return SystemResult(
        name,
        kind,
        tuple(results),
        worst.domain,
        Estimate(worst.excess_per_document, *intervals[0]),
        Estimate(max(result.excess_per_token for result in results), *intervals[1]),
    )


def _check(prior: Tensor, experts: Sequence[str], baselines: Sequence[str]) -> None:
    if prior.shape != (len(experts),):
        raise ValueError(
            f"prior: expected shape [{len(experts)}], one weight per expert, "
            f"got {list(prior.shape)}"
        )
    if abs(float(prior.double().sum()) - 1) > 1e-6 or bool((prior < 0).any()):
        raise ValueError(f"prior: expected weights >= 0 with sum 1, got {prior.tolist()}")
    for baseline in baselines:
        if baseline not in BASELINES:
            raise ValueError(f"baselines: expected any of {', '.join(BASELINES)}, got {baseline!r}")
