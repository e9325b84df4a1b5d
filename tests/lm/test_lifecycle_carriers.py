"""What still carries the data of an expert that has gone, and the records that tell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from robustgate.lm.corpus import Corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import sha256_json
from robustgate.lm.gates.fit import fit
from robustgate.lm.lifecycle.carriers import Carrier
from robustgate.lm.lifecycle.removal import plan_removal
from robustgate.lm.modular import ModularModel
from robustgate.lm.scoring.score import score
from robustgate.lm.store.log_probs import LogProbStore
from robustgate.lm.tokenizer import train_tokenizer
from robustgate.lm.training.lineage import MANIFEST, Data, Origin, origins
from robustgate.lm.training.train import train

from .lives import TRAINING, opt_out, record, remove, same_as_without

pytestmark = pytest.mark.usefixtures("one_thread")


def test_carriers_are_named(
    life: Path, make_checkpoint: Callable[..., Path], corpora: tuple[Corpus, Corpus]
) -> None:
    """A seed, an expert branched from it, a tokenizer, a descendant, a stranger, evaluations."""
    experts = life / "experts"
    union = Corpus.of("union", [*TRAINING["third"].documents, *TRAINING["code"].documents])
    seed = record(make_checkpoint(life / "seed", seed=20), [union])
    record(experts / "third", [TRAINING["third"]], init="5eed" * 16, ancestor=seed)
    record(experts / "code", [TRAINING["code"]], init="5eed" * 16, ancestor=seed)
    sha256 = ExpertSet.open(experts).sha256("third")
    record(make_checkpoint(life / "child", seed=21), [corpora[0]], init=sha256, ancestor={})
    make_checkpoint(life / "stranger", seed=22)
    for name in ("evaluation.json", "trace.json"):
        (life / "modular" / name).write_text("{}")
    score(ExpertSet.open(experts), corpora, life / "modular" / "scores", progress=False)
    (life / "modular" / "notes.txt").write_text("mine")
    (life / "saved").mkdir()
    (life / "saved" / "config.json").write_text(json.dumps({"experts": [{"sha256": sha256}]}))
    done = remove(life)
    found = {(one.kind, Path(one.name).name): one for one in done.carriers}
    assert {place: one.status for place, one in found.items()} == {
        ("seed", "checkpoint 5eed5eed5eed5eed"): "carries",
        ("tokenizer", "shared tokenizer"): "carries",
        ("checkpoint", "code"): "carries",
        ("checkpoint", "seed"): "carries",
        ("checkpoint", "child"): "carries",
        ("checkpoint", "stranger"): "may carry",
        ("evaluation", "evaluation.json"): "deleted",
        ("evaluation", "trace.json"): "deleted",
        ("report", "reports of this model"): "may carry",
        ("file", "notes.txt"): "may carry",
        ("model", "saved"): "carries",
    }
    assert "about 100% of the documents of 'third' are in 'union'" in (
        found["seed", "checkpoint 5eed5eed5eed5eed"].reason
    )
    assert "started from this expert" in found["checkpoint", "child"].reason
    assert all(one.reason and (one.remedy or one.status == "deleted") for one in done.carriers)
    assert not (life / "modular" / "evaluation.json").exists()
    assert LogProbStore.open(life / "modular" / "scores").experts == ("code", "prose")
    assert json.loads(opt_out(life).read_text())["data"] == [
        {"name": "third", "sha256": TRAINING["third"].sha256}
    ]


def test_a_learned_gate_is_dropped_and_other_places_are_named(
    life: Path, corpora: tuple[Corpus, Corpus]
) -> None:
    experts = ExpertSet.open(life / "experts")
    store = LogProbStore.open(life / "store")
    shutil.copytree(life / "modular", life / "other")
    learned = fit(store, life / "modular", gate="token", experts=experts, steps=2, progress=False)
    assert learned.kind == "token"
    shutil.copytree(life / "store", life / "copy")
    score(experts, [TRAINING["third"]], life / "store", progress=False, slice_tokens=300)
    with pytest.raises(ValueError, match=r"its corpora are not the domains of .*third"):
        remove(life)
    store.remove_corpus("third")
    done = remove(life)
    kinds = {one.kind: one for one in done.carriers if one.kind in ("gate", "model", "store")}
    assert {kind: (Path(one.name).name, one.status) for kind, one in kinds.items()} == {
        "gate": ("modular", "deleted"),
        "model": ("other", "carries"),
        "store": ("copy", "carries"),
    }
    same_as_without(life)


def test_shares_of_documents_are_estimated_from_sketches() -> None:
    documents = [f"document {number}" for number in range(4000)]
    whole = Data.of(Corpus.of("whole", documents))
    half = Data.of(Corpus.of("half", documents[:2000]))
    mixed = Data.of(Corpus.of("mixed", [*documents[:1000], *map("other {}".format, range(1000))]))
    apart = Data.of(Corpus.of("apart", [f"else {number}" for number in range(3000)]))
    assert half.share_in(whole) == whole.share_in(whole) == 1.0
    assert apart.share_in(whole) == 0.0
    # A sample of 64 * 2000 / 4000 = 32 of the half's hashes or so; 64 of the mixture's, half of
    # them shared: 0.5 +- 4 standard deviations of 0.5 / sqrt(32).
    assert abs((mixed.share_in(whole) or 0.0) - 0.5) < 4 * 0.5 / 32**0.5
    assert Data("old", sha256_json("x")).share_in(whole) is None
    assert Data("old", whole.sha256).share_in(whole) == 1.0


def test_training_leaves_a_record(tmp_path: Path) -> None:
    """Of its data, of the seed's, and of the tokenizer's, through a branch of a branch."""
    code, prose, third = TRAINING.values()
    train_tokenizer([code, *prose.documents], 280, tmp_path / "tokenizer")
    settings = {"context": 8, "batch_size": 2, "steps": 1, "progress": False}
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    seed = train(
        [code, prose],
        tmp_path / "seed",
        tokenizer=tmp_path / "tokenizer",
        config=config,
        **settings,
    ).path
    branch = train(third, tmp_path / "branch", init=seed, **settings).path
    twig = train(prose, tmp_path / "twig", init=branch, **settings).path
    line = origins(twig)
    assert [part.data for part in line] == [
        (Data.of(prose),),
        (Data.of(third),),
        (Data.of(code), Data.of(prose)),
    ]
    assert [part.init for part in line] == [
        ExpertSet.open(branch).sha256("branch"),
        ExpertSet.open(seed).sha256("seed"),
        None,
    ]
    loose = Data.of(Corpus.of("documents", prose.documents))
    assert {part.tokenizer for part in line} == {(Data.of(code), loose)}
    assert loose.sha256 == prose.sha256  # the same documents under another name
    own = train(code, tmp_path / "own", vocab_size=280, config=config, **settings).path
    assert origins(own)[0].tokenizer == (Data.of(code),)
    (own / MANIFEST).unlink()
    assert origins(own) == [Origin(None, None, None)]


def test_carriers_are_plain_values() -> None:
    carrier = Carrier("seed", "s", "carries", "because")
    assert carrier == Carrier(**vars(carrier))


def carriers(folder: Path) -> dict[tuple[str, str], Carrier]:
    """Return what a removal of the third would name, by kind and last part of the place."""
    plan = plan_removal(
        "third", ModularModel.load(folder / "modular"), LogProbStore.open(folder / "store")
    )
    return {(one.kind, Path(one.name).name): one for one in plan.carriers}


def test_a_part_of_the_data_is_found(life: Path, make_checkpoint: Callable[..., Path]) -> None:
    """A checkpoint that saw some of the documents and nothing else, few or many."""
    whole = Corpus.of("whole", [f"document {number}" for number in range(20000)])
    record(life / "experts" / "third", [whole])
    few = Corpus.of("few", whole.documents[::400])
    many = Corpus.of("many", whole.documents[::4])
    strangers = Corpus.of("strangers", [f"else {number}" for number in range(20000)])
    for seed, corpus in enumerate((few, many, strangers)):
        record(make_checkpoint(life / corpus.name, seed=30 + seed), [corpus])
    found = carriers(life)
    # Of 50 documents 50 * 64 / 20000 = 0.16 are expected in the sketch of the whole: in doubt.
    assert found["checkpoint", "few"].status in ("carries", "may carry")
    assert found["checkpoint", "many"].status == "carries"
    assert ("checkpoint", "strangers") not in found
    small = Corpus.of("small", whole.documents[:60])  # its sketch holds all of its documents
    record(life / "experts" / "third", [small])
    record(life / "many", [whole])
    assert carriers(life)["checkpoint", "many"].status in ("carries", "may carry")
    part = Corpus.of("part", small.documents[:5])
    record(life / "many", [part])
    assert carriers(life)["checkpoint", "many"].status == "carries"


def test_an_expert_without_a_record(life: Path, make_checkpoint: Callable[..., Path]) -> None:
    """Nothing can be excluded, but a copy is one all the same."""
    third = life / "experts" / "third"
    (third / MANIFEST).unlink()
    shutil.copytree(third, life / "copy")
    make_checkpoint(life / "neighbour", seed=40)
    found = carriers(life)
    assert {place: one.status for place, one in found.items()} == {
        ("seed", "unknown"): "may carry",
        ("tokenizer", "shared tokenizer"): "may carry",
        ("checkpoint", "code"): "may carry",
        ("checkpoint", "prose"): "may carry",
        ("checkpoint", "neighbour"): "may carry",
        ("checkpoint", "copy"): "carries",
    }
    assert found["checkpoint", "copy"].reason == "it is the same checkpoint"
    third.rename(life / "moved")
    assert carriers(life)["checkpoint", "moved"].status == "carries"


def test_the_same_checkpoint_under_a_second_name(
    life: Path, corpora: tuple[Corpus, Corpus]
) -> None:
    """As another expert of the model it stays and is named; in the store alone it goes."""
    shutil.copytree(life / "experts" / "third", life / "experts" / "twin")
    (life / "experts" / "twin" / MANIFEST).unlink()
    experts = ExpertSet.open(life / "experts")
    store = score(experts, corpora, life / "store", progress=False)
    store.add_expert("orphan", sha256=experts.sha256("third"))
    fit(store, life / "modular", experts=experts)
    twin = carriers(life)["checkpoint", "twin"]
    assert (twin.status, twin.reason) == ("carries", "it is the same checkpoint")
    remove(life)
    assert store.experts == ModularModel.load(life / "modular").names == ("code", "prose", "twin")
    fit(store, life / "modular")
    plan = plan_removal("prose", ModularModel.load(life / "modular"), store, keep_weights=True)
    kinds = {one.name: one.status for one in plan.carriers if one.kind == "checkpoint"}
    assert kinds == {"expert code": "may carry", "expert twin": "may carry"}


def test_unfinished_training_is_named(life: Path) -> None:
    """Of another checkpoint, and of the expert where it is not deleted with it."""
    for name, corpus in (("other", "third"), ("else", "code"), ("third", "third")):
        run = life / "experts" / f".{name}.run"
        run.mkdir()
        settings = {"data": [Data.of(TRAINING[corpus]).to_json()], "init": None}
        (run / "settings.json").write_text(json.dumps(settings))
    found = carriers(life)
    assert found["checkpoint", ".other.run"].status == "carries"
    assert ("checkpoint", ".else.run") not in found
    copy = Path(shutil.copytree(life, life.with_name("copy")))
    remove(life)
    assert not (life / "experts" / ".third.run").exists()
    shutil.rmtree(copy / "experts" / "third")
    last = remove(copy).carriers[-1]
    assert (last.kind, Path(last.name).name, last.status) == (
        "checkpoint",
        ".third.run",
        "may carry",
    )
    assert (copy / "experts" / ".third.run").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"format": "robustgate modular model"},
        {"format": "robustgate modular model", "experts": [{"name": "third"}]},
        {"format": "robustgate modular model", "experts": ["third"]},
        {"format": "robustgate log-prob store", "experts": {"third": None}},
        {"format": "robustgate log-prob store", "experts": 3},
    ],
)
def test_a_damaged_neighbour_may_carry(life: Path, content: dict[str, object]) -> None:
    (life / "damaged").mkdir()
    (life / "damaged" / "manifest.json").write_text(json.dumps(content))
    kind = str(content["format"]).split()[-1]
    assert carriers(life)[kind, "damaged"].status == "may carry"


@pytest.mark.parametrize(
    "content",
    [
        {"data": ["a.txt"]},
        {"data": [{"name": "a"}]},
        {"data": [{"name": "a", "sha256": "b", "sketch": None}]},
        {"data": [{"name": "a", "sha256": "b", "sketch": [1, 2]}]},
        {"settings": "none"},
        {"settings": {"init": ["seed"]}, "ancestor": "unknown"},
    ],
)
def test_a_damaged_record_says_nothing(life: Path, content: dict[str, object]) -> None:
    (life / "experts" / "code" / MANIFEST).write_text(json.dumps(content))
    assert carriers(life)["checkpoint", "code"].status == "may carry"


def test_an_average_in_a_store_beside_this_one(
    life: Path, corpora: tuple[Corpus, Corpus], make_checkpoint: Callable[..., Path]
) -> None:
    """What holds scores of these experts may hold their average; another store is none of ours."""
    shutil.copytree(life / "without", life / "eval")
    for place in ("eval", "elsewhere"):
        soup = ExpertSet.open({"soup": make_checkpoint(life.parent / place / "soup", seed=50)})
        score(soup, corpora, life / place, progress=False)
    found = {
        one.name: one.status
        for one in plan_removal(
            "third", ModularModel.load(life / "modular"), LogProbStore.open(life / "store")
        ).carriers
        if one.kind == "store"
    }
    assert found == {f"expert soup in {life / 'eval'}": "may carry"}


def test_a_recorded_average_goes_with_its_members(
    life: Path, corpora: tuple[Corpus, Corpus], make_checkpoint: Callable[..., Path]
) -> None:
    """``evaluate`` records what it averaged: in the fit's store it goes, in others it is named."""
    store = LogProbStore.open(life / "store")
    members = {name: store.expert_sha256(name) for name in store.experts}
    soup = ExpertSet.open({"soup": make_checkpoint(life.parent / "soup", seed=50)})
    shutil.copytree(life / "store", life / "eval")
    for place in ("store", "eval"):
        score(soup, corpora, life / place, compared=members, slice_tokens=300, progress=False)
    (left := life / "modular" / ".soup~host~1~2~.tmp").mkdir()
    fit(LogProbStore.open(life / "store"), life / "modular")  # does not know where its experts lie
    done = remove(life, keep_weights=True)
    named = {one.name: one.status for one in done.carriers if one.kind == "store"}
    in_eval = {f"expert soup in {life / 'eval'}": "carries", str(life / "eval"): "carries"}
    assert named == {"expert soup": "deleted", **in_eval}
    assert LogProbStore.open(life / "store").experts == ("code", "prose")
    assert not left.exists()
