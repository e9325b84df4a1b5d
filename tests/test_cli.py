"""The command line: every command from end to end, machine output, and what each error says."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from robustgate import __version__, cli
from robustgate.console import describe, flatten, spread

WORDS = {
    "code": "def return for in range self class if else print None True",
    "prose": "the river ran through a quiet town where nobody had seen snow",
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def call(*args, status=0):
    """Run a command in this process and return its standard output."""
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code == status, result.output
    return result.stdout


def fails(*args, status=2):
    """Run a command that fails and return the one line it says."""
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    return line


def documents(domain, split, count):
    draw = random.Random(f"{domain} {split}")
    return [
        " ".join(draw.choices(WORDS[domain].split(), k=draw.randint(20, 60))) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text of two domains."""
    folder = tmp_path_factory.mktemp("cli")
    for domain in WORDS:
        (folder / domain).mkdir()
        for split, count in (("train", 60), ("valid", 12), ("test", 12)):
            text = "\n\f\n".join(documents(domain, split, count))
            (folder / domain / f"{split}.txt").write_text(text)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def domains(folder, split):
    return [f"{name}={folder / name / split}.txt" for name in WORDS]


@pytest.fixture(scope="module")
def run(folder):
    """Everything from training to the report, and what each command printed as JSON."""
    settings = ("--context", 32, "--tokens", 2_000, "--batch-size", 4, "--json")
    texts = [folder / name / "train.txt" for name in WORDS]
    seed = ("--config", folder / "config.json", "--vocab-size", 300)
    printed = {"seed": call("train", "--data", *texts, "--out", folder / "seed", *seed, *settings)}
    for name in WORDS:
        printed[f"train {name}"] = call(
            "train", "--data", folder / name / "train.txt", "--out", folder / "experts" / name,
            "--init", folder / "seed", *settings,
        )  # fmt: skip
    experts = [folder / "experts" / name for name in WORDS]
    printed["score"] = call(
        "score", "--experts", *experts, "--domain", *domains(folder, "valid"),
        "--store", folder / "store", "--json",
    )  # fmt: skip
    printed["fit"] = call(
        "fit", "--store", folder / "store", "--experts", *experts, "--gate", "prior",
        "--out", folder / "modular", "--json",
    )  # fmt: skip
    printed["evaluate"] = call(
        "evaluate", "--model", folder / "modular", "--domain", *domains(folder, "test"),
        "--baselines", "all", "--monolith", folder / "seed", "--json",
    )  # fmt: skip
    printed["report"] = call(
        "report", "--run", folder / "modular", "--out", folder / "report", "--json"
    )
    return {name: json.loads(text) for name, text in printed.items()}


def test_training_says_what_it_did(run, folder):
    assert run["seed"]["tokens"] == 2_000 // 128 * 128
    assert run["train code"]["parameters"] == run["seed"]["parameters"]
    assert Path(run["train prose"]["path"]) == folder / "experts" / "prose"


def test_scores_are_the_losses_that_evaluation_finds(run, folder):
    nll = run["score"]["nll_per_token"]
    assert nll["code"]["code"] < nll["prose"]["code"]
    assert nll["prose"]["prose"] < nll["code"]["prose"]
    again = json.loads(
        call(
            "evaluate",
            "--model",
            folder / "modular",
            "--domain",
            *domains(folder, "valid"),
            "--store",
            folder / "store",
            "--json",
        )
    )
    for system in again["systems"]:
        for result in system["domains"]:
            if system["kind"] == "expert":
                # A mean of a few hundred float32 values, once per token and once per document.
                assert result["nll_per_token"] == pytest.approx(
                    nll[system["name"]][result["domain"]], rel=1e-12
                )


def test_fit_prints_prior_and_certificate(run):
    assert sum(run["fit"]["prior"].values()) == pytest.approx(1, rel=1e-12)
    proven = run["fit"]["certificate"]
    assert proven["lower_bound"] <= proven["upper_bound"] <= proven["lower_bound"] + 1e-6
    assert proven["sentence"].startswith("Whatever the mixture of the 2 domains")


def test_evaluation_and_report(run):
    names = [system["name"] for system in run["evaluate"]["systems"]]
    assert names[:3] == ["code", "prose", "monolith"]
    assert "robust Bayes mixture" in names
    for file in run["report"].values():
        assert Path(file).stat().st_size > 1_000


def test_commands_print_text_for_people(run, folder):
    text = call("fit", "--store", folder / "store", "--out", folder / "other")
    assert "prior weight" in text
    assert "Whatever the mixture" in text
    text = call(
        "evaluate", "--model", folder / "modular", "--domain", *domains(folder, "test"),
        "--baselines", "oracle,uniform",
    )  # fmt: skip
    assert "robust Bayes mixture" in text
    assert "expert code" not in text
    assert call("report", "--run", folder / "modular", "--out", folder / "r").count("\n") == 2
    assert "cpu.instruction_set" in call("env")
    assert json.loads(call("env", "--json"))["robustgate"] == __version__
    assert call("--version") == f"{__version__}\n"


