"""The store: what comes back, what is refused, and what a killed or failing writer leaves."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustgate.lm.store.log_probs import LogProbStore

from .conftest import fork, tree

OFFSETS = torch.tensor([0, 3, 4, 9, 11, 20])
SLICES = [(0, 3), (3, 5)]  # documents of the shards when they close at 6 tokens


def log_probs(expert: str) -> Tensor:
    """Return the same random log-probabilities for the same expert, float32 [20]."""
    seed = sum(expert.encode())
    return -torch.rand(20, generator=torch.Generator().manual_seed(seed)).exp()


def make(path: Path, *experts: str, tokenizer: str = "T") -> LogProbStore:
    """Return a store with the corpus ``wiki``; its experts are complete."""
    store = LogProbStore.create(path, tokenizer)
    store.add_corpus("wiki", sha256="W", offsets=OFFSETS, window=8, stride=4, slice_tokens=6)
    for expert in experts:
        store.add_expert(expert, sha256=expert.upper())
        fill(store, expert)
    return store


def fill(store: LogProbStore, expert: str) -> None:
    for index, shard in enumerate(store.shards(expert, "wiki")):
        store.write(expert, "wiki", index, log_probs(expert)[shard.rows])


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    make(tmp_path / "store", "b", "a")
    store = LogProbStore.open(tmp_path / "store")
    assert (store.experts, store.corpora, store.tokenizer_sha256) == (("a", "b"), ("wiki",), "T")
    assert store.expert_sha256("a") == "A"
    entry = store.corpus("wiki")
    assert (entry.documents, entry.tokens, entry.window, entry.stride) == (5, 20, 8, 4)
    assert [shard.documents for shard in store.shards("a", "wiki")] == SLICES
    assert torch.equal(store.offsets("wiki"), OFFSETS)
    tokens = store.token_log_probs("wiki")
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens, torch.stack([log_probs("a"), log_probs("b")], dim=1))
    assert torch.equal(store.token_log_probs("wiki", ["b"])[:, 0], log_probs("b"))


def test_documents_are_sums_in_float64(tmp_path: Path) -> None:
    store = make(tmp_path / "store", "a", "b")
    expected = [
        [math.fsum(log_probs(name)[first:last].tolist()) for name in ("a", "b")]
        for first, last in pairwise(OFFSETS)
    ]
    documents = store.document_log_probs("wiki")
    assert documents.dtype == torch.float64
    # At most 9 additions of numbers below 3 in float64: 9 * 27 * 2^-53 < 1e-13.
    torch.testing.assert_close(
        documents, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13
    )


def test_minus_infinity_is_legal(tmp_path: Path) -> None:
    store = make(tmp_path / "store", "a")
    values = log_probs("a")
    values[2] = -math.inf
    store.write("a", "wiki", 0, values[:9])
    assert store.token_log_probs("wiki")[2] == -math.inf
    assert store.document_log_probs("wiki")[:, 0].isinf().tolist() == [True, *[False] * 4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_other_values_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    store = make(tmp_path / "store", "a")
    before = tree(store.path)
    values = log_probs("b")
    values[13] = value
    with pytest.raises(
        ValueError, match=f"expert 'a' gives .* {value} to token 2 of document 4 of corpus 'wiki'"
    ):
        store.write("a", "wiki", 1, values[9:])
    assert tree(store.path) == before


def test_wrong_tensors_are_refused(tmp_path: Path) -> None:
    store = make(tmp_path / "store", "a")
    with pytest.raises(
        ValueError, match=r"expected float32 \[9\] for documents 0 to 2 of.*got .*\[8\]"
    ):
        store.write("a", "wiki", 0, torch.zeros(8))
    with pytest.raises(ValueError, match=r"expected float32 \[9\].*got torch.float64"):
        store.write("a", "wiki", 0, torch.zeros(9, dtype=torch.float64))


def test_equal_stores_have_equal_bytes(tmp_path: Path) -> None:
    make(tmp_path / "one", "a", "b")
    make(tmp_path / "two", "b", "a")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_adding_and_removing_an_expert_leaves_no_trace(tmp_path: Path) -> None:
    store = make(tmp_path / "store", "a", "b")
    before = tree(store.path)
    store.add_expert("c", sha256="C")
    fill(store, "c")
    after = tree(store.path)
    assert {key: after[key] for key in before if key != "manifest.json"} == {
        key: value for key, value in before.items() if key != "manifest.json"
    }
    store.remove_expert("c")
    assert tree(store.path) == before
    assert not (store.path / "shards" / "c").exists()
    with pytest.raises(ValueError, match="no expert 'c' in this store; it has: a, b"):
        store.token_log_probs("wiki", ["c"])


def test_what_is_written_after_a_removal_is_refused(tmp_path: Path) -> None:
    """A process that scores has asked for its shards before and does not look again."""
    store = make(tmp_path / "store", "a", "b")
    shards = store.shards("b", "wiki")
    values = [shard.read() for shard in shards]
    store.remove_expert("b")
    before = tree(store.path)
    with pytest.raises(ValueError, match="expert 'b' was removed while it was being scored"):
        shards[0].write(values[0])
    store.add_expert("b", sha256="another")
    with pytest.raises(ValueError, match="expert 'b' was removed"):
        shards[0].write(values[0])
    store.remove_expert("b")
    store.remove_corpus("wiki")
    with pytest.raises(ValueError, match="expert 'b', corpus 'wiki' was removed"):
        shards[0].write(values[0])
    make(store.path)
    assert tree(store.path).keys() == before.keys() - {
        f"shards/a/wiki/0000{index}.safetensors" for index in (0, 1)
    }


def test_what_a_killed_removal_left_is_not_taken_for_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards do not say which type the weights were converted to; the manifest does."""
    store = make(tmp_path / "store", "a", "b")
    store.add_joint(["a", "b"])
    for shard in store.joint_shards(["a", "b"], "wiki"):
        shard.write(torch.zeros(shard.shape))
    with monkeypatch.context() as killed:
        killed.setattr(LogProbStore, "clean", lambda self: None)
        store.remove_expert("b")
    assert (store.path / "shards" / "b" / "wiki").exists()
    store.add_expert("b", sha256="B", dtype="bfloat16")
    assert not any(shard.sound() for shard in store.shards("b", "wiki"))
    store.add_joint(["a", "b"])
    assert not any(shard.sound() for shard in store.joint_shards(["a", "b"], "wiki"))
    fill(store, "b")
    store.add_expert("b", sha256="B", dtype="bfloat16")
    assert all(shard.sound() for shard in store.shards("b", "wiki"))


