"""Training: it learns, resumes to the same bits, and ships nothing of the Trainer."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from robustgate.lm.checkpoint import load_model
from robustgate.lm.corpus import Corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.tokenizer import encode, load_tokenizer, train_tokenizer
from robustgate.lm.training.packing import PackedRows
from robustgate.lm.training.train import MANIFEST, TrainResult, train

from .conftest import fork, make_documents, tree

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "attention_dropout": 0.1,  # draws random numbers in every step
}
DATA = Corpus.of("code", make_documents("code", 30))
FILES = ["config.json", "generation_config.json", "model.safetensors", MANIFEST]
FILES += ["tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def run(tokenizer_path: Path) -> Callable[..., TrainResult]:
    """Train a tiny model for 12 steps."""
    return partial(
        train,
        DATA,
        config=CONFIG,
        tokenizer=tokenizer_path,
        context=16,
        steps=12,
        batch_size=4,
        learning_rate=1e-2,
        progress=False,
    )


def test_it_learns_and_ships_a_checkpoint(run: Callable[..., TrainResult], tmp_path: Path) -> None:
    result = run(out=tmp_path / "expert", steps=60)
    assert result.path == tmp_path / "expert"
    assert (result.steps, result.tokens, result.resumed_from) == (60, 60 * 4 * 16, 0)
    assert result.loss < 0.6 * math.log(300)
    assert sorted(tree(tmp_path)) == [f"expert/{name}" for name in sorted(FILES)]
    assert {path.stat().st_mode & 0o777 for path in result.path.iterdir()} == {
        (result.path / "config.json").stat().st_mode & 0o777
    }
    experts = ExpertSet.open(result.path)
    assert experts.context == 16
    assert result.parameters == sum(w.numel() for w in experts.load("expert").parameters())
    manifest = json.loads((result.path / MANIFEST).read_text())
    assert manifest["settings"]["data"] == [{"name": "code", "sha256": DATA.sha256}]
    assert manifest["tokenizer_sha256"] == experts.tokenizer_sha256
    assert (manifest["ancestor"], manifest["tokens"]) == (None, result.tokens)
    assert manifest["versions"]["torch"] == torch.__version__
    assert "/" not in json.dumps(manifest).replace(torch.__version__, "")  # no paths


def test_a_seed_decides_and_the_caller_keeps_his_generators(
    run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    one = run(out=tmp_path / "one").path
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert before == after
    torch.rand(3)
    again, other = run(out=tmp_path / "again").path, run(out=tmp_path / "other", seed=1).path
    weights = [(path / "model.safetensors").read_bytes() for path in (one, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert tree(one) == tree(again)


def test_bfloat16_products_leave_float32_weights(
    run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    plain = run(out=tmp_path / "plain", steps=60)
    half = run(out=tmp_path / "half", steps=60, bf16=True)
    assert 1e-5 < abs(half.loss - plain.loss) < 0.1 * plain.loss
    weights = load_model(half.path).state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any((weight != weight.bfloat16()).any() for weight in weights.values())
    with pytest.raises(ValueError, match="bf16 True there, False here"):
        run(out=tmp_path / "half", steps=60)


def test_a_branch_of_a_seed_checkpoint(run: Callable[..., TrainResult], tmp_path: Path) -> None:
    seed = run(out=tmp_path / "seed").path
    prose = Corpus.of("prose", make_documents("prose", 30))
    branch = partial(train, prose, init=seed, context=16, batch_size=4, progress=False)
    still = branch(tmp_path / "still", steps=1, learning_rate=0.0)
    for name, weight in load_model(seed).state_dict().items():
        assert torch.equal(load_model(still.path).state_dict()[name], weight)
    moved = branch(tmp_path / "moved", steps=12, learning_rate=1e-2)
    assert ExpertSet.open([seed, moved.path]).names == ("seed", "moved")
    manifest = json.loads((moved.path / MANIFEST).read_text())
    ancestor = json.loads((seed / MANIFEST).read_text())
    assert manifest["ancestor"] == ancestor
    assert manifest["settings"]["init"] == ExpertSet.open(seed).sha256("seed")


def test_tokens_and_passes(run: Callable[..., TrainResult], tmp_path: Path) -> None:
    assert run(out=tmp_path / "tokens", steps=None, tokens=700).steps == 700 // 64
    tokenizer = load_tokenizer(Path(tmp_path / "tokens"))
    tokens = len(encode(tokenizer, DATA.documents).ids)
    assert run(out=tmp_path / "pass", steps=None).steps == tokens // 64


def test_without_a_tokenizer_one_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("\n\f\n".join(DATA.documents))
    short = partial(train, path, steps=2, context=8, batch_size=2, vocab_size=280, progress=False)
    first, second = short(tmp_path / "first"), short(tmp_path / "second")
    assert tree(first.path) == tree(second.path)
    assert len(load_tokenizer(first.path)) == 280
    config = json.loads((first.path / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("llama", 280)
    assert config["max_position_embeddings"] == 8


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_resumes_to_the_same_bits(
    run: Callable[..., TrainResult], tmp_path: Path, killed: Callable[..., bool]
) -> None:
    """Killed around writes of checkpoints and of the result, and at a random time."""
    often = partial(run, steps=6, checkpoint_seconds=0.0)
    began = time.monotonic()
    whole = tree(often(out=tmp_path / "whole").path)
    seconds = time.monotonic() - began
    resumed = set()
    for at in (3, 25, 40, 56, 59, 64):
        out = tmp_path / f"{at}"
        assert killed(partial(often, out=out), at=at)
        (tmp_path / f".{at}.run" / "checkpoint-99").mkdir()  # one that was not finished
        result = often(out=out)
        assert tree(out) == whole
        resumed.add(result.resumed_from)
    assert len(resumed) > 3
    out = tmp_path / "random"
    killed(partial(often, out=out), after=random.Random(0).uniform(0, seconds))
    assert tree(often(out=out).path) == whole
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_keeps_the_last_checkpoint(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that fails leaves the one before it, and the run goes on from there."""
    whole = tree(run(out=tmp_path / "whole").path)
    save, left = torch.save, 7

    def full(content: object, path: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            Path(path).write_bytes(b"cut short")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6 vs 2")
        save(content, path)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"the disk is full; no half-written file.*expert\.run"):
            run(out=tmp_path / "expert", checkpoint_seconds=0.0)
    assert [path.name for path in tmp_path.glob(".expert.run/checkpoint*")] == ["checkpoint-1"]
    result = run(out=tmp_path / "expert")
    assert result.resumed_from == 1
    assert tree(result.path) == whole


