"""What still carries the data of an expert that has gone, and the records that tell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from robustgate.lm.carriers import Carrier
from robustgate.lm.corpus import Corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import sha256_json
from robustgate.lm.fit import fit
from robustgate.lm.lineage import MANIFEST, Data, Origin, origins
from robustgate.lm.modular import ModularModel
from robustgate.lm.optout import manifest_path
from robustgate.lm.score import score
from robustgate.lm.store import LogProbStore
from robustgate.lm.tokenizer import train_tokenizer
from robustgate.lm.train import train

from .lives import TRAINING, record, remove, same_as_without

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
    assert json.loads(manifest_path(ModularModel.load(life / "modular"), "third").read_text())[
        "data"
    ] == [{"name": "third", "sha256": TRAINING["third"].sha256}]


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