def test_a_document_without_a_token_is_refused(tmp_path: Path) -> None:
    store = LogProbStore.create(tmp_path / "store", "T")
    offsets = torch.tensor([0, 3, 3, 5])
    with pytest.raises(ValueError, match="of corpus 'wiki', its end, got none in document 1"):
        store.add_corpus("wiki", sha256="W", offsets=offsets, window=8, stride=4)
    assert store.corpora == ()


def test_removing_a_corpus(tmp_path: Path) -> None:
    store = make(tmp_path / "store", "a")
    store.remove_corpus("wiki")
    assert sorted(tree(store.path)) == ["manifest.json", "manifest.lock"]
    with pytest.raises(ValueError, match="no corpus 'wiki' in this store; it has: none"):
        store.offsets("wiki")


def test_a_mismatch_is_refused_with_both_values_and_the_remedy(tmp_path: Path) -> None:
    store = make(tmp_path / "store", "a")
    with pytest.raises(ValueError, match=r"tokenizer is T in the store but U here; use .*store"):
        LogProbStore.create(tmp_path / "store", "U")
    with pytest.raises(
        ValueError, match=r"expert 'a': sha256 is A in .* but B here.*remove_expert"
    ):
        store.add_expert("a", sha256="B")
    same = {"sha256": "W", "offsets": OFFSETS, "window": 8, "stride": 4, "slice_tokens": 6}
    store.add_corpus("wiki", **same)
    for key, value in (("sha256", "V"), ("window", 16), ("stride", 8), ("slice_tokens", 7)):
        pattern = f"corpus 'wiki': {key} is {same[key]} in the store but {value}.*remove_corpus"
        with pytest.raises(ValueError, match=pattern):
            store.add_corpus("wiki", **{**same, key: value})


def test_names_that_are_no_folder_names_are_refused(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    before = tree(tmp_path)
    for name in ("", "../escape", "a/b", ".hidden", "x" * 101, "a b"):
        with pytest.raises(ValueError, match=r"expert name .*: expected 1 to 100 letters"):
            store.add_expert(name, sha256="A")
        with pytest.raises(ValueError, match=r"corpus name .*: expected 1 to 100 letters"):
            store.add_corpus(name, sha256="W", offsets=OFFSETS, window=8, stride=4)
    assert tree(tmp_path) == before


def test_an_incomplete_expert_is_named(tmp_path: Path) -> None:
    store = make(tmp_path / "store", "a", "b")
    store.shards("b", "wiki")[1].path.unlink()
    with pytest.raises(ValueError, match=r"b/wiki/00001\.safetensors: no such file; score expert"):
        store.token_log_probs("wiki")
    assert store.token_log_probs("wiki", ["a"]).shape == (20, 1)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "header", "foreign", "moved"])
