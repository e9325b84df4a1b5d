"""An expert comes and goes: what is left is what would be there without it, to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from robustgate.lm.corpus import Corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.gates.fit import fit
from robustgate.lm.lifecycle.members import add_expert, list_experts
from robustgate.lm.lifecycle.optout import OptOut
from robustgate.lm.lifecycle.removal import plan_removal, remove_expert
from robustgate.lm.modular import ModularModel
from robustgate.lm.scoring.score import score
from robustgate.lm.store.log_probs import LogProbStore

from .conftest import tree
from .lives import NAMES, SPEC, TRAINING, opt_out, record, remove, same_as_without

pytestmark = pytest.mark.usefixtures("one_thread")


def without_jsd(store: Path) -> dict[str, bytes]:
    """Return a store's files but for what the experts say together, and the list of such sets."""
    files = {name: text for name, text in tree(store).items() if not name.startswith("joint")}
    manifest = json.loads(files.pop("manifest.json"))
    manifest.pop("joint")
    return {**files, "manifest": json.dumps(manifest).encode()}


def test_removal_leaves_what_would_be_there_without(life: Path) -> None:
    before = {
        name: content for name, content in tree(life / "store").items() if "third" not in name
    }
    done = remove(life)
    same_as_without(life)
    # The divergence of two experts was never asked for, that of all three is gone.
    assert without_jsd(life / "store") == without_jsd(life / "without")
    assert not any("joint" in name or "third" in name for name in tree(life / "store"))
    after = tree(life / "store")
    assert all(after[name] == before[name] for name in after if name != "manifest.json")
    assert sorted(path.name for path in (life / "experts").iterdir()) == ["code", "prose"]
    assert done.weights == "deleted"
    assert len(done.verified) == 2
    assert done.finished is not None
    assert OptOut.read(opt_out(life)) == done


def test_prior_before_renormalised_and_solved_again(life: Path) -> None:
    model = ModularModel.load(life / "modular")
    before = dict(zip(model.names, model.prior.tolist(), strict=True))
    done = remove(life)
    assert done.prior["before"] == before
    kept = before["code"] + before["prose"]
    for name in ("code", "prose"):
        # Both sides are one float64 division of numbers below 1; 1 - w rounds once more.
        assert done.prior["renormalised"][name] == pytest.approx(before[name] / kept, rel=1e-12)
    after = ModularModel.load(life / "modular")
    assert done.prior["solved"] == dict(zip(after.names, after.prior.tolist(), strict=True))


def test_a_checkpoint_that_is_deleted_first(life: Path) -> None:
    shutil.rmtree(life / "experts" / "third")
    done = remove(life)
    assert (done.weights, done.data) == ("gone before", None)
    assert done.carriers[0].status == "may carry"
    same_as_without(life)


def test_weights_can_be_kept(life: Path) -> None:
    before = tree(life / "experts")
    assert remove(life, keep_weights=True).weights == "kept"
    assert tree(life / "experts") == before
    same_as_without(life)


def test_a_model_that_does_not_know_its_checkpoints(life: Path) -> None:
    """Scores alone were fitted: the weights are someone else's to delete."""
    store = LogProbStore.open(life / "store")
    model = fit(store, life / "modular")
    with pytest.raises(ValueError, match=r"modular: does not know where expert 'third' lies"):
        remove(life)
    store.add_expert("fourth", sha256="4" * 64)
    with pytest.raises(ValueError, match=r"store: holds experts that are not in .*modular"):
        remove(life, keep_weights=True)
    store.remove_expert("fourth")
    done = remove(life, keep_weights=True)
    assert (done.weights, done.path, done.data) == ("kept", None, None)
    without = fit(LogProbStore.open(life / "without"), life / "model-without")
    assert tree(without.path).keys() == tree(model.path).keys() - {opt_out(life).name}
    assert (ModularModel.load(model.path).prior == without.prior).all()


def test_an_incomplete_store_is_noticed_before_anything_is_changed(life: Path) -> None:
    shard = LogProbStore.open(life / "store").shards("code", "prose")[0].path
    content = shard.read_bytes()
    shard.unlink()
    before = tree(life)
    with pytest.raises(ValueError, match=r"code/prose/00000\.safetensors: no such file; score"):
        remove(life)
    assert tree(life) == before
    shard.write_bytes(content)
    shutil.rmtree(life / "experts" / "prose")
    before = tree(life)
    with pytest.raises(FileNotFoundError, match=r"prose: no such folder"):
        remove(life)
    assert tree(life) == before


