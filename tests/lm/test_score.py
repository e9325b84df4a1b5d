"""Scoring: the right numbers, in any batch, resumed from any point, and errors with a name."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from robustgate.lm.corpus import Corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.scoring.forward import token_log_probs
from robustgate.lm.scoring.score import score
from robustgate.lm.store import shards
from robustgate.lm.store.log_probs import LogProbStore
from robustgate.lm.tokenizer import encode

from .conftest import make_documents, tree

Corpora = tuple[Corpus, Corpus]
SMALL = {"batch_tokens": 128, "slice_tokens": 300, "device": "cpu", "progress": False}


def expected(experts: ExpertSet, name: str, document: str, window: int, stride: int) -> list[float]:
    """Return log p(x_t | x_<t) of one document: float64, one window at a time, no batch."""
    ids = encode(experts.tokenizer, [document]).ids
    model = experts.load(name, dtype=torch.float64)
    values: list[float] = []
    start = 0
    while len(values) < len(ids) - 1:
        inputs = ids[start : min(start + window, len(ids) - 1)]
        log_p = model(input_ids=inputs[None]).logits[0, :, : experts.vocab_size].log_softmax(-1)
        gold = log_p.gather(1, ids[start + 1 : start + 1 + len(inputs), None]).flatten()
        values += gold[len(values) - start :].tolist()
        start += stride
    return values


def test_values_are_those_of_each_document_alone(
    experts_path: Path, corpora: Corpora, tmp_path: Path
) -> None:
    experts = ExpertSet.open(experts_path)
    store = score(experts, corpora, tmp_path / "store", **SMALL)
    assert store.experts == ("code", "prose")
    for corpus in corpora:
        tokens = store.token_log_probs(corpus.name)
        offsets = store.offsets(corpus.name).tolist()
        lengths = [offsets[i + 1] - offsets[i] for i in range(len(corpus))]
        assert max(lengths) > 2 * experts.context > min(lengths)  # with and without windows
        for column, name in enumerate(experts.names):
            for document, text in enumerate(corpus.documents):
                truth = torch.tensor(expected(experts, name, text, 32, 16), dtype=torch.float64)
                got = tokens[offsets[document] : offsets[document + 1], column].double()
                # float32 through one layer of width 32: about 100 roundings of 2^-24, relative
                # to logits and log-normalisers below 30, is 2e-4; seen 4e-6.
                torch.testing.assert_close(got, truth, rtol=0, atol=2e-4)


def test_batches_do_not_matter_beyond_rounding(
    experts_path: Path, corpora: Corpora, tmp_path: Path
) -> None:
    experts = ExpertSet.open(experts_path)
    one = score(experts, corpora, tmp_path / "one", batch_tokens=1, progress=False)
    many = score(experts, corpora, tmp_path / "many", batch_tokens=10**6, progress=False)
    for name in one.corpora:
        torch.testing.assert_close(
            one.token_log_probs(name), many.token_log_probs(name), rtol=0, atol=2e-4
        )


def test_the_output_layer_sees_only_what_is_scored(
    experts_path: Path, corpora: Corpora, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = ExpertSet.open(experts_path)
    model = experts.load("code")
    rows = 0

    def count(layer: object, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal rows
        assert output.ndim == 2
        rows += len(output)

    model.get_output_embeddings().register_forward_hook(count)
    tokens = encode(experts.tokenizer, corpora[0].documents)
    token_log_probs(model, tokens, vocab_size=300, window=32, batch_tokens=256)
    assert rows == int(tokens.gold_offsets[-1])


def test_padding_columns_get_no_probability(
    make_checkpoint: Callable[..., Path], corpora: Corpora, tmp_path: Path
) -> None:
    experts = ExpertSet.open(make_checkpoint(tmp_path / "padded", vocab_size=384))
    store = score(experts, corpora[:1], tmp_path / "store", **SMALL)
    truth = expected(experts, "padded", corpora[0].documents[0], 32, 16)
    got = store.token_log_probs("code")[: len(truth), 0].double()
    torch.testing.assert_close(got, torch.tensor(truth, dtype=torch.float64), rtol=0, atol=2e-4)


def test_other_architectures_and_dtypes(
    make_checkpoint: Callable[..., Path], corpora: Corpora, tmp_path: Path
) -> None:
    """Soft-capped logits keep their cap; bfloat16 weights stay near float32."""
    path = make_checkpoint(
        tmp_path / "gemma",
        model_type="gemma2",
        final_logit_softcapping=0.5,
        head_dim=16,
        num_key_value_heads=2,
        initializer_range=1.0,
    )
    experts = ExpertSet.open(path)
    store = score(experts, corpora[:1], tmp_path / "store", **SMALL)
    truth = expected(experts, "gemma", corpora[0].documents[0], 32, 16)
    got = store.token_log_probs("code")[: len(truth), 0].double()
    torch.testing.assert_close(got, torch.tensor(truth, dtype=torch.float64), rtol=0, atol=2e-4)
    assert (got + torch.tensor(300.0).log()).abs().max() < 1.0  # the cap: |z - z'| <= 2 * 0.5
    half = score(experts, corpora[:1], tmp_path / "half", dtype=torch.bfloat16, **SMALL)
    difference = half.token_log_probs("code") - store.token_log_probs("code")
    assert 0 < difference.abs().mean() < 0.1  # 8 bits of mantissa on logits below 0.5


def test_what_is_there_is_not_computed_again(
    experts_path: Path, corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"
    score(ExpertSet.open(experts_path / "code"), corpora, path, **SMALL)
    before = tree(path)
    experts = ExpertSet.open(experts_path)
    loaded = []
    load = ExpertSet.load
    monkeypatch.setattr(
        ExpertSet, "load", lambda self, name, **kw: loaded.append(name) or load(self, name, **kw)
    )
    store = score(experts, corpora, path, **SMALL)
    assert loaded == ["prose"]
    after = tree(path)
    assert all(after[key] == before[key] for key in before if key != "manifest.json")
    store.shards("code", "prose")[0].path.write_bytes(b"damaged")
    score(experts, corpora, path, **SMALL)
    assert loaded == ["prose", "code"]
    assert tree(path) == after


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_resumes_to_the_same_bits(
    experts_path: Path, corpora: Corpora, tmp_path: Path, killed: Callable[..., bool]
) -> None:
    """Killed around writes, each time from the start, then at random times, going on."""

    def run(path: Path) -> LogProbStore:
        return score(ExpertSet.open(experts_path), corpora, path, **SMALL)

    began = time.monotonic()
    whole = tree(run(tmp_path / "whole").path)
    seconds = time.monotonic() - began
    assert len([name for name in whole if name.startswith("shards")]) > 8
    at = 0
    while killed(partial(run, tmp_path / f"{at}"), at=at):
        for name, content in tree(tmp_path / f"{at}").items():
            assert name.endswith(".tmp") or name == "manifest.json" or content == whole[name]
        assert tree(run(tmp_path / f"{at}").path) == whole
        at += 4
    assert at > 30
    draw = random.Random(0)
    path = tmp_path / "random"
    for _ in range(6):  # where each one hits depends on the machine; some may come too late
        killed(partial(run, path), after=draw.uniform(0, seconds))
    assert tree(run(path).path) == whole


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_with_the_document_named(
    experts_path: Path, tmp_path: Path, value: float
) -> None:
    """One token's embedding is spoiled, so the first document that holds it is the culprit."""
    bad = Path(shutil.copytree(experts_path / "code", tmp_path / "worse"))
    experts = ExpertSet.open(experts_path / "code")
    documents = [*make_documents("code", 3), "a ~ b", *make_documents("code", 2, seed=1)]
    (tilde,) = {*encode(experts.tokenizer, ["~"]).ids.tolist()[1:-1]}
    weights = load_file(bad / "model.safetensors")
    weights["model.embed_tokens.weight"][tilde] = value
    save_file(weights, bad / "model.safetensors", {"format": "pt"})
    corpus = Corpus.of("mixed", documents)
    with pytest.raises(
        ValueError, match=r"expert 'worse' gives log-probability nan.* document 3 of corpus 'mixed'"
    ):
        score(ExpertSet.open([experts_path / "code", bad]), [corpus], tmp_path / "store", **SMALL)
    store = LogProbStore.open(tmp_path / "store")
    assert store.token_log_probs("mixed", ["code"]).isfinite().all()
    assert not any(shard.path.exists() for shard in store.shards("worse", "mixed")[:1])


