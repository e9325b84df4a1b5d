"""The study of ``benchmarks/domains``, from text to tables, on five small domains made here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from .conftest import make_documents

pytest.importorskip("matplotlib")
STUDY = Path(__file__).parents[2] / "benchmarks" / "domains"


def test_it_runs_from_text_to_tables_and_does_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    import judging
    import options
    import presets
    import run
    import summary
    import tune

    data, out = tmp_path / "data", tmp_path / "study"
    domains = ("wiki", "code", "math", "legal", "letters")  # one that the study does not have
    for place, name in enumerate(domains):
        (data / name).mkdir(parents=True)
        documents = make_documents(("code", "prose")[place % 2], 24, seed=place)
        for split, part in (("train", documents[:12]), ("valid", documents[12:18])):
            (data / name / f"{split}.txt").write_text("\f\n".join(part))
        (data / name / "test.txt").write_text("\f\n".join(documents[18:]))
    given = options.parser("Test.").parse_args(["--preset", "quick", "--data", str(data)])
    preset = options.chosen(given)
    assert preset == replace(presets.QUICK, domains=domains)
    preset = replace(preset, seed_steps=2, branch_steps=2, vocab_size=300, context=32)
    gates = {name: presets.GATES[name] for name in ("prior", "token mlp", "token transformer")}
    monkeypatch.setattr(judging, "GATES", gates)

    def make() -> None:
        run.claim(out, "quick", preset)
        run.training.tokenizer(data, out, preset)
        for stage in run.stages(preset, 1):
            for task, seed in stage:
                task(data, out, preset, seed)

    make()
    found = [summary.summarise(out, 0)]
    run.write(found, out)
    systems = json.loads((out / "results.json").read_text())[0]["systems"]["experts"]
    assert {"monolith", "monolith-brief", "monolith-small", *gates} - {"prior"} <= set(systems)
    assert all(len(system["nll"]) == 5 for system in systems.values())
    models = found[0].models
    assert models["monolith"]["parameters"] >= 5 * models["small"]["parameters"] * 0.9
    assert models["monolith"]["tokens"] == models["small"]["tokens"]
    assert models["brief"]["tokens"] * 5 <= models["small"]["tokens"]
    text = (out / "table.md").read_text()
    assert "it beats the brief monolith" in text
    assert (out / "excess.svg").exists()

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    make()
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    own = tune.loss(data, out, preset, "experts")
    assert list(own) == list(domains)
    assert min(own.values()) > 0
    assert (
        before.items()
        <= {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}.items()
    )

    other = tune.loss(data, out, preset, "brief", "brief_rate=4e-2", "schedule=cosine", "scale=0.1")
    assert other != tune.loss(data, out, preset, "brief")
    changed = tune.changed(preset, "seed_steps=5", "scale=0.1")
    assert (changed.seed_steps, changed.monolith["initializer_range"]) == (5, 0.1)
    for wrong in ("rate=1", "seed_steps=x", "seed_steps", "expert=1", "schedule=x"):
        with pytest.raises(
            ValueError, match=r"expected FIELD=VALUE|invalid literal|expected one of"
        ):
            tune.changed(preset, wrong)
