"""``robustgate score`` and ``robustgate expert``, as typed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from robustgate import cli
from robustgate.lm.store.features import FeatureSpec
from robustgate.lm.store.log_probs import LogProbStore

from .conftest import make_documents, tree

DOMAINS = ("code", "prose")


def call(*args: object, status: int = 0, answer: str | None = None) -> str:
    """Run a command in this process; return its standard output, or error output if it fails."""
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], input=answer)
    assert result.exit_code == status, result.output
    return result.stderr if status else result.stdout


@pytest.fixture
def folder(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Path:
    """Two experts, and documents of two domains."""
    for seed, name in enumerate(DOMAINS):
        make_checkpoint(tmp_path / "experts" / name, seed=seed)
        (tmp_path / f"{name}.txt").write_text("\n\f\n".join(make_documents(name, 8, seed=1)))
    return tmp_path


def score(folder: Path, *options: object, status: int = 0) -> str:
    domains = [f"{name}={folder / name}.txt" for name in DOMAINS]
    return call(
        "score", "--experts", folder / "experts", "--domain", *domains,
        "--store", folder / "store", *options, status=status,
    )  # fmt: skip


def test_scoring_in_parts_with_features(folder: Path) -> None:
    options = ("--features", "entropy,hidden=2", "--window", 24, "--stride", 8, "--json")
    half = json.loads(score(folder, "--shard", "1/2", *options))
    assert half["scored"]["code"] == {"code": [1, 1], "prose": [1, 1]}
    assert half["scored"]["prose"] == {"code": [0, 1], "prose": [0, 1]}
    assert half["nll_per_token"]["prose"] == {"code": None, "prose": None}
    assert "0 of 1 slices" in score(folder, "--shard", "1/2", *options[:-1])
    whole = json.loads(score(folder, "--shard", "2/2", *options))
    store = LogProbStore.open(folder / "store")
    for name in DOMAINS:
        mean = -float(store.token_log_probs("code", [name]).double().mean())
        # Sums of some hundred float64 in two orders.
        assert whole["nll_per_token"][name]["code"] == pytest.approx(mean, rel=1e-12)
    assert (store.corpus("code").window, store.corpus("code").stride) == (24, 8)
    spec = FeatureSpec(entropy=True, hidden=2)
    assert store.context_features("code", spec).shape == (store.corpus("code").tokens, 6)


def test_scoring_says_what_is_wrong(folder: Path) -> None:
    assert "--shard: expected I/N, such as 2/4, got '2'" in score(folder, "--shard", 2, status=2)
    assert "with i from 1 to n, got (3, 2)" in score(folder, "--shard", "3/2", status=2)
    assert "features: expected some of" in score(folder, "--features", "smell", status=2)
    assert not (folder / "store").exists()
    score(folder, "--dtype", "bfloat16")
    message = score(folder, "--dtype", "float32", status=2)
    assert "dtype is bfloat16 in the store but float32 here" in message


def test_an_experts_life(folder: Path, make_checkpoint: Callable[..., Path]) -> None:
    score(folder)
    fit = ("fit", "--store", folder / "store", "--out", folder / "modular")
    call(*fit, "--experts", folder / "experts")
    before = tree(folder)
    place = ("--model", folder / "modular", "--store", folder / "store")
    make_checkpoint(folder / "experts" / "new", seed=5)
    added = json.loads(call("expert", "add", folder / "experts" / "new", *place, "--json"))
    assert added["scored"] == {"code": [0, 1], "prose": [0, 1]}
    assert added["next"][0].endswith(f"--domain code=FILE prose=FILE --store {folder / 'store'}")
    score(folder)
    call(*fit, "--experts", folder / "experts")
    listed = json.loads(call("expert", "list", *place, "--json"))["experts"]
    assert [expert["name"] for expert in listed] == ["code", "new", "prose"]
    assert sum(expert["prior"] for expert in listed) == pytest.approx(1.0, abs=1e-12)
    table = call("expert", "list", "--store", folder / "store")
    assert listed[1]["sha256"][:8] in table

    full = tree(folder)
    for answer in ("n\n", ""):  # no, and nobody there
        line = call("expert", "remove", "new", *place, status=2, answer=answer)
        assert "not confirmed, so nothing was removed" in line
        assert tree(folder) == full
    removed = json.loads(call("expert", "remove", "new", *place, "--json", answer="y\n"))
    assert (removed["weights"], len(removed["verified"])) == ("deleted", 2)
    Path(removed["manifest"]).unlink()
    assert tree(folder) == before

    line = call("expert", "remove", "new", *place, "--yes", status=2)
    assert "no expert 'new'; it has: code, prose" in line
    shown = call("expert", "remove", "prose", *place, "--yes", "--keep-weights")
    assert "Bitwise equal" in shown
    assert (folder / "experts" / "prose" / "model.safetensors").exists()
    assert "give --experts, --store or --model" in call("expert", "list", status=2)


def test_a_path_is_printed_as_it_is(
    folder: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Square brackets in it are no styles, and what ``add`` prints can be typed."""
    monkeypatch.setenv("COLUMNS", "400")  # so that no table folds a path
    odd = folder / "[red]" / "[/x]"
    shutil.copytree(folder / "experts", odd)
    domains = [f"{name}={folder / name}.txt" for name in DOMAINS]
    given = ("--experts", odd, "--store", odd / "store")
    call("score", "--domain", *domains, *given)
    call("fit", *given, "--out", odd / "modular")
    shown = call("expert", "list", "--model", odd / "modular")
    assert str(odd / "code") in shown
    new = make_checkpoint(odd / "new", seed=6)
    place = ("--model", odd / "modular", "--store", odd / "store")
    shown = call("expert", "add", new, *place)
    assert f"robustgate score --experts {new} --domain" in shown
    assert "No such option" in call("expert", "add", new, *place, "--name", "legal", status=2)
    shown = call("expert", "remove", "prose", *place, "--yes")
    assert str(odd / "modular" / "opt-out-prose-") in shown
    assert f"checkpoint {new}" in shown