def test_rows_are_a_function_of_seed_and_pass() -> None:
    ids = torch.arange(103)
    rows = PackedRows(ids, context=10, rows=25, seed=3)
    read = rows.__getitems__(list(range(25)))["input_ids"]
    assert read.shape == (25, 10)
    for start in (0, 10):  # every pass holds each row once; the last 3 tokens fill no row
        assert sorted(read[start : start + 10].flatten().tolist()) == list(range(100))
    assert not torch.equal(read[:10], read[10:20])
    again = PackedRows(ids, context=10, rows=12, seed=3)
    assert torch.equal(again[11]["labels"], read[11:12])
    assert not torch.equal(PackedRows(ids, 10, 10, seed=4)[0]["labels"], read[:1])


def test_a_checkpoint_of_a_version_that_knew_no_bfloat16(
    run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    out = tmp_path / "expert"
    run(out=out, steps=1)
    manifest = json.loads((out / MANIFEST).read_text())
    del manifest["settings"]["bf16"]
    (out / MANIFEST).write_text(json.dumps(manifest))
    assert run(out=out, steps=1).resumed_from == 1
    with pytest.raises(ValueError, match="bf16 False there, True here"):
        run(out=out, steps=1, bf16=True)


def test_a_finished_folder_is_not_trained_again(
    run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    out = tmp_path / "expert"
    first = run(out=out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run(out=out)
    assert (again.resumed_from, again.loss) == (12, first.loss)
    with pytest.raises(ValueError, match="expert: trained with other settings") as caught:
        run(out=out, learning_rate=1e-3, seed=5)
    assert "learning_rate 0.01 there, 0.001 here; seed 0 there, 5 here" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_an_unfinished_run_with_other_settings(
    run: Callable[..., TrainResult], tmp_path: Path, killed: Callable[..., bool]
) -> None:
    out = tmp_path / "expert"
    assert killed(partial(run, out=out, checkpoint_seconds=0.0), at=40)
    with pytest.raises(
        ValueError, match=r"\.expert\.run: trained with other.*seed 0 there, 1 here"
    ):
        run(out=out, seed=1)
    assert run(out=out, seed=1, resume=False).resumed_from == 0
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]


def test_two_processes_do_not_train_one_folder(
    run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    out = tmp_path / "expert"
    lock = tmp_path / ".expert.run" / "lock"

    child = fork(partial(run, out=out, steps=10_000))
    while not lock.exists() or not list(lock.parent.glob("settings.json")):
        time.sleep(0.01)
    try:
        with pytest.raises(BlockingIOError, match=r"another process is at work here.*expert\.run"):
            run(out=out, steps=10_000)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_schedules_rise_and_then_fall_to_0_or_stay(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.lr_scheduler.LambdaLR.step

    def recorded(self: torch.optim.lr_scheduler.LambdaLR, *args: object) -> None:
        step(self, *args)
        rates.append(self.get_last_lr()[0])

    monkeypatch.setattr(torch.optim.lr_scheduler.LambdaLR, "step", recorded)
    falls = {
        "linear": [(8 - made) / 8 for made in range(9)],
        "cosine": [(1 + math.cos(math.pi * made / 8)) / 2 for made in range(9)],
        "constant": [1.0] * 9,
    }
    for schedule, fall in falls.items():
        rates.clear()
        run(out=tmp_path / schedule, steps=12, warmup=0.3, learning_rate=4e-3, schedule=schedule)
        assert rates == pytest.approx([0, 1e-3, 2e-3, 3e-3, *(4e-3 * rate for rate in fall)])


def test_divergence_is_named_and_nothing_is_published(
    run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"the loss is nan at step \d+: lower learning_rate"):
        run(out=tmp_path / "expert", learning_rate=1e30)
    assert not (tmp_path / "expert").exists()


def test_bad_settings_are_named(
    run: Callable[..., TrainResult], tmp_path: Path, tokenizer_path: Path
) -> None:
    out = tmp_path / "expert"
    cases = [
        ({"context": 1}, "context: expected at least 2, got 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"tokens": 5}, "steps, tokens: expected one, got 12 and 5"),
        ({"schedule": "step"}, "schedule: expected one of cosine, linear, constant, got 'step'"),
        ({"warmup": 2.0}, r"warmup: expected a share from 0 to 1, got 2\.0"),
        ({"context": 10**6}, "data: .* tokens do not fill one row of 1000000; give more documents"),
        ({"config": {**CONFIG, "vocab_size": 290}}, "config: vocab_size is 290, the tokenizer has"),
        (
            {"config": {**CONFIG, "max_position_embeddings": 8}},
            "config: max_position_embeddings is 8, context is 16",
        ),
        ({"config": {"model_type": "unheard-of"}}, "config: no causal language model can be made"),
        ({"config": {"model_type": "vit"}}, "config: no causal language model can be made"),
        ({"tokenizer": tmp_path}, "no readable tokenizer"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            run(out=out, resume=False, **change)
        assert not out.exists()
    with pytest.raises(ValueError, match="data: expected at least one corpus, got none"):
        train([], out)
    with pytest.raises(FileNotFoundError, match=r"gone\.txt: no such file"):
        train(tmp_path / "gone.txt", out)
    out.mkdir()
    with pytest.raises(FileExistsError, match="expert: already exists and was not trained here"):
        run(out=out)


def test_bad_seed_checkpoints_are_named(
    experts_path: Path, tmp_path: Path, run: Callable[..., TrainResult]
) -> None:
    branch = partial(train, DATA, tmp_path / "expert", steps=1, batch_size=1, progress=False)
    with pytest.raises(ValueError, match="config: a model started from init keeps its own"):
        branch(init=experts_path / "code", config=CONFIG)
    with pytest.raises(ValueError, match=r"context: .*code reads at most 32 tokens, got 64"):
        branch(init=experts_path / "code", context=64)
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        branch(init=tmp_path / "gone")
    train_tokenizer(["other words"], 260, other := tmp_path / "other")
    with pytest.raises(ValueError, match=r"tokenizer: not that of .*code; leave it out"):
        branch(init=experts_path / "code", tokenizer=other)


def test_nothing_is_printed_but_the_bar(
    run: Callable[..., TrainResult],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from robustgate.lm import progress

    monkeypatch.setattr(progress, "DELAY", 3600.0)
    run(out=tmp_path / "silent")
    run(out=tmp_path / "quick", progress=True)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(progress, "DELAY", 0.0)
    run(out=tmp_path / "long", progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "loss" in shown.err
    assert "12/12" in shown.err