def test_adding_and_removing_is_the_identity(
    life: Path, corpora: tuple[Corpus, Corpus], make_checkpoint: Callable[..., Path]
) -> None:
    before = {part: tree(life / part) for part in ("store", "modular", "experts")}
    new = record(make_checkpoint(life / "experts" / "new", seed=9), [TRAINING["code"]])
    assert new
    store = LogProbStore.open(life / "store")
    info = add_expert(life / "experts" / "new", store, model=ModularModel.load(life / "modular"))
    assert (info.name, info.context, info.prior) == ("new", 32, None)
    assert {corpus: there for corpus, (there, _) in info.scored.items()} == {"code": 0, "prose": 0}
    experts = ExpertSet.open(life / "experts")
    score(experts, corpora, life / "store", device="cpu", progress=False, features=SPEC)
    after = tree(life / "store")
    assert all(after[name] == text for name, text in before["store"].items() if "shards" in name)
    fit(store, life / "modular", experts=experts)
    remove(life, "new")
    opt_out(life, "new").unlink()
    assert {part: tree(life / part) for part in before} == before


def test_a_new_expert_is_scored_in_the_type_of_the_others(
    life: Path, corpora: tuple[Corpus, Corpus], make_checkpoint: Callable[..., Path]
) -> None:
    experts = ExpertSet.open(life / "experts")
    half = partial(score, corpora=corpora, device="cpu", progress=False, dtype=torch.bfloat16)
    store = half(experts, store=life / "half")
    for seed, name in enumerate(("new", "other")):
        add_expert(make_checkpoint(life / name, seed=60 + seed), store)
        assert store.expert(name).dtype == "bfloat16"
        half(ExpertSet.open(life / name), store=life / "half")
    assert add_expert(life / "experts" / "code", store).scored["code"] == (1, 1)  # again
    store.add_expert("own", sha256="0" * 64)
    add_expert(make_checkpoint(life / "mixed", seed=62), store)
    assert store.expert("mixed").dtype is None


def test_killed_at_every_step_and_called_again(life: Path, killed: Callable[..., bool]) -> None:
    """Whenever it dies, the model can be loaded, and calling again ends as if it had not."""
    whole = Path(shutil.copytree(life, life.with_name("whole")))
    remove(whole)
    same_as_without(whole)
    finished = 0
    for at in [*range(0, 24, 3), 60]:  # every third step of the removal, and one of the proof
        copy = Path(shutil.copytree(life, life.with_name(f"at{at}")))
        finished += not killed(partial(remove, copy), at=at)
        if opt_out(copy).exists():
            done = OptOut.read(opt_out(copy)).finished is not None
        else:
            done = False
            assert ModularModel.load(copy / "modular").names == NAMES
        if not done:
            remove(copy)
        same_as_without(copy)
        for part in ("store", "experts"):
            assert tree(copy / part) == tree(whole / part)
        assert not [path for path in copy.iterdir() if path.name.startswith(".")]
        shutil.rmtree(copy)
    assert finished <= 1


