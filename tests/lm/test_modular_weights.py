"""The least favourable mixture as data weights, from the model and from the command line."""

from __future__ import annotations

import json

import pytest
import torch
from scored import make_store, random_corpora
from torch.utils.data import WeightedRandomSampler
from typer.testing import CliRunner

from robustgate import cli
from robustgate.lm.gates.data_weights import DataWeights, data_weights
from robustgate.lm.gates.fit import fit
from robustgate.lm.modular import ModularModel


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    corpora = random_corpora(("x", "y", "z"), experts=2, documents=6)
    corpora["z"] = corpora["y"]  # two experts, and two domains that are the same
    fit(make_store(folder / "store", corpora, ("a", "b")), folder / "modular")
    return ModularModel.load(folder / "modular")


def run(*args):
    result = CliRunner().invoke(cli.app, ["weights", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_weights_are_the_mixture_and_sum_to_1(model):
    found = data_weights(model)
    assert list(found.mixture.values()) == pytest.approx(model.mixture.tolist(), rel=1e-12)
    assert sum(found.mixture.values()) == pytest.approx(1, abs=1e-15)
    assert found.documents == {"x": 6, "y": 6, "z": 6}
    assert found.per_document["x"] == pytest.approx(found.mixture["x"] / 6, rel=1e-15)


def test_documents_of_a_data_set_are_drawn_in_these_shares():
    found = DataWeights({"x": 0.7, "y": 0.3}, {"x": 2, "y": 2})
    domains = ["x"] * 5 + ["y"] * 40
    weights = found.of(domains)
    assert weights[0] == pytest.approx(0.14)
    assert weights[-1] == pytest.approx(0.3 / 40)
    torch.manual_seed(0)
    drawn = list(WeightedRandomSampler(weights.tolist(), 4000))
    share = sum(index < 5 for index in drawn) / 4000
    assert abs(share - 0.7) < 4 * (0.7 * 0.3 / 4000) ** 0.5  # four standard errors
    with pytest.raises(ValueError, match="domains: expected some of x, y, got w"):
        found.of(["w", "x"])


def test_weights_of_documents_are_not_rounded_on_the_way():
    given = DataWeights({"a": 0.1, "b": 0.9}, {"a": 1, "b": 3}).of(["b", "a", "b", "b"])
    assert given.tolist() == [0.9 / 3, 0.1, 0.9 / 3, 0.9 / 3]


def test_other_numbers_of_documents(model):
    found = data_weights(model, {"z": 30, "x": 10, "y": 20})
    assert list(found.documents.items()) == [("x", 10), ("y", 20), ("z", 30)]
    for wrong in ({"x": 1}, {"x": 1, "y": 0, "z": 1}):
        with pytest.raises(ValueError, match="a number >= 1 for each of x, y, z"):
            data_weights(model, wrong)


def test_the_command_prints_text_json_and_csv(tmp_path, model):
    found = data_weights(model)
    whole = json.loads(run("--model", model.path, "--json"))
    assert whole == found.to_json() == json.loads(run("--model", model.path, "--format", "json"))
    lines = run("--model", model.path, "--format", "csv").splitlines()
    assert lines[0] == "domain,weight,documents,weight_per_document"
    name, weight, count, each = lines[1].split(",")
    assert (name, float(weight), int(count)) == ("x", found.mixture["x"], 6)
    assert float(each) == found.per_document["x"]
    assert f"{found.mixture['x']:.6f}" in run("--model", model.path)

    pairs = []
    for name, count in (("x", 3), ("y", 4), ("z", 5)):
        (tmp_path / f"{name}.txt").write_text("\n\f\n".join(f"text {n}" for n in range(count)))
        pairs.append(f"{name}={tmp_path / name}.txt")
    counted = json.loads(run("--model", model.path, "--domain", *pairs, "--json"))
    assert counted["documents"] == {"x": 3, "y": 4, "z": 5}


def test_a_model_of_version_1_reads_as_a_prior_and_says_that_documents_were_not_counted(
    tmp_path, model
):
    (tmp_path / "old").mkdir()
    manifest = json.loads((model.path / "manifest.json").read_text())
    gate = manifest["gate"]["file"]
    (tmp_path / "old" / gate).write_bytes((model.path / gate).read_bytes())
    del manifest["gate"]["spec"], manifest["documents"], manifest["training"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps({**manifest, "version": 1}))
    old = ModularModel.load(tmp_path / "old")
    assert old.kind == "prior"
    assert old.training is None
    assert torch.equal(old.prior, model.prior)
    assert torch.equal(old.gate().log_prior, model.prior.log())
    assert old.features.width(3) == 0
    with pytest.raises(ValueError, match="before documents were counted"):
        data_weights(old)
    assert data_weights(old, {"x": 1, "y": 1, "z": 1}).documents["x"] == 1
