"""Removals, known mixtures and topic switches, against plain computations."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scored import make_store, random_corpora

from robustgate.game import BayesGate
from robustgate.lm.evaluation.evaluate import evaluate
from robustgate.lm.evaluation.results import Evaluation
from robustgate.lm.evaluation.systems import ORACLE, PREVIOUS, ROBUST, SHARE, STATIC, UNIFORM
from robustgate.lm.store.batches import first_documents, read_batches

EXPERTS = ("a", "b", "c")
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

# Sums of about a hundred terms of size ten in two orders: 1e-13, relative to losses of size one.
CLOSE = 1e-12


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store", random_corpora(("x", "y"), experts=3), EXPERTS)


@pytest.fixture
def evaluation(store):
    return evaluate(store, PRIOR, experts=EXPERTS, resamples=2)


def test_forgetting_is_the_mixture_of_the_survivors(store, evaluation):
    found = evaluation.forgetting
    for d, domain in enumerate(evaluation.domains):
        log_probs = store.document_log_probs(domain, EXPERTS)
        tokens = int(store.offsets(domain)[-1])
        whole = -torch.logsumexp(log_probs + PRIOR.log(), dim=1).sum() / tokens
        assert found.whole[d] == pytest.approx(float(whole), rel=CLOSE)
        for k in range(3):
            left = [j for j in range(3) if j != k]
            prior = PRIOR[left] / PRIOR[left].sum()
            without = -torch.logsumexp(log_probs[:, left] + prior.log(), dim=1).sum() / tokens
            assert found.without[d][k] == pytest.approx(float(without), rel=CLOSE)


def test_forgetting_equals_an_evaluation_without_the_expert(store, evaluation):
    prior = PRIOR[[0, 2]] / (1 - PRIOR[1])
    smaller = evaluate(store, prior, experts=("a", "c"), resamples=2).system(ROBUST)
    for d, result in enumerate(smaller.domains):
        assert evaluation.forgetting.without[d][1] == pytest.approx(result.nll_per_token, rel=CLOSE)


def test_an_expert_with_all_the_weight_leaves_equal_shares(store):
    sure = evaluate(store, torch.tensor([1.0, 0.0, 0.0]), experts=EXPERTS, resamples=2)
    half = evaluate(store, torch.tensor([0.5, 0.5]), experts=("b", "c"), resamples=2)
    for d, result in enumerate(half.system(ROBUST).domains):
        assert sure.forgetting.without[d][0] == pytest.approx(result.nll_per_token, rel=CLOSE)


def test_documents_that_the_others_rule_out_are_infinite_and_plain_json(tmp_path):
    corpora = random_corpora(("x", "y"), experts=3)
    corpora["x"][1][0, 1:] = -math.inf
    store = make_store(tmp_path / "store", corpora, EXPERTS)
    found = evaluate(store, PRIOR, experts=EXPERTS, baselines=("oracle",), resamples=2)
    assert found.forgetting.without[0][0] == math.inf
    assert all(map(math.isfinite, (*found.forgetting.whole, *found.forgetting.without[1])))
    content = found.to_json()
    assert content["forgetting"]["without"][0][0] == "inf"
    json.dumps(content, allow_nan=False)
    found.save(tmp_path)
    assert Evaluation.load(tmp_path) == found


def test_a_single_expert_and_a_single_domain_leave_out_what_needs_two(store):
    alone = evaluate(store, torch.ones(1), experts=("a",), resamples=2)
    assert alone.forgetting is None
    assert alone.system(ROBUST).domains == alone.system(UNIFORM).domains
    single = evaluate(store, PRIOR, experts=EXPERTS, corpora=["x"], resamples=2)
    assert single.switch is None
    assert single.pairs == ()


def test_tuned_weights_are_the_best_on_a_grid(store, evaluation):
    (pair,) = evaluation.pairs
    log_probs = [store.document_log_probs(domain, EXPERTS) for domain in (pair.first, pair.second)]
    best = [float((-part).mean(dim=0).min()) for part in log_probs]
    steps = [i / 60 for i in range(61)]
    grid = torch.tensor(
        [(p, q, 1 - p - q) for p in steps for q in steps if p + q <= 1 + 1e-9], dtype=torch.float64
    ).clamp(min=0)
    losses = [
        -torch.logsumexp(part.unsqueeze(0) + grid.log().unsqueeze(1), dim=2).mean(dim=1) - own
        for part, own in zip(log_probs, best, strict=True)
    ]
    for share, tuned in zip(pair.shares, pair.tuned, strict=True):
        smallest = float(((1 - share) * losses[0] + share * losses[1]).min())
        # The solver's value lies within its tolerance of 1e-4 above the minimum; the grid, of
        # step 1/60, within 0.01 above it, the loss being smooth around an inner minimum.
        assert smallest - 0.01 <= tuned <= smallest + 1e-4
    assert (pair.shares[0], pair.shares[-1]) == (0, 1)
    assert max(pair.tuned) <= math.log(2) + 1e-4  # two fixed experts and a coin


def test_tuned_weights_go_below_the_oracle_where_documents_need_several_experts(tmp_path):
    # Each expert is sure of every other document of x, and of none of them otherwise: a coin costs
    # log 2 on each, a single expert 10 on half of them. On y both are the same.
    rows = torch.tensor([[0.0, -10.0], [-10.0, 0.0]]).repeat(5, 1)
    corpora = {"x": ([1] * 10, rows), "y": ([1] * 10, torch.full((10, 2), -1.0))}
    store = make_store(tmp_path / "store", corpora, ("k", "l"))
    evaluation = evaluate(store, torch.tensor([0.5, 0.5]), experts=("k", "l"), resamples=2)
    (pair,) = evaluation.pairs
    coin = math.log(2) - math.log1p(math.exp(-10)) - 5.0
    assert evaluation.system(ROBUST).domains[0].excess_per_document == pytest.approx(coin, rel=1e-6)
    for share, tuned in zip(pair.shares, pair.tuned, strict=True):
        assert tuned == pytest.approx((1 - share) * coin, abs=1e-4)  # what it is solved to


def test_pairs_of_many_domains_are_neighbours(tmp_path):
    domains = tuple("abcdefg")
    store = make_store(tmp_path / "s", random_corpora(domains, experts=2, documents=3), ("k", "l"))
    found = evaluate(store, torch.tensor([0.5, 0.5]), experts=("k", "l"), resamples=2).pairs
    assert {frozenset((pair.first, pair.second)) for pair in found} == {
        frozenset((one, two)) for one, two in zip(domains, domains[1:] + domains[:1], strict=True)
    }


def switched(store, d, e, i):
    """Rows of the i-th glued document and the length of its first half."""
    rows = []
    for domain, half in ((d, 0), (e, 1)):
        start, end = store.offsets(domain)[i : i + 2].tolist()
        own = store.token_log_probs(domain, EXPERTS)[start:end].double()
        middle = len(own) // 2
        rows.append(own[:middle] if half == 0 else own[len(own) - middle :])
    return torch.cat(rows), len(rows[0])


def test_topic_switch_glues_halves_and_gates_start_with_each_document(tmp_path):
    generator = torch.Generator().manual_seed(0)
    corpora = {name: ([4] * 20, -3 * torch.rand(80, 3, generator=generator)) for name in ("x", "y")}
    store = make_store(tmp_path / "s", corpora, EXPERTS)
    evaluation = evaluate(store, PRIOR, experts=EXPERTS, resamples=2)
    found = evaluation.switch
    assert found.documents == 40
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    gates = {
        UNIFORM: BayesGate(uniform),
        PREVIOUS: BayesGate(uniform, window=1),
        SHARE: BayesGate(uniform, share=0.01),
        ROBUST: BayesGate(PRIOR),
    }
    best = {d: EXPERTS.index(b) for d, b in zip("xy", evaluation.best_expert, strict=True)}
    for result in found.systems:
        before, after = [], []
        for d, e in (("x", "y"), ("y", "x")):
            for i in range(20):
                rows, middle = switched(store, d, e, i)
                if result.system == ORACLE:
                    loss = -torch.cat([rows[:middle, best[d]], rows[middle:, best[e]]])
                elif result.system == STATIC:
                    loss = -(rows.exp().mean(dim=1)).log()
                else:
                    loss = -gates[result.system].log_prob(rows)
                before.append(loss[:middle])
                after.append(loss[middle:])
        assert result.before == pytest.approx(float(torch.cat(before).mean()), rel=CLOSE)
        assert result.after == pytest.approx(float(torch.cat(after).mean()), rel=CLOSE)
    # Halves of two tokens reach into the bins on both sides of the switch at their near ends only.
    assert found.positions == (0,)
    assert {result.system for result in found.systems} == {ORACLE, STATIC, *gates}


def test_fixed_share_recovers_from_a_switch_and_bayes_does_not(tmp_path):
    # On x the first expert gives each token 1/2 and the others 1/8; on y the second does. Behind
    # the switch, after 64 tokens of evidence, Bayes follows the first expert for all 64 tokens.
    def rows(k):
        out = torch.full((8 * 128, 3), math.log(1 / 8))
        out[:, k] = math.log(1 / 2)
        return [128] * 8, out

    store = make_store(tmp_path / "s", {"x": rows(0), "y": rows(1)}, EXPERTS)
    found = evaluate(store, PRIOR, experts=EXPERTS, resamples=2).switch
    excess = {result.system: result.excess for result in found.systems}
    late = found.positions.index(48)
    # With at least 8 tokens of lead the right expert has weight 4^-8 = 1.5e-5 at most, and is four
    # times as good: 5e-5 nats.
    assert excess[UNIFORM][late] == pytest.approx(math.log(4), abs=5e-5)
    assert excess[SHARE][late] < 0.1
    assert found.positions[0] == -32
    assert all(value == 0 for value in excess[ORACLE])


def test_batches_are_the_corpus(tmp_path):
    lengths, rows = [3, 5, 2, 4], torch.arange(14.0).neg().unsqueeze(1)
    store = make_store(tmp_path / "s", {}, ())
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    store.add_corpus("x", sha256="x", offsets=offsets, window=8, stride=4, slice_tokens=6)
    store.add_expert("a", sha256="a")
    for shard in store.shards("a", "x"):
        shard.write(rows[shard.rows, 0].contiguous())
    batches = list(read_batches(store, "x", ["a"]))
    assert len(batches) == 2
    assert torch.equal(torch.cat([batch.log_probs for batch in batches]), rows)
    assert torch.equal(torch.cat([batch.offsets.diff() for batch in batches]), offsets.diff())
    assert torch.equal(
        torch.cat([batch.sum(batch.log_probs) for batch in batches]),
        store.document_log_probs("x", ["a"]),
    )
    three = first_documents(store, "x", ["a"], 3)
    assert three.offsets.tolist() == [0, 3, 8, 10]
    assert torch.equal(three.log_probs, rows[:10])
    assert first_documents(store, "x", ["a"], 99).offsets.tolist() == offsets.tolist()
    next(iter((tmp_path / "s" / "shards" / "a" / "x").iterdir())).unlink()
    with pytest.raises(ValueError, match=r"score a on corpus 'x' again"):
        list(read_batches(store, "x", ["a"]))


def test_evaluation_does_not_depend_on_the_slices(tmp_path):
    corpora = random_corpora(("x", "y"), experts=3)
    whole = make_store(tmp_path / "whole", corpora, EXPERTS)
    cut = make_store(tmp_path / "cut", {}, ())
    for name, (lengths, rows) in corpora.items():
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        cut.add_corpus(name, sha256=name, offsets=offsets, window=8, stride=4, slice_tokens=5)
        for k, expert in enumerate(EXPERTS):
            cut.add_expert(expert, sha256=expert)
            for shard in cut.shards(expert, name):
                shard.write(rows[shard.rows, k].contiguous())
    one = evaluate(whole, PRIOR, experts=EXPERTS, resamples=2)
    two = evaluate(cut, PRIOR, experts=EXPERTS, resamples=2)
    assert one.switch == two.switch
    for own, other in zip(one.systems, two.systems, strict=True):
        for d, e in zip(own.domains, other.domains, strict=True):
            assert d.nll_per_token == pytest.approx(e.nll_per_token, rel=CLOSE)