def test_no_command_without_help():
    assert "demo" in call("--help")
    for command in cli.app.registered_commands:
        assert "--json" in call(command.callback.__name__, "--help")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("score", "--experts", "none", "--domain", "a", "--store", "s"), "expected NAME=FILE"),
        (
            ("score", "--experts", "none", "--domain", "code={0}/code/valid.txt",
             "code={0}/code/test.txt", "--store", "s"),
            "'code' is given twice",
        ),
        (("score", "--experts", "none", "--domain", "a=none.txt", "--store", "s"), "no such file"),
        (
            ("score", "--experts", "{0}/nothing", "--domain", "code={0}/code/valid.txt",
             "--store", "s"),
            "no such folder",
        ),
        (("fit", "--store", "{0}/code", "--out", "m"), "not a log-prob store"),
        (("report", "--run", "{0}/code", "--out", "r"), "not a modular model"),
        (
            ("evaluate", "--model", "{0}/code", "--domain", "a={0}/code/test.txt"),
            "not a modular model",
        ),
        (("train", "--data", "{0}/config.json", "--out", "e"), "unknown extension '.json'"),
        (("train", "--data", "{0}/code/train.txt", "--out", "e", "--context", "1"), "context"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(folder, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(*(arg.format(folder) for arg in args))


def test_unknown_baseline_and_gate(run, folder):
    line = fails(
        "evaluate", "--model", folder / "modular", "--domain", *domains(folder, "test"),
        "--baselines", "magic",
    )  # fmt: skip
    assert "baselines: expected any of experts, oracle, bounds, static, previous," in line
    assert line.rstrip().endswith("got 'magic'")
    call("fit", "--store", folder / "store", "--out", folder / "x", "--gate", "magic", status=2)
    call("fit", "--store", folder / "store", status=2)


def test_invalid_utf_8_is_named_by_file_and_line(folder, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine\nnot \xff fine\n")
    assert "bad.txt: line 2" in fails(
        "train", "--data", tmp_path / "bad.txt", "--out", tmp_path / "e"
    )


def test_a_full_disk_is_a_failure_and_leaves_nothing(run, folder, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = fails("fit", "--store", folder / "store", "--out", tmp_path / "m", status=1)
    assert "disk is full" in line
    assert [path.name for path in (tmp_path / "m").glob("*")] == [".lock"]


def test_an_interrupted_command_has_status_130(folder, monkeypatch):
    import robustgate.lm.report

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(robustgate.lm.report, "write_report", interrupted)
    result = CliRunner().invoke(cli.app, ["report", "--run", str(folder), "--out", "r"])
    assert result.exit_code == 130
    assert "continues where it stopped" in result.stderr


def test_debug_shows_where_an_error_came_from(folder, monkeypatch):
    monkeypatch.setenv("ROBUSTGATE_DEBUG", "1")
    result = CliRunner().invoke(cli.app, ["report", "--run", str(folder), "--out", "r"])
    assert isinstance(result.exception, FileNotFoundError)


def test_a_missing_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = fails("train", "--data", folder / "code" / "train.txt", "--out", tmp_path / "e")
    assert 'pip install "robustgate[lm]"' in line


def test_spread_repeats_an_option_for_each_of_its_values():
    options = {"--experts", "--domain"}
    assert spread(["--experts", "a", "b", "--store", "s", "t"], options) == [
        "--experts", "a", "--experts", "b", "--store", "s", "t",
    ]  # fmt: skip
    assert spread(["--domain=x", "--domain", "y"], options) == ["--domain=x", "--domain", "y"]
    assert spread(["--domain"], options) == ["--domain"]
    assert spread([], options) == []


def test_errors_become_one_line():
    assert describe(ValueError("two\nlines")) == "two lines"
    assert describe(KeyError("no expert")) == "no expert"
    assert describe(OSError(errno.ENOENT, "No such file", "a.txt")) == "a.txt: No such file"
    assert describe(MemoryError()) == "MemoryError"


def test_flatten_names_leaves():
    assert flatten({"a": {"b": 1, "c": [2, 3]}, "d": None}) == [
        ("a.b", "1"), ("a.c", "2, 3"), ("d", "None"),
    ]  # fmt: skip


def test_quick_demo_from_end_to_end(tmp_path):
    """The command as a user runs it: a process of its own, results and progress apart."""
    code = "from robustgate.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "demo", "--quick", "--out", str(tmp_path / "d"), "--json"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert "[7/7]" in result.stderr
    assert Path(printed["report"]).is_file()
    robust = [s for s in printed["evaluation"]["systems"] if s["kind"] == "robust"]
    experts = [s for s in printed["evaluation"]["systems"] if s["kind"] == "expert"]
    assert len(robust) == 1
    assert len(experts) >= 3
    # No expert is good everywhere, the mixture is: it pays nats a document where they pay hundreds.
    worst = robust[0]["worst_excess_per_document"]["value"]
    assert all(worst < 0.1 * s["worst_excess_per_document"]["value"] for s in experts)
    assert worst <= printed["model"]["certificate"]["guarantee"]
