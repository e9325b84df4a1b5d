"""Evaluation from the log-prob store: every expert and every mixture, on every domain.

No model runs over the documents once they are scored; ``robustgate.lm.evaluation.systems`` lists
who is compared. The *worst-case excess* of a system is its largest excess over the oracle expert
when documents come from a mixture of the domains, over all mixtures ``lambda``:

    per document   max_lambda sum_d lambda_d (n_d - n*_d)
    per token      max_lambda sum_d lambda_d (n_d - n*_d) / sum_d lambda_d t_d

with ``n_d`` and ``n*_d`` the mean nats per document of the system and of the oracle on ``d`` and
``t_d`` the mean tokens per document. Both are attained at a single domain. The first is what the
certificate of a robust prior bounds, on the documents it was fitted on. A gate that acts token by
token can go below the oracle; then its excess is negative.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from robustgate.game import BayesGate
from robustgate.lm.corpus import Corpus
from robustgate.lm.evaluation.conflict import expert_divergence, monolith_conflict
from robustgate.lm.evaluation.results import Evaluation
from robustgate.lm.evaluation.soup import architectures_differ, average_weights
from robustgate.lm.evaluation.studies import forgetting, pair_curves
from robustgate.lm.evaluation.summary import summarise
from robustgate.lm.evaluation.switch import topic_switch
from robustgate.lm.evaluation.systems import (
    BASELINES,
    SOUP,
    Contest,
    domain_losses,
    gate_name,
)
from robustgate.lm.evaluation.trace import trace_gate
from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import remove_abandoned, scratch_folder
from robustgate.lm.gates.spec import Gate, GateSpec
from robustgate.lm.modular import ModularModel
from robustgate.lm.scoring.score import score
from robustgate.lm.store.log_probs import LogProbStore

_SOUP = "soup"
"""Name of the weight average in the store."""


def evaluate(
    store: LogProbStore,
    prior: Tensor,  # [K]
    *,
    experts: Sequence[str],
    corpora: Sequence[str] | None = None,
    gate: Gate | None = None,
    spec: GateSpec | None = None,
    log_normaliser: float = 0.0,
    distilled: bool = False,
    monoliths: Sequence[str] = (),
    soup: str | None = None,
    baselines: Sequence[str] = tuple(BASELINES),
    development: LogProbStore | None = None,
    text_bytes: Mapping[str, int] | None = None,
    share: float = 0.01,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a gate over experts, and what it should be compared with, from a store.

    Intervals are those of ``robustgate.game.bootstrap_worst_case``: documents are resampled
    within each domain, and the oracle's choices ``k(d)``, made on these same documents, stay as
    they are. Documents cut from one source are alike, which no resampling of documents can show.
    Memory is that of one slice of the store and of a few numbers per document.

    Args:
        store: Log-probabilities of all experts, and of the other models, on all corpora.
        prior: Certified prior over ``experts``, float ``[K]``, sums to 1.
        experts: Names in the store, in the order of ``prior``.
        corpora: Corpora to use as domains; all of the store when omitted.
        gate: The model's gate; the Bayes gate of ``prior`` when omitted.
        spec: What ``gate`` is made of; needed with it.
        monoliths: Further models in the store, compared with but not part of any mixture.
        soup: Name in the store of the experts' weight average.
        baselines: Which of ``BASELINES`` to compare with.
        development: Other documents of the same domains, for the cached prior; left out without.
        text_bytes: UTF-8 bytes of every corpus's text, for bits per byte.

    Other:
        log_normaliser: ``log Z_g`` of a sequence gate.
        distilled: Whether a token gate was distilled, for its name.
        share: Of the fixed-share mixture.
        confidence: Coverage of the intervals.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        The evaluation, systems in the order experts, monoliths, soup, baselines, robust, oracle,
        bounds.

    Raises:
        ValueError: ``prior`` and ``experts`` disagree, the store lacks an expert or a corpus, a
            baseline is unknown, ``development`` is of other experts, a domain has fewer than two
            documents, or a system gives a document probability 0.

    Example:
        >>> evaluation = evaluate(store, gate.prior, experts=gate.experts)   # doctest: +SKIP
        >>> evaluation.system("robust Bayes mixture").worst_excess_per_document.value
        0.62

    Source: docs/theory.md, the robust prior.
    """
    _check_prior(prior, experts)
    _check_baselines(baselines)
    if (gate is None) != (spec is None):
        raise ValueError("gate, spec: expected both or neither, got one")
    made = GateSpec() if spec is None else spec
    weights = prior.double()
    others = {name: name for name in monoliths} | ({} if soup is None else {soup: SOUP})
    contest = Contest(
        store,
        tuple(experts),
        weights,
        BayesGate(weights) if gate is None else gate,
        made,
        log_normaliser,
        gate_name(made, distilled=distilled),
        others,
        baselines,
        development,
        share,
    )
    domains = tuple(store.corpora if corpora is None else corpora)
    if development is not None:
        _check_development(development, store, experts)
    losses = [domain_losses(contest, domain) for domain in domains]
    best = {own.domain: own.best for own in losses}
    return Evaluation(
        domains=domains,
        experts=contest.experts,
        best_expert=tuple(best.values()),
        ours=contest.ours,
        systems=tuple(
            summarise(name, kind, losses, text_bytes, confidence, resamples, seed)
            for name, kind in contest.kinds().items()
        ),
        pairs=pair_curves(losses) if len(domains) > 1 else (),
        forgetting=forgetting(contest.experts, weights, losses),
        switch=topic_switch(contest, domains, best),
        divergence=None,
        conflict=None,
        notes=_notes(contest, domains),
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def evaluate_model(
    model: ModularModel,
    corpora: Sequence[Corpus],
    *,
    store: str | os.PathLike[str] | None = None,
    monolith: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    soup: bool = True,
    baselines: Sequence[str] = tuple(BASELINES),
    development: str | os.PathLike[str] | LogProbStore | None = None,
    divergence_tokens: int = 256,
    gradients: bool = False,
    share: float = 0.01,
    progress: bool = True,
) -> Evaluation:
    """Score a modular model on held-out documents, evaluate it, and keep the result with it.

    Args:
        model: The model, with a gate of any kind.
        corpora: One corpus per domain, of documents that the model was not fitted on.
        store: Log-prob store to use and fill; ``scores`` in the model's folder when omitted.
        monolith: Checkpoint of one model trained on everything, or several by name.
        soup: Whether to average the experts' weights and score the result, if ``baselines`` names
            it and the experts have one architecture.
        baselines: Which of ``BASELINES`` to compare with.
        development: Scores of other documents of the same domains, such as those the model was
            fitted on; the cached prior is estimated from them and left out without.

    Other:
        divergence_tokens: Tokens of each domain on which the experts run to measure how far they
            are apart; 0 for not at all.
        gradients: Whether to measure the conflict of the first monolith's gradients.
        share: Of the fixed-share mixture.
        progress: Show bars for what takes longer than two seconds.

    Returns:
        The evaluation, also written to ``evaluation.json`` in the model's folder, with the gate's
        weights along a document of several domains in ``trace.json``.

    Raises:
        FileNotFoundError: A checkpoint is missing.
        ValueError: A checkpoint, a tokenizer or the store does not belong to the model, or a
            monolith has the name of an expert.
    """
    _check_baselines(baselines)
    remove_abandoned(model.path)
    experts = model.open_experts()
    if development is not None and not isinstance(development, LogProbStore):
        development = LogProbStore.open(development)
    place = model.path / "scores" if store is None else store
    filled = score(experts, corpora, place, features=model.features, progress=progress)
    rivals = _monoliths(monolith, experts)
    for rival in rivals.values():
        score(rival, corpora, filled.path, compared={}, progress=progress)
    averaged = "soup" in baselines and soup and len(experts) > 1
    difference = _why_no_soup(experts) if averaged else None
    if averaged and difference is None:
        difference = _score_soup(experts, corpora, filled, model.path, progress)
    training = model.training
    evaluation = evaluate(
        filled,
        model.prior,
        experts=experts.names,
        corpora=[corpus.name for corpus in corpora],
        gate=model.gate(),
        spec=model.spec,
        log_normaliser=0.0
        if training is None or training.normaliser is None
        else math.log(max(training.normaliser[0], 1.0)),  # below 1, what is missing is nowhere
        distilled=training is not None and training.gap is not None,
        monoliths=tuple(rivals),
        soup=_SOUP if averaged and difference is None else None,
        baselines=baselines,
        development=development,
        text_bytes={
            corpus.name: sum(len(document.encode()) for document in corpus.documents)
            for corpus in corpora
        },
        share=share,
    )
    if difference is not None:
        left_out = f"The weight-averaged soup is left out: {difference}."
        evaluation = replace(evaluation, notes=(*evaluation.notes, left_out))
    if divergence_tokens and len(experts) > 1:
        found = expert_divergence(experts, corpora, tokens=divergence_tokens)
        evaluation = replace(evaluation, divergence=found)
    if gradients and rivals:
        first = next(iter(rivals.values()))
        evaluation = replace(evaluation, conflict=monolith_conflict(first, corpora))
    evaluation.save(model.path)
    trace_gate(model, experts, corpora, progress=progress).save(model.path)
    return evaluation


def _monoliths(
    given: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None,
    experts: ExpertSet,
) -> dict[str, ExpertSet]:
    """Open the monoliths, each as a set of its own."""
    named = given if isinstance(given, Mapping) else {} if given is None else {"monolith": given}
    for name in named:
        if name in experts.names or name == _SOUP:
            raise ValueError(f"monolith: {name!r} is the name of another model; choose another")
    return {name: ExpertSet.open({name: path}) for name, path in named.items()}


def _why_no_soup(experts: ExpertSet) -> str | None:
    """Return why the experts' weight average cannot be scored, or ``None`` if it can."""
    if _SOUP in experts.names:  # the store would confuse the two
        return f"an expert is called {_SOUP!r}, as it would be"
    return architectures_differ(experts)


def _score_soup(
    experts: ExpertSet,
    corpora: Sequence[Corpus],
    store: LogProbStore,
    folder: Path,
    progress: bool,
) -> str | None:
    """Average the experts' weights and score the result; the checkpoint is not kept.

    Returns why it was not scored, or ``None`` if it was.
    """
    with scratch_folder(folder / _SOUP) as scratch:
        mixed = ExpertSet.open({_SOUP: average_weights(experts, scratch / _SOUP)})
        if _SOUP in store.experts and store.expert_sha256(_SOUP) != mixed.sha256(_SOUP):
            if _SOUP not in store.compared:
                return f"{store.path} holds an expert called {_SOUP!r}, as it would be"
            store.remove_expert(_SOUP)  # the average of other experts
        members = {name: experts.sha256(name) for name in experts.names}
        score(mixed, corpora, store.path, compared=members, progress=progress)
    return None


def _notes(contest: Contest, domains: Sequence[str]) -> tuple[str, ...]:
    """Say what single systems are, and what was left out."""
    notes = []
    if SOUP in contest.kinds():
        notes.append(
            "The weight-averaged soup is one model and carries every expert's data in every "
            "parameter: it has no opt-out guarantee."
        )
    if "cached" in contest.baselines:
        notes.append(_note_on_cached_prior(contest, domains))
    if "updating" in contest.baselines:
        notes.append(
            "The updating prior reads each domain's documents one after the other, which tells it "
            "the domain after a few of them; mixed traffic would not."
        )
    if contest.spec.kind == "sequence":
        z = math.exp(contest.log_normaliser)
        notes.append(
            "The sequence gate reads a document before it weighs the experts on it: a score, not "
            f"a causal model. Its probabilities are divided by its normaliser, Z = {z:.4f}."
        )
    return tuple(notes)


def _note_on_cached_prior(contest: Contest, domains: Sequence[str]) -> str:
    if contest.development is None:
        return "The cached prior is left out: it needs scores of other documents of each domain."
    same = [
        domain
        for domain in domains
        if contest.development.corpus(domain).sha256 == contest.store.corpus(domain).sha256
    ]
    told = "The cached prior is told the domain: it is estimated from"
    if not same:
        return f"{told} other documents of it."
    return f"{told} documents of it, which for {', '.join(same)} are those it is judged on."


def _check_development(
    development: LogProbStore, store: LogProbStore, experts: Sequence[str]
) -> None:
    for name in experts:
        if development.expert_sha256(name) != store.expert_sha256(name):
            raise ValueError(
                f"development: expert {name!r} of {development.path} is another checkpoint than "
                f"that of {store.path}; score it again"
            )


def _check_baselines(baselines: Sequence[str]) -> None:
    for baseline in baselines:
        if baseline not in BASELINES:
            raise ValueError(f"baselines: expected any of {', '.join(BASELINES)}, got {baseline!r}")


def _check_prior(prior: Tensor, experts: Sequence[str]) -> None:
    if prior.shape != (len(experts),):
        raise ValueError(
            f"prior: expected shape [{len(experts)}], one weight per expert, "
            f"got {list(prior.shape)}"
        )
    if abs(float(prior.double().sum()) - 1) > 1e-6 or bool((prior < 0).any()):
        raise ValueError(f"prior: expected weights >= 0 with sum 1, got {prior.tolist()}")