def test_what_may_not_be_deleted(life: Path, make_checkpoint: Callable[..., Path]) -> None:
    experts, third = life / "experts", life / "experts" / "third"
    untouched = tree(life)
    elsewhere = third.rename(life / "elsewhere")
    third.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"third: is a symbolic link.*--keep-weights"):
        remove(life)
    third.unlink()
    elsewhere.rename(third)
    blob = (third / "model.safetensors").rename(life / "blob")
    (third / "model.safetensors").symlink_to(blob)
    with pytest.raises(ValueError, match=r"model\.safetensors: is a symbolic link"):
        remove(life)
    (third / "model.safetensors").unlink()
    blob.rename(third / "model.safetensors")
    assert tree(life) == untouched
    kept = third.rename(life / "kept")
    make_checkpoint(third, seed=77)
    with pytest.raises(ValueError, match="third: is not the checkpoint of expert 'third' any more"):
        remove(life)
    shutil.rmtree(third)
    third.mkdir()
    (third / "thesis.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match=r"third: no config\.json"):
        remove(life)
    shutil.rmtree(third)
    kept.rename(third)
    shutil.copytree(experts / "code", third / "inside")
    model = ModularModel.load(life / "modular")
    manifest = json.loads((model.path / "manifest.json").read_text())
    manifest["experts"][0]["path"] = "../experts/third/inside"
    (model.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"third: cannot be deleted, for .*inside is or lies in"):
        remove(life)
    assert third.is_dir()
    assert not opt_out(life).exists()


def test_mistakes_are_named_and_change_nothing(life: Path, tmp_path: Path) -> None:
    untouched = tree(life)
    model, store = ModularModel.load(life / "modular"), LogProbStore.open(life / "store")
    with pytest.raises(ValueError, match="no expert 'fourth'; it has: code, prose, third"):
        remove_expert("fourth", model, store)
    with pytest.raises(ValueError, match=r"without: does not hold expert 'third'.*fitted on"):
        remove_expert("code", model, LogProbStore.open(life / "without"))
    one = ExpertSet.open(life / "experts" / "code")
    alone = score(one, [TRAINING["code"]], tmp_path / "alone", progress=False)
    single = fit(alone, tmp_path / "single", experts=one)
    with pytest.raises(ValueError, match="'code' is its only expert"):
        plan_removal("code", single, alone)
    assert tree(life) == untouched


def test_a_store_that_still_has_something_is_noticed(
    life: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof is one: a removal that forgets a file does not pass it."""
    forgotten = life / "store" / "shards" / "code" / "code" / "00000.residue.safetensors"
    remove_really = LogProbStore.remove_expert

    def careless(self: LogProbStore, name: str) -> None:
        remove_really(self, name)
        forgotten.write_bytes(b"third was here")

    monkeypatch.setattr(LogProbStore, "remove_expert", careless)
    with pytest.raises((RuntimeError, ValueError), match="residue"):
        remove(life)
    assert OptOut.read(opt_out(life)).finished is None
    assert (life / "experts" / "third").is_dir()
    forgotten.unlink()
    remove(life)
    same_as_without(life)


def test_list(life: Path) -> None:
    model, store = ModularModel.load(life / "modular"), LogProbStore.open(life / "store")
    shutil.rmtree(life / "experts" / "prose")
    store.shards("third", "code")[0].path.unlink()
    infos = {info.name: info for info in list_experts(model=model, store=store)}
    assert sorted(infos) == list(NAMES)
    slices = len(store.shards("code", "code"))
    assert infos["code"].scored["code"] == (slices, slices)
    assert infos["third"].scored["code"] == (slices - 1, slices)
    assert (infos["prose"].path, infos["prose"].parameters) == (None, None)
    loaded = ExpertSet.open(life / "experts").load("code")
    assert infos["code"].parameters == sum(weight.numel() for weight in loaded.parameters())
    assert infos["code"].context == 32
    assert sum(info.prior or 0.0 for info in infos.values()) == pytest.approx(1.0, abs=1e-12)
    json.dumps([info.to_json() for info in infos.values()])
    (life / "experts" / "prose").mkdir()
    shutil.copytree(life / "experts" / "code", life / "experts" / "prose", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="expert 'prose' is another checkpoint in one place"):
        list_experts(experts=ExpertSet.open(life / "experts"), store=store)


def test_add_refuses(life: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    store = LogProbStore.open(life / "store")
    before = tree(life)
    short = make_checkpoint(tmp_path / "short", context=16)
    with pytest.raises(ValueError, match=r"short: reads 16 tokens at once.*windows of 32"):
        add_expert(short, store)
    taken = make_checkpoint(tmp_path / "code", seed=5)
    with pytest.raises(ValueError, match=r"expert 'code': sha256 is .* in the store but"):
        add_expert(taken, store)
    with pytest.raises(ValueError, match="two experts are named 'code'"):
        add_expert(taken, store, model=ModularModel.load(life / "modular"))
    other = LogProbStore.create(tmp_path / "other", "T" * 64)
    with pytest.raises(ValueError, match="its tokenizer is not that of"):
        add_expert(taken, other)
    assert tree(life) == before
