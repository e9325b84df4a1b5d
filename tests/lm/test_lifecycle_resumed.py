"""Removals that were interrupted, that meet each other, and that are refused in time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from robustgate.lm.corpus import Corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import exclusive
from robustgate.lm.gates.fit import fit
from robustgate.lm.lifecycle import removal
from robustgate.lm.lifecycle.optout import OptOut, manifest_path
from robustgate.lm.lifecycle.removal import plan_removal, remove_expert
from robustgate.lm.modular import ModularModel
from robustgate.lm.scoring.score import score
from robustgate.lm.store.log_probs import LogProbStore

from .conftest import fork, tree
from .lives import opt_out, remove, same_as_without

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(folder: Path) -> tuple[ModularModel, LogProbStore]:
    return ModularModel.load(folder / "modular"), LogProbStore.open(folder / "store")


def begin(folder: Path, name: str = "third", **options: bool) -> OptOut:
    """Leave what a removal leaves that is killed at once."""
    model, store = opened(folder)
    plan = plan_removal(name, model, store, **options)
    plan.write(manifest_path(model, name, plan.sha256))
    return plan


def replace_third(
    folder: Path, make_checkpoint: Callable[..., Path], corpora: tuple[Corpus, Corpus]
) -> None:
    """Put another checkpoint in the place of the third, score it and fit."""
    shutil.rmtree(folder / "experts" / "third", ignore_errors=True)
    make_checkpoint(folder / "experts" / "third", seed=77)
    experts = ExpertSet.open(folder / "experts")
    store = score(experts, corpora, folder / "store", device="cpu", progress=False)
    fit(store, folder / "modular", experts=experts)


def test_what_becomes_of_the_weights_is_as_asked_last(life: Path) -> None:
    begin(life)
    kept = tree(life / "experts")
    copy = Path(shutil.copytree(life, life.with_name("copy")))
    assert remove(life, keep_weights=True).weights == "kept"
    assert tree(life / "experts") == kept
    same_as_without(life)
    shutil.rmtree(copy / "experts" / "third")
    with pytest.raises(ValueError, match=r"third: is deleted already .* cannot be kept"):
        remove(copy, keep_weights=True)
    assert remove(copy).weights == "deleted"
    same_as_without(copy)


def test_weights_are_not_kept_unasked(life: Path) -> None:
    begin(life, keep_weights=True)
    copy = Path(shutil.copytree(life, life.with_name("copy")))
    assert remove(life).weights == "deleted"
    assert not (life / "experts" / "third").exists()
    model, store = opened(copy)
    plan = plan_removal("third", model, store)
    with pytest.raises(ValueError, match="plan: removes expert 'third', weights: deleted"):
        remove_expert("third", model, store, keep_weights=True, plan=plan)
    (copy / "experts" / "third" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the checkpoint of expert 'third' any more"):
        remove(copy)


def test_an_unfinished_plan_for_another_checkpoint_is_not_taken(
    life: Path, make_checkpoint: Callable[..., Path], corpora: tuple[Corpus, Corpus]
) -> None:
    old = begin(life, keep_weights=True)
    opened(life)[1].remove_expert("third")
    replace_third(life, make_checkpoint, corpora)
    sha256 = ExpertSet.open(life / "experts").sha256("third")
    done = remove(life)
    assert (done.sha256, done.weights) == (sha256, "deleted")
    assert opened(life)[1].experts == ("code", "prose")
    assert not (life / "experts" / "third").exists()
    assert remove(life).sha256 == old.sha256  # the older one is still to be finished
    with pytest.raises(ValueError, match="no expert 'third'"):
        remove(life)


def test_each_checkpoint_of_a_name_keeps_its_manifest(
    life: Path, make_checkpoint: Callable[..., Path], corpora: tuple[Corpus, Corpus]
) -> None:
    first = remove(life)
    replace_third(life, make_checkpoint, corpora)
    second = remove(life)
    assert first.sha256 != second.sha256
    model = opened(life)[0]
    for done in (first, second):
        assert OptOut.read(manifest_path(model, "third", done.sha256)) == done


@pytest.mark.parametrize("place", ["store", "modular/scores"])
def test_the_proof_looks_for_the_expert(
    life: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place != "store":
        shutil.copytree(life / "store", life / "modular" / "scores")
    forget = removal._forget

    def half(*arguments: object) -> None:
        kept = Path(shutil.copytree(life / place, life.with_name("kept")))
        forget(*arguments)  # type: ignore[arg-type]
        shutil.rmtree(life / place)
        kept.rename(life / place)

    monkeypatch.setattr(removal, "_forget", half)
    with pytest.raises(RuntimeError, match=f"{place}: still holds expert 'third'"):
        remove(life)
    assert (life / "experts" / "third").is_dir()


def test_a_model_that_has_changed_since_is_refused(life: Path) -> None:
    """Somebody else removed an expert while the question was on the screen."""
    model, store = opened(life)
    plan = plan_removal("third", model, store)
    remove(life, "code")
    untouched = tree(life)
    with pytest.raises(ValueError, match="modular: has changed since it was read"):
        remove_expert("third", model, store, plan=plan)
    assert tree(life) == untouched
    remove(life)
    assert opened(life)[0].names == ("prose",)


def test_one_removal_at_a_time(life: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget, locked = removal._forget, []

    def watched(*arguments: object) -> None:
        with (
            pytest.raises(BlockingIOError),
            exclusive(life / "modular" / ".lock", wait=False),
        ):
            pass
        locked.append(True)
        forget(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(removal, "_forget", watched)
    remove(life)
    assert locked == [True]
    same_as_without(life)


def test_two_removals_at_once_can_both_be_finished(
    life: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    removals = [fork(partial(remove, life, name)) for name in ("third", "code")]
    assert [os.waitpid(child, 0)[1] for child in removals].count(0) >= 1
    for name in {*opened(life)[0].names} - {"prose"}:
        remove(life, name)
    model, store = opened(life)
    assert model.names == store.experts == ("prose",)


def test_two_that_have_met_are_finished_one_by_one(life: Path) -> None:
    begin(life)
    store = opened(life)[1]
    store.remove_expert("third")
    with pytest.raises(ValueError, match="removal of expert 'third' was interrupted; finish that"):
        remove(life, "prose")
    shutil.copytree(life / "experts" / "third", life / "third")
    both = Path(shutil.copytree(life, life.with_name("both")))
    remove(life)
    assert opened(life)[0].names == ("code", "prose")
    opened(both)[1].remove_expert("prose")
    shutil.rmtree(both / "experts" / "prose")
    assert remove(both).finished is not None
    assert opened(both)[0].names == ("code",)


def test_a_second_model_on_the_same_store(life: Path) -> None:
    experts = ExpertSet.open(life / "experts")
    second = fit(opened(life)[1], life / "second", experts=experts, delta=0.05)
    found = {(one.kind, Path(one.name).name): one for one in remove(life).carriers}
    assert "expert remove third" in found["model", "second"].remedy
    done = remove_expert("third", second, opened(life)[1])
    assert (done.weights, len(done.verified)) == ("gone before", 2)
    assert ModularModel.load(life / "second").names == ("code", "prose")


def test_another_checkpoint_under_the_name_is_refused(
    life: Path, make_checkpoint: Callable[..., Path], corpora: tuple[Corpus, Corpus]
) -> None:
    experts = ExpertSet.open(life / "experts")
    second = fit(opened(life)[1], life / "second", experts=experts, delta=0.05)
    remove(life)
    replace_third(life, make_checkpoint, corpora)
    untouched = tree(life)
    with pytest.raises(ValueError, match="store: holds another checkpoint as expert 'third'"):
        remove_expert("third", second, opened(life)[1], keep_weights=True)
    assert tree(life) == untouched


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("README.md", r"README\.md: is no file of this store.*move it away"),
        (".DS_Store", r"\.DS_Store: is no file of this store"),
        ("shards/code/code/00099.safetensors", r"00099\.safetensors: is no file of this store"),
        ("shards/code/code/00000.entropy.safetensors", r"score expert 'code' .*feature entropy"),
        ("shards/code/code/00000.safetensors", r"score expert 'code' on corpus 'code' again"),
    ],
)
def test_a_store_that_cannot_be_proven_is_refused_before_anything_is_deleted(
    life: Path, file: str, message: str
) -> None:
    (life / "store" / file).write_bytes(b"something else")
    untouched = tree(life)
    with pytest.raises(ValueError, match=message):
        remove(life)
    assert tree(life) == untouched


def test_what_goes_anyway_does_no_harm(life: Path) -> None:
    """Files of the expert itself, of removals that were killed, and of writers at work."""
    store = life / "store"
    for file in (
        "shards/third/code/notes.txt",
        "shards/third/code/00000.safetensors",
        "shards/gone/code/00000.safetensors",
        "shards/code/gone/00000.safetensors",
        "offsets/gone.safetensors",
    ):
        (store / file).parent.mkdir(parents=True, exist_ok=True)
        (store / file).write_bytes(b"something else")
    plan_removal("third", *opened(life))
    remove(life)
    same_as_without(life)
    assert opt_out(life).exists()
