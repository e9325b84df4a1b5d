"""Features: the numbers they are named after, known before the token, the same from the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustgate.lm.corpus import Corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.scoring.score import score
from robustgate.lm.store.features import FeatureSpec, context_features
from robustgate.lm.store.log_probs import LogProbStore
from robustgate.lm.tokenizer import encode

from .conftest import tree

Corpora = tuple[Corpus, Corpus]
ALL = FeatureSpec(entropy=True, top=True, agreement=True, jsd=True, hidden=3)
SMALL = {"batch_tokens": 128, "slice_tokens": 300, "device": "cpu", "progress": False}


def reference(logits: list[Tensor], vocab_size: int) -> Tensor:
    """Return entropy, top, agreement and JSD in float64, one after the other."""
    log_p = torch.stack([z[..., :vocab_size].double().log_softmax(-1) for z in logits])
    p, count = log_p.exp(), len(logits)
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)  # [K, ...]
    mean = p.mean(0)
    jsd = -torch.where(mean > 0, mean * mean.log(), 0.0).sum(-1) - entropy.mean(0)
    best = [z[..., :vocab_size].argmax(-1) for z in logits]
    agree = [(best[i] == best[j]).double() for i in range(count) for j in range(i + 1, count)]
    return torch.stack([*entropy, *log_p.amax(-1), *agree, jsd], dim=-1)


def test_values_and_order() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = [4 * torch.randn(7, 5, 50 + pad, generator=generator) for pad in (0, 3, 14)]
    logits[1][..., 50:] = float("nan")  # padding is never read
    logits[2][0, 0, :20] = -float("inf")
    spec = FeatureSpec(entropy=True, top=True, agreement=True, jsd=True)
    got = context_features(spec, logits, vocab_size=50)
    assert (got.dtype, got.shape) == (torch.float32, (7, 5, spec.width(3)))
    # float32 sums of 50 terms below 5: 50 * 5 * 2^-24 < 2e-5; the JSD's are differences of them.
    torch.testing.assert_close(got.double(), reference(logits, 50), rtol=0, atol=4e-5)
    for name in ("entropy", "top", "agreement", "jsd"):
        alone = context_features(FeatureSpec(**{name: True}), logits, vocab_size=50)
        start = {"entropy": 0, "top": 3, "agreement": 6, "jsd": 9}[name]
        assert torch.equal(alone, got[..., start : start + alone.shape[-1]])


def test_hidden_is_a_fixed_projection() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = [torch.zeros(4, 8)] * 2
    hidden = [torch.randn(4, 16, generator=generator), torch.randn(4, 24, generator=generator)]
    spec = FeatureSpec(hidden=3)
    got = context_features(spec, logits, hidden, vocab_size=8)
    assert got.shape == (4, 6)
    assert torch.equal(got, context_features(spec, logits, hidden, vocab_size=8))
    swapped = context_features(spec, logits, hidden[::-1], vocab_size=8)
    assert torch.equal(swapped, got[:, [3, 4, 5, 0, 1, 2]])  # the place does not enter
    double = context_features(spec, logits, [2 * part for part in hidden], vocab_size=8)
    assert torch.equal(double, 2 * got)
    wide = torch.randn(2000, 64, generator=generator)
    projected = context_features(
        FeatureSpec(hidden=8), [torch.zeros(2000, 8)], [wide], vocab_size=8
    )
    # Unit scale is kept: the mean of 64 * 8 squared normals / 64 has deviation sqrt(2 / 512).
    assert abs(float(projected.square().mean()) - 1.0) < 4 * (2 / 512) ** 0.5
    for wrong in (None, hidden[:1]):
        with pytest.raises(ValueError, match="hidden: expected one for each of 2 experts"):
            context_features(spec, logits, wrong, vocab_size=8)


def test_identical_experts_do_not_diverge_and_always_agree() -> None:
    logits = torch.randn(6, 30, dtype=torch.bfloat16)
    features = context_features(
        FeatureSpec(agreement=True, jsd=True), [logits, logits.float()], vocab_size=30
    )
    assert features.tolist() == [[1.0, 0.0]] * 6


def test_a_spec_is_text_and_json() -> None:
    assert FeatureSpec.parse("entropy,top, agreement,jsd,hidden=3") == ALL
    assert FeatureSpec.parse("none") == FeatureSpec.parse("") == FeatureSpec()
    assert FeatureSpec.from_json(ALL.to_json()) == ALL
    assert [ALL.width(experts) for experts in (1, 2, 5)] == [6, 12, 36]
    assert FeatureSpec().width(5) == 0
    assert context_features(FeatureSpec(), [torch.zeros(2, 9)], vocab_size=9).shape == (2, 0)
    assert context_features(ALL, [torch.zeros(0, 9)], [torch.zeros(0, 4)], vocab_size=9).shape == (
        (0, 6)
    )
    for text in ("entropi", "hidden", "hidden=x", "hidden=-1", "jsd=1"):
        with pytest.raises(ValueError, match=f"features: expected some of.*got '{text}'"):
            FeatureSpec.parse(text)
    with pytest.raises(ValueError, match="features: unknown to this release: smell"):
        FeatureSpec.from_json({"smell": True})
    with pytest.raises(ValueError, match="hidden: expected at least 0"):
        FeatureSpec(hidden=-1)
    with pytest.raises(ValueError, match="logits: expected those of at least one expert"):
        context_features(ALL, [], vocab_size=9)


def test_the_store_holds_what_is_known_before_each_token(
    make_checkpoint: Callable[..., Path], corpora: Corpora, tmp_path: Path
) -> None:
    """Experts of two widths, two paddings and two types, against one pass over each document."""
    make_checkpoint(tmp_path / "experts" / "a", seed=1, context=256)
    make_checkpoint(tmp_path / "experts" / "b", seed=2, context=256, hidden_size=48, vocab_size=384)
    make_checkpoint(
        tmp_path / "experts" / "c",
        seed=3,
        context=256,
        model_type="gpt2",
        n_embd=32,
        n_layer=1,
        n_head=2,
        vocab_size=320,
    )
    experts = ExpertSet.open(tmp_path / "experts")
    experts.load("c").to(torch.bfloat16).save_pretrained(tmp_path / "experts" / "c")
    experts = ExpertSet.open(tmp_path / "experts")
    models = [experts.load(name) for name in experts.names]
    assert [model.dtype for model in models] == [torch.float32, torch.float32, torch.bfloat16]
    store = score(experts, corpora, tmp_path / "store", features=ALL, **SMALL)
    for corpus in corpora:
        stored = store.context_features(corpus.name, ALL)
        assert stored.shape == (store.corpus(corpus.name).tokens, ALL.width(3))
        offsets = store.offsets(corpus.name).tolist()
        for document, text in enumerate(corpus.documents):
            ids = encode(experts.tokenizer, [text]).ids[None, :-1]
            with torch.no_grad():
                seen = [model(input_ids=ids, output_hidden_states=True) for model in models]
            known = context_features(
                ALL,
                [out.logits[0] for out in seen],
                [out.hidden_states[-1][0] for out in seen],
                vocab_size=experts.vocab_size,
            )
            rows = stored[offsets[document] : offsets[document + 1]]
            exact = [column for column in range(ALL.width(3)) if column not in BF16_COLUMNS]
            # float32 through one layer, as for log-probabilities; bfloat16 keeps 8 bits and
            # batches round differently, so that its argmax may move too.
            torch.testing.assert_close(rows[:, exact], known[:, exact], rtol=0, atol=2e-4)
            near = [2, 5, 9]  # entropy and top of the bfloat16 expert, and the divergence
            torch.testing.assert_close(rows[:, near], known[:, near], rtol=0, atol=0.1)
    reordered = store.context_features("code", FeatureSpec(entropy=True, jsd=True), ["c", "a", "b"])
    plain = store.context_features("code", FeatureSpec(entropy=True, jsd=True))
    assert torch.equal(reordered, plain[:, [2, 0, 1, 3]])


BF16_COLUMNS = {2, 5, 7, 8, 9, 16, 17, 18}
"""Of three experts, the columns in which the third has a part."""


def test_features_are_added_to_what_is_scored(
    experts_path: Path, corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = ExpertSet.open(experts_path)
    whole = tree(score(experts, corpora, tmp_path / "whole", features=ALL, **SMALL).path)
    store = score(experts, corpora, tmp_path / "store", **SMALL)
    plain = tree(store.path)
    with pytest.raises(ValueError, match=r"00000\.entropy\.safetensors: no such.*feature entropy"):
        store.context_features("code", FeatureSpec(entropy=True))
    score(experts, corpora, store.path, features=FeatureSpec(entropy=True), **SMALL)
    entropies = tree(store.path)
    assert {name: entropies[name] for name in plain} == plain
    score(experts, corpora, store.path, features=ALL, **SMALL)
    assert tree(store.path) == whole
    loads: list[str] = []
    monkeypatch.setattr(ExpertSet, "load", lambda self, name, **kw: loads.append(name))
    score(experts, corpora, store.path, features=ALL, **SMALL)
    assert loads == []


def test_removing_an_expert_removes_its_features(
    experts_path: Path, corpora: Corpora, tmp_path: Path
) -> None:
    experts = ExpertSet.open(experts_path)
    store = score(experts, corpora, tmp_path / "store", features=ALL, **SMALL)
    alone = ExpertSet.open(experts_path / "code")
    own = FeatureSpec(entropy=True, top=True, agreement=True, hidden=3)
    expected = tree(score(alone, corpora, tmp_path / "alone", features=own, **SMALL).path)
    assert any(name.startswith("joint/") for name in tree(store.path))
    store.remove_expert("prose")
    assert tree(store.path) == expected
    assert not list((store.path / "joint").iterdir())
    with pytest.raises(ValueError, match="no expert 'prose' in this store; it has: code"):
        store.context_features("code", ALL, ["code", "prose"])


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    store = LogProbStore.create(tmp_path / "store", "T")
    offsets = torch.tensor([0, 2, 4])
    store.add_corpus("wiki", sha256="W", offsets=offsets, window=8, stride=4)
    store.add_expert("a", sha256="A")
    shard = store.shards("a", "wiki", "hidden-2")[0]
    values = torch.zeros(4, 2)
    shard.write(values)
    values[3, 1] = float("nan")
    with pytest.raises(ValueError, match="expert 'a' gives hidden-2 nan to token 1 of document 1"):
        shard.write(values)
    with pytest.raises(ValueError, match=r"expected float32 \[4, 2\].*got torch.float32 \[4\]"):
        shard.write(torch.zeros(4))
    with pytest.raises(ValueError, match=r"expected int32 \[4\].*got torch.int64"):
        store.shards("a", "wiki", "argmax")[0].write(torch.zeros(4, dtype=torch.int64))