def test_a_damaged_shard_is_named_and_never_read(tmp_path: Path, damage: str) -> None:
    store = make(tmp_path / "store", "a", "b")
    path = store.shards("b", "wiki")[0].path
    content = path.read_bytes()
    foreign = make(tmp_path / "other", "b", tokenizer="U").shards("b", "wiki")[0].path
    spoiled = {
        "truncated": content[:-1],
        "empty": b"",
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "header": content.replace(b'"F32"', b'"I32"'),
        "foreign": foreign.read_bytes(),
        "moved": store.shards("a", "wiki")[0].path.read_bytes(),
    }[damage]
    assert spoiled != content
    path.write_bytes(spoiled)
    pattern = r"b/wiki/00000\.safetensors: .*; score expert 'b' on corpus 'wiki' again"
    with pytest.raises(ValueError, match=pattern):
        store.token_log_probs("wiki")
    assert [shard.sound() for shard in store.shards("b", "wiki")] == [False, True]


def test_damaged_offsets_are_named(tmp_path: Path) -> None:
    store = make(tmp_path / "store", "a")
    path = store.path / "offsets" / "wiki.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"wiki\.safetensors: truncated.*remove corpus 'wiki'"):
        store.token_log_probs("wiki")


def test_what_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone: not a log-prob store"):
        LogProbStore.open(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes\.txt\) and no manifest"):
        LogProbStore.create(tmp_path, "T")
    manifest = make(tmp_path / "store", "a").path / "manifest.json"
    good = json.loads(manifest.read_text())
    for content, message in (
        ("{", "not valid JSON"),
        ("[]", "not the manifest of a robustgate log-prob store"),
        (json.dumps({**good, "version": 2}), "version 2, but this release reads version 1"),
        (json.dumps({**good, "experts": {"a": {}}}), "damaged .*restore it from a copy"),
    ):
        manifest.write_text(content)
        with pytest.raises(ValueError, match=f"manifest.json: {message}"):
            LogProbStore.open(tmp_path / "store")


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(tmp_path / "store", "a")
    store.add_expert("b", sha256="B")
    before = tree(store.path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"the disk is full.*b/wiki/00000\.safetensors"):
        fill(store, "b")
    with pytest.raises(OSError, match=r"the disk is full.*manifest\.json"):
        store.add_expert("c", sha256="C")
    assert tree(store.path) == before


def test_killed_at_every_step_of_every_write(tmp_path: Path, killed: Callable[..., bool]) -> None:
    """Whatever is there is right, and going on gives the same bytes."""
    whole = tree(make(tmp_path / "whole", "a", "b").path)
    values = torch.stack([log_probs("a"), log_probs("b")], dim=1)
    at = 0
    while killed(partial(make, tmp_path / f"{at}", "a", "b"), at=at):
        store = LogProbStore(tmp_path / f"{at}")
        if (store.path / "manifest.json").exists():
            for expert in store.experts:
                column = values[:, "ab".index(expert)]
                for shard in store.shards(expert, "wiki"):
                    assert not shard.path.exists() or torch.equal(shard.read(), column[shard.rows])
        make(store.path, "a", "b").clean()
        assert tree(store.path) == whole
        at += 1
    assert at > 20  # manifest 4 times, offsets once, 4 shards: each with fsync, replace, fsync


def test_clean_keeps_what_belongs_to_others(tmp_path: Path) -> None:
    store = make(tmp_path / "store", "a")
    before = tree(store.path)
    shards = store.path / "shards"
    (shards / "gone" / "wiki").mkdir(parents=True)
    (shards / "gone" / "wiki" / "00000.safetensors").write_bytes(b"x")
    (shards / "a" / "gone").mkdir()
    running = shards / f".x.{os.uname().nodename}~{os.getpid()}~.tmp"
    elsewhere = shards / ".x.another-machine~1~.tmp"
    for path in (running, elsewhere):
        path.write_bytes(b"at work")
    store.clean()
    left = tree(store.path)
    assert left.pop(str(running.relative_to(store.path))) == b"at work"
    assert left.pop(str(elsewhere.relative_to(store.path))) == b"at work"
    assert left == before
    assert not (shards / "gone").exists()
    assert not (shards / "a" / "gone").exists()


def test_several_processes_fill_one_store(tmp_path: Path) -> None:
    """Registrations made at the same time are all kept."""
    path = tmp_path / "store"
    names = [f"e{number}" for number in range(6)]
    children = [fork(partial(make, path, name)) for name in names]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(names)
    store = LogProbStore.open(path)
    assert store.experts == tuple(names)
    expected = torch.stack([log_probs(name) for name in names], dim=1)
    assert torch.equal(store.token_log_probs("wiki"), expected)