def test_a_model_that_looks_ahead_is_refused(
    make_checkpoint: Callable[..., Path], corpora: Corpora, tmp_path: Path
) -> None:
    bert = make_checkpoint(tmp_path / "bert", model_type="bert")
    with pytest.raises(ValueError, match=r"expert 'bert' looks ahead.*use a causal"):
        score(ExpertSet.open(bert), corpora, tmp_path / "store", **SMALL)


def test_minus_infinity_is_kept(
    experts_path: Path, corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may rule tokens out."""
    experts = ExpertSet.open(experts_path / "code")
    load = ExpertSet.load

    def banning(self: ExpertSet, name: str, **keywords: object) -> object:
        model = load(self, name, **keywords)
        eos = self.tokenizer.eos_token_id
        ban = torch.zeros(300).index_fill(0, torch.tensor(eos), -float("inf"))
        model.get_output_embeddings().register_forward_hook(lambda layer, given, out: out + ban)
        return model

    monkeypatch.setattr(ExpertSet, "load", banning)
    store = score(experts, corpora[:1], tmp_path / "store", **SMALL)
    tokens = store.token_log_probs("code")[:, 0]
    assert tokens[store.offsets("code")[1:] - 1].isneginf().all()
    assert tokens.isneginf().sum() == len(corpora[0])
    assert store.document_log_probs("code").isneginf().all()


def test_a_full_disk_keeps_what_is_complete(
    experts_path: Path, corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = ExpertSet.open(experts_path)
    whole = tree(score(experts, corpora, tmp_path / "whole", **SMALL).path)
    write, left = shards.write_tensor, 5

    def full(path: Path, *arguments: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            monkeypatch.setattr(os, "fsync", no_space)
        write(path, *arguments)

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_tensor", full)
        with pytest.raises(OSError, match="the disk is full; no half-written file was kept"):
            score(experts, corpora, tmp_path / "store", **SMALL)
    monkeypatch.undo()
    found = tree(tmp_path / "store")
    assert len([name for name in found if name.startswith("shards")]) == 2
    assert all(found[name] == whole[name] for name in found)
    score(experts, corpora, tmp_path / "store", **SMALL)
    assert tree(tmp_path / "store") == whole


def test_a_changed_corpus_checkpoint_or_tokenizer_is_refused(
    experts_path: Path, corpora: Corpora, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    path = tmp_path / "store"
    score(ExpertSet.open(experts_path), corpora[:1], path, **SMALL)
    before = tree(path)
    changed = Corpus.of("code", corpora[1].documents)
    with pytest.raises(ValueError, match=r"corpus 'code': sha256 is .* in the store but .* here"):
        score(ExpertSet.open(experts_path), [changed], path, **SMALL)
    other = make_checkpoint(tmp_path / "prose", seed=9)
    with pytest.raises(ValueError, match=r"expert 'prose': sha256 is .* in the store but .* here"):
        score(ExpertSet.open(other), corpora[:1], path, **SMALL)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["tokenizer_sha256"] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"the tokenizer is 0{64} in the store but"):
        score(ExpertSet.open(experts_path), corpora[:1], path, **SMALL)
    after = tree(path)
    assert {**after, "manifest.json": b""} == {**before, "manifest.json": b""}


def test_a_corpus_keeps_its_window(
    experts_path: Path, corpora: Corpora, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    path = tmp_path / "store"
    experts = ExpertSet.open(experts_path / "code")
    score(experts, corpora[:1], path, window=20, **SMALL)
    wide = ExpertSet.open(make_checkpoint(tmp_path / "wide", context=64))
    assert score(wide, corpora[:1], path, **SMALL).corpus("code").window == 20
    with pytest.raises(ValueError, match="corpus 'code': window is 20 in the store but 24 here"):
        score(experts, corpora[:1], path, window=24, **SMALL)
    narrow = ExpertSet.open(make_checkpoint(tmp_path / "narrow", context=16))
    with pytest.raises(ValueError, match=r"window: expected 1 to 16, the shortest context.*got 20"):
        score(narrow, corpora[:1], path, **SMALL)


def test_bad_arguments(experts_path: Path, corpora: Corpora, tmp_path: Path) -> None:
    experts = ExpertSet.open(experts_path / "code")
    with pytest.raises(ValueError, match=r"corpora: expected at least one.*got"):
        score(experts, [], tmp_path / "store")
    with pytest.raises(ValueError, match="with different names"):
        score(experts, [corpora[0], corpora[0]], tmp_path / "store")
    with pytest.raises(ValueError, match="batch_tokens, slice_tokens: expected at least 1, got 0"):
        score(experts, corpora, tmp_path / "store", batch_tokens=0)
    experts.remove("code")
    with pytest.raises(ValueError, match="experts: expected at least one"):
        score(experts, corpora, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_progress_appears_after_a_delay_and_can_be_silenced(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    experts_path: Path,
    corpora: Corpora,
    tmp_path: Path,
) -> None:
    from robustgate.lm import progress

    experts = ExpertSet.open(experts_path / "code")
    monkeypatch.setattr(progress, "DELAY", 3600.0)
    score(experts, corpora, tmp_path / "quick")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "DELAY", 0.0)
    score(experts, corpora, tmp_path / "silent", progress=False)
    assert capsys.readouterr() == ("", "")
    score(experts, corpora, tmp_path / "long")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "score code" in shown.err
