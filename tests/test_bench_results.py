"""What ``robustgate bench`` writes and prints: CSV files, tables, charts, profiles."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench_cases import CPU, SIZES, changed, measure, tiny
from typer.testing import CliRunner

import robustgate as rg
from robustgate import cli
from robustgate.bench import command
from robustgate.bench.command import run_bench
from robustgate.bench.plan import plan
from robustgate.bench.results import kind_of, read_csv, write_csv

PAGES = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def measured():
    tasks = plan(["jsd", "linear_mixture_nll"], ["forward", "frozen"], sizes=SIZES)
    rows = [row for task in tasks for row in measure(task).rows]
    return [replace(row, contended=False) for row in rows]


def test_csv_round_trip(measured, tmp_path):
    path = tmp_path / "rows.csv"
    write_csv(measured, path)
    assert read_csv(path) == measured
    assert all(row.speedup_compiled is None for row in measured)
    path.write_text(path.read_text().replace("median_us", "seconds"))
    with pytest.raises(ValueError, match=r"rows\.csv: expected the columns op,mode,variant"):
        read_csv(path)


def test_csv_errors_name_the_line(measured, tmp_path):
    path = tmp_path / "rows.csv"
    write_csv(measured[:2], path)
    path.write_text(path.read_text().replace(",12,", ",twelve,", 1))
    with pytest.raises(ValueError, match=r"rows\.csv: line 2: invalid literal"):
        read_csv(path)


def test_kinds():
    names = ["robustgate", "eager log_softmax", "compiled x", "TRL generalized_jsd_loss"]
    assert [kind_of(name) for name in names] == ["robustgate", "eager", "compiled", "peer"]


@pytest.fixture
def tables(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(PAGES)
    import tables

    yield tables
    for name in ("tables", "charts"):
        sys.modules.pop(name)


def test_tables_and_charts_from_a_csv(measured, tables, tmp_path, monkeypatch):
    compiled = [
        replace(row, variant="compiled x", median_us=2 * row.median_us, speedup_compiled=1.0)
        for row in measured
        if row.kind == "robustgate"
    ]
    peer = replace(measured[0], variant="TRL loss", median_us=3 * measured[0].median_us)
    write_csv([*measured, *compiled, peer], tmp_path / "cpu.csv")
    swept = [replace(row, sweep="rows") for row in measured if row.mode == "forward"]
    larger = [replace(row, rows=24) for row in swept]
    write_csv([*swept, *larger], tmp_path / "scaling.csv")
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    markers = "<!-- speed -->\nold\n<!-- /speed -->\n"
    readme.write_text(f"before\n{markers}after\n")
    page.write_text(f"{markers}<!-- formulas -->\n<!-- /formulas -->\n")
    options = {"cpu": "cpu.csv", "scaling": "scaling.csv", "readme": "README.md", "page": "page.md"}
    argv = [f"--{name}={tmp_path / file}" for name, file in options.items()]
    monkeypatch.setattr(sys, "argv", ["tables.py", *argv, f"--figures={tmp_path / 'figures'}"])
    tables.main()

    short = readme.read_text()
    assert short.startswith("before\n<!-- speed -->\n## Speed")
    assert short.endswith("<!-- /speed -->\nafter\n")
    assert "old" not in short
    ours = measured[0]
    line = next(text for text in short.splitlines() if text.startswith("| `jsd` | float32"))
    assert line.split(" | ")[2] == f"{ours.median_us / 1e3:.2f}"
    long = page.read_text()
    assert "| TRL loss | `jsd`, K = 2 | float32 | forward | 1 |" in long
    assert long.count("| eager kl_div |") == 4  # two dtypes, two modes
    charts = {file.name for file in (tmp_path / "figures").iterdir()}
    assert charts == {
        "speed_forward.svg",  # nothing was measured forward + backward
        "scaling_jsd_forward_float32.svg",
        "scaling_jsd_forward_bfloat16.svg",
        "scaling_linear_mixture_nll_forward_float32.svg",
        "scaling_linear_mixture_nll_forward_bfloat16.svg",
    }
    for name in charts:
        assert f"figures/{name}" in long

    write_csv([replace(row, contended=True) for row in measured], tmp_path / "cpu.csv")
    with pytest.raises(SystemExit, match=r"cpu\.csv holds rows taken beside a busy neighbour"):
        tables.main()


def test_the_page_shows_the_formulas_that_are_evaluated(tables):
    text = (PAGES / "README.md").read_text(encoding="utf-8")
    assert f"<!-- formulas -->\n{tables.formula_table()}\n<!-- /formulas -->" in text


# --- the command ------------------------------------------------------------------------------


def call(*arguments):
    result = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_quick_run_prints_and_writes(tmp_path):
    path = tmp_path / "out.csv"
    options = ("--quick", "--op", "jsd", "--mode", "forward", "--rows", "5", "--out", str(path))
    text = call(*options)
    assert "jsd forward bfloat16, 1 thread" in text
    assert "eager kl_div" in text
    data = json.loads(call(*options, "--json"))
    assert data["skipped"] == []
    written = read_csv(path)
    assert len(written) == len(data["rows"]) == 8  # two dtypes, ours and three formulations
    assert {row.rows for row in written} == {5}


def test_what_is_done_is_kept_when_a_later_measurement_fails(tmp_path, monkeypatch):
    path = tmp_path / "out.csv"
    wrong = changed(tiny("mixture_nll"), ours=lambda *arguments: -rg.mixture_nll(*arguments))
    with pytest.raises(RuntimeError, match="robustgate is wrong"):
        run_bench([tiny("jsd"), wrong], CPU, quick=True, out=path)
    assert {row.op for row in read_csv(path)} == {"jsd"}
    monkeypatch.setattr(command, "measure", lambda *_, **__: pytest.fail("measured for nothing"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_bench([tiny("jsd")], CPU, quick=True, out=tmp_path / "nowhere" / "out.csv")


def test_what_was_not_timed_is_said_once():
    text = call("--quick", "--op", "generalized_jsd", "--mode", "forward", "--peers")
    assert text.count("generalized_jsd, Liger-Kernel JSD: runs on cuda only") == 1


def test_profile_shows_the_raw_op():
    options = ("--profile", "--quick", "--dtype", "float32", "--mode", "forward")
    assert "robustgate::mixture_nll" in call(*options, "--op", "mixture_nll")
    data = json.loads(call(*options, "--op", "linear_mixture_nll", "--json"))
    (entries,) = data["profiles"].values()
    names = [entry["name"] for entry in entries]
    assert "aten::mm" in names
    assert sum(entry["share"] for entry in entries) <= 1 + 1e-9
