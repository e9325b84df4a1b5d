"""Evaluation: every number against a plain computation."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from scored import make_store, random_corpora

from robustgate.console import evaluation_tables
from robustgate.game import cached_prior
from robustgate.lm.evaluation.evaluate import evaluate
from robustgate.lm.evaluation.results import Evaluation
from robustgate.lm.evaluation.systems import (
    BASELINES,
    CACHED,
    ORACLE,
    PER_DOCUMENT,
    PER_TOKEN,
    PREVIOUS,
    ROBUST,
    SHARE,
    SOUP,
    STATIC,
    UNIFORM,
    UPDATING,
)

EXPERTS = ("a", "b", "c")
DOMAINS = ("x", "y")
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


@pytest.fixture
def corpora():
    return random_corpora(DOMAINS, experts=4)  # three experts and a monolith


@pytest.fixture
def evaluation(tmp_path, corpora):
    store = make_store(tmp_path / "store", corpora, (*EXPERTS, "monolith"))
    return evaluate(
        store,
        PRIOR,
        experts=EXPERTS,
        monoliths=("monolith",),
        development=store,
        text_bytes={"x": 100, "y": 200},
        resamples=20,
    )


def plain_gate(rows, prior, *, share=0.0, window=None):
    """Loss of a document under a Bayes gate, token by token in plain Python floats."""
    weights, loss, seen = list(prior), 0.0, []
    for row in rows:
        loss -= math.log(sum(w * math.exp(v) for w, v in zip(weights, row, strict=True)))
        seen = [*seen, row] if window is None else [*seen, row][-window:]
        if window is None:
            after = [w * math.exp(v) for w, v in zip(weights, row, strict=True)]
        else:
            after = [w * math.exp(sum(past[k] for past in seen)) for k, w in enumerate(prior)]
        total = sum(after)
        weights = [(1 - share) * w / total + share * p for w, p in zip(after, prior, strict=True)]
    return loss


def plain_document_nll(lengths, log_probs, system):
    """Document losses in plain Python floats."""
    out, start, moving = [], 0, None
    uniform = [1 / 3] * 3
    for length in lengths:
        rows = [[float(v) for v in row] for row in log_probs[start : start + length]]
        start += length
        totals = [sum(column) for column in zip(*rows, strict=True)][:3]
        rows, monolith = [row[:3] for row in rows], -sum(row[3] for row in rows)
        if system == STATIC:
            loss = -sum(math.log(sum(map(math.exp, row)) / 3) for row in rows)
        elif system in (UNIFORM, ROBUST):
            loss = plain_gate(rows, uniform if system == UNIFORM else PRIOR.tolist())
        elif system == PREVIOUS:
            loss = plain_gate(rows, uniform, window=1)
        elif system == SHARE:
            loss = plain_gate(rows, uniform, share=0.01)
        elif system == UPDATING:
            prior = uniform if moving is None else moving
            loss = plain_gate(rows, prior)
            after = [w * math.exp(t) for w, t in zip(prior, totals, strict=True)]
            after = [w / sum(after) for w in after]
            pairs = zip(after if moving is None else moving, after, strict=True)
            moving = [0.7 * old + 0.3 * new for old, new in pairs]
        elif system == "monolith":
            loss = monolith
        elif system == PER_DOCUMENT:
            loss = -max(totals)
        elif system == PER_TOKEN:
            loss = -sum(map(max, rows))
        else:
            loss = -totals[EXPERTS.index(system)]
        out.append(loss)
    return out


# Two orders of double-precision summation of about a hundred terms of size ten differ by at most
# 100 * 10 * 2^-53 = 1e-13 relative to losses of size one.
CLOSE = 1e-12


@pytest.mark.parametrize(
    "system",
    [
        *(*EXPERTS, "monolith", STATIC, PREVIOUS, UNIFORM, UPDATING, SHARE, ROBUST),
        *(PER_DOCUMENT, PER_TOKEN),
    ],
)
def test_losses_equal_a_plain_computation(evaluation, corpora, system):
    result = evaluation.system(system)
    for domain in result.domains:
        lengths, log_probs = corpora[domain.domain]
        losses = plain_document_nll(lengths, log_probs, system)
        assert domain.documents == len(lengths)
        assert domain.tokens == sum(lengths)
        assert domain.nll_per_document == pytest.approx(sum(losses) / len(losses), rel=CLOSE)
        assert domain.nll_per_token == pytest.approx(sum(losses) / sum(lengths), rel=CLOSE)
        assert domain.perplexity == pytest.approx(math.exp(domain.nll_per_token), rel=CLOSE)
        rates = [loss / length for loss, length in zip(losses, lengths, strict=True)]
        assert domain.nll_document_weighted == pytest.approx(sum(rates) / len(rates), rel=CLOSE)
        bits = sum(losses) / math.log(2) / {"x": 100, "y": 200}[domain.domain]
        assert domain.bits_per_byte == pytest.approx(bits, rel=CLOSE)


def test_oracle_is_the_best_expert_of_each_domain_and_the_zero_of_the_excess(evaluation):
    oracle = evaluation.system(ORACLE)
    for d, (domain, best) in enumerate(zip(oracle.domains, evaluation.best_expert, strict=True)):
        losses = {name: evaluation.system(name).domains[d].nll_per_document for name in EXPERTS}
        assert best == min(losses, key=losses.__getitem__)
        assert domain.nll_per_document == losses[best]
        assert domain.excess_per_document == domain.excess_per_token == 0
    assert oracle.worst_excess_per_document.value == oracle.worst_excess_per_document.upper == 0


def test_worst_case_is_the_maximum_over_mixtures_of_domains(evaluation):
    oracle = evaluation.system(ORACLE)
    for system in evaluation.systems:
        per_document, per_token = [], []
        for lam in (i / 50 for i in range(51)):  # a grid that holds both vertices
            shares = (lam, 1 - lam)
            nats, length = 0.0, 0.0
            for share, own, best in zip(shares, system.domains, oracle.domains, strict=True):
                nats += share * (own.nll_per_document - best.nll_per_document)
                length += share * own.tokens / own.documents
            per_document.append(nats)
            per_token.append(nats / length)
        assert system.worst_excess_per_document.value == pytest.approx(
            max(per_document), rel=1e-9, abs=CLOSE
        )
        assert system.worst_excess_per_token.value == pytest.approx(
            max(per_token), rel=1e-9, abs=CLOSE
        )
        worst = max(system.domains, key=lambda result: result.excess_per_document)
        assert system.worst_domain == worst.domain


def test_bayes_mixture_loses_at_most_minus_log_prior_against_every_expert(evaluation):
    robust = evaluation.system(ROBUST)
    for k, name in enumerate(EXPERTS):
        for own, expert in zip(robust.domains, evaluation.system(name).domains, strict=True):
            regret = own.nll_per_document - expert.nll_per_document
            assert regret <= -math.log(PRIOR[k]) + CLOSE


def test_baselines_choose_the_systems(tmp_path, corpora):
    store = make_store(tmp_path / "store", corpora, (*EXPERTS, "monolith"))
    alone = evaluate(store, PRIOR, experts=EXPERTS, baselines=(), resamples=2)
    assert [system.name for system in alone.systems] == [ROBUST]
    some = evaluate(store, PRIOR, experts=EXPERTS, baselines=("oracle", "static"), resamples=2)
    assert [system.name for system in some.systems] == [STATIC, ROBUST, ORACLE]
    everything = evaluate(store, PRIOR, experts=EXPERTS, resamples=2)
    assert {system.kind for system in everything.systems} == {
        "expert",
        "baseline",
        "robust",
        "oracle",
        "bound",
    }
    assert everything.system(ROBUST).domains == alone.system(ROBUST).domains
    assert {system.name for system in everything.systems} == {
        *EXPERTS,
        *(name for names in BASELINES.values() for name in names),
        ROBUST,
    } - {"expert", CACHED, SOUP}
    assert any("cached prior is left out" in note for note in everything.notes)


def test_prior_of_zero_for_an_expert_is_that_mixture_without_it(tmp_path, corpora):
    store = make_store(tmp_path / "store", corpora, (*EXPERTS, "monolith"))
    one = evaluate(store, torch.tensor([0.0, 1.0, 0.0]), experts=EXPERTS, resamples=2)
    robust, expert = one.system(ROBUST), one.system("b")
    for own, other in zip(robust.domains, expert.domains, strict=True):
        assert own.nll_per_document == pytest.approx(other.nll_per_document, rel=CLOSE)


def test_survives_a_trip_through_its_file(tmp_path, evaluation):
    evaluation.save(tmp_path)
    assert Evaluation.load(tmp_path) == evaluation
    assert json.loads(json.dumps(evaluation.to_json()))["domains"] == list(DOMAINS)


def test_missing_and_damaged_evaluations_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="robustgate evaluate"):
        Evaluation.load(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"domains": []}')
    with pytest.raises(ValueError, match=r"version 1, but .* version 2; evaluate again"):
        Evaluation.load(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"version": 2, "domains": []}')
    with pytest.raises(ValueError, match=r"damaged .*missing.*; evaluate again"):
        Evaluation.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("domains", ["x", 1]), ("domains", "xy"), ("seed", "0"), ("systems", [{}]), ("ours", True)],
)
def test_a_field_of_another_type_is_damage(tmp_path, evaluation, field, value):
    data = json.loads(json.dumps(evaluation.to_json())) | {field: value}
    (tmp_path / "evaluation.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="damaged"):
        Evaluation.load(tmp_path)


@pytest.mark.parametrize(
    ("prior", "baselines", "message"),
    [
        (torch.ones(2) / 2, BASELINES, r"prior: expected shape \[3\]"),
        (torch.ones(3), BASELINES, "prior: expected weights >= 0 with sum 1"),
        (torch.tensor([1.5, -0.5, 0.0]), BASELINES, "prior: expected weights >= 0"),
        (PRIOR, ("monolith",), "baselines: expected any of"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path, corpora, prior, baselines, message):
    store = make_store(tmp_path / "store", corpora, (*EXPERTS, "monolith"))
    with pytest.raises(ValueError, match=message):
        evaluate(store, prior, experts=EXPERTS, baselines=baselines)


def test_unknown_expert_and_system_are_named(tmp_path, corpora, evaluation):
    store = make_store(tmp_path / "other", corpora, (*EXPERTS, "monolith"))
    with pytest.raises(ValueError, match="nobody"):
        evaluate(store, PRIOR, experts=("a", "b", "nobody"))
    with pytest.raises(ValueError, match=r"no system named 'nobody'; there are a, b, c"):
        evaluation.system("nobody")


def test_interval_per_token_has_the_error_of_a_ratio(tmp_path):
    # Per token the estimate is a ratio of sums; its bootstrap, done plainly here, is the reference.
    lengths = [2, 9, 4, 7, 3, 8, 5, 6] * 40
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.rand(sum(lengths), 2, generator=generator) * torch.tensor([-0.1, -2.0])
    store = make_store(tmp_path / "store", {"x": (lengths, log_probs)}, ("a", "b"))
    result = evaluate(store, torch.tensor([0.5, 0.5]), experts=("a", "b"), resamples=4000)
    excess = (store.document_log_probs("x", ["a"]) - store.document_log_probs("x", ["b"]))[:, 0]
    tokens = torch.tensor(lengths).double()
    draws = torch.randint(len(lengths), (4000, len(lengths)), generator=generator)
    ratios = excess[draws].sum(dim=1) / tokens[draws].sum(dim=1)
    half = float(ratios.std()) * 1.96
    estimate = result.system("b").worst_excess_per_token
    assert estimate.value == pytest.approx(float(excess.sum() / tokens.sum()), rel=1e-6)
    # Standard error of a 95 % quantile from 4000 draws: 4 % of the half-width; of the standard
    # deviation: 1 %. Four standard errors are 16 %.
    assert estimate.upper - estimate.value == pytest.approx(half, rel=0.16)
    assert estimate.value - estimate.lower == pytest.approx(half, rel=0.16)


def test_cached_prior_comes_from_the_first_hundred_development_documents(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = [3] * 130
    seen = -torch.rand(sum(lengths), 2, generator=generator)
    seen[300:, 0] -= 5.0  # behind the hundredth document the first expert is hopeless
    store = make_store(tmp_path / "dev", {"x": (lengths, seen)}, ("a", "b"))
    test = make_store(tmp_path / "test", {"x": ([2, 2], seen[:4])}, ("a", "b"))
    result = evaluate(
        test, PRIOR[:2] / PRIOR[:2].sum(), experts=("a", "b"), development=store, resamples=2
    )
    prior = cached_prior(store.document_log_probs("x", ["a", "b"])[:100])
    expected = -torch.logsumexp(test.document_log_probs("x", ["a", "b"]) + prior.log(), dim=1)
    own = result.system(CACHED)
    assert own.domains[0].nll_per_document == pytest.approx(float(expected.mean()), rel=CLOSE)
    assert not own.fair
    assert any("told the domain" in note for note in result.notes)


def test_documents_that_are_judged_and_estimated_from_are_named(evaluation):
    (note,) = (note for note in evaluation.notes if "cached" in note)
    assert note.endswith("which for x, y are those it is judged on.")  # one store for both


def test_development_scores_of_another_checkpoint_are_refused(tmp_path, corpora):
    store = make_store(tmp_path / "store", corpora, (*EXPERTS, "monolith"))
    other = make_store(tmp_path / "other", corpora, ("a", "b", "other", "monolith"))
    other.add_expert("c", sha256="sha of another c")
    with pytest.raises(ValueError, match=r"development: expert 'c' of .* is another checkpoint"):
        evaluate(store, PRIOR, experts=EXPERTS, development=other)


def test_a_system_that_rules_out_a_document_is_named(tmp_path, corpora):
    lengths, log_probs = corpora["x"]
    log_probs[lengths[0], 1] = -math.inf  # the first token of document 1
    store = make_store(tmp_path / "store", corpora, (*EXPERTS, "monolith"))
    with pytest.raises(ValueError, match=r"b: .* it gives document 1 of 'x' probability 0"):
        evaluate(store, PRIOR, experts=EXPERTS)
    named = [baseline for baseline in BASELINES if baseline != "experts"]
    evaluation = evaluate(store, PRIOR, experts=EXPERTS, baselines=named, resamples=2)
    assert all(math.isfinite(system.mean_nll_per_token) for system in evaluation.systems)


def test_fair_systems_know_nothing_but_the_text(evaluation):
    told = {system.name for system in evaluation.systems if not system.fair}
    assert told == {ORACLE, CACHED, UPDATING, PER_DOCUMENT, PER_TOKEN}


def test_mixtures_of_two_domains_follow_from_the_domains(evaluation):
    for name in (ROBUST, STATIC, "a"):
        one, two = evaluation.system(name).domains
        assert evaluation.on_pair(name, "x", "y", 0) == pytest.approx(one.nll_per_token)
        assert evaluation.on_pair(name, "x", "y", 1) == pytest.approx(two.nll_per_token)
        nats = 0.75 * one.nll_per_document + 0.25 * two.nll_per_document
        length = 0.75 * one.tokens / one.documents + 0.25 * two.tokens / two.documents
        assert evaluation.on_pair(name, "x", "y", 0.25) == pytest.approx(nats / length)


def test_tables_for_a_terminal_hold_every_system_and_the_notes(evaluation):
    console = Console(record=True, width=200, file=io.StringIO())
    noted = replace(evaluation, notes=("a [note] with brackets",))
    for part in evaluation_tables(noted):
        console.print(part)
    text = console.export_text()
    for system in evaluation.systems:
        assert text.count(f" {system.label} ") == 2
        assert f"{system.mean_nll_per_token:.3f}" in text
    assert "a [note] with brackets" in text


def test_one_document_has_no_interval_and_is_refused(tmp_path):
    corpora = {"x": ([3], torch.full((3, 2), -1.0))}
    store = make_store(tmp_path / "store", corpora, ("a", "b"))
    with pytest.raises(ValueError, match="'x'"):
        evaluate(store, torch.tensor([0.5, 0.5]), experts=("a", "b"))


def test_two_evaluations_are_equal(tmp_path, corpora):
    store = make_store(tmp_path / "store", corpora, (*EXPERTS, "monolith"))
    assert evaluate(store, PRIOR, experts=EXPERTS) == evaluate(store, PRIOR, experts=EXPERTS)
