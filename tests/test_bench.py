"""The benchmark's machinery on tiny shapes: gate, formulas, CSV. No time is asserted."""

import csv

import pytest
import torch

from robustgate.bench import mixture_nll, run
from robustgate.bench.measure import Timing, interleaved
from robustgate.bench.mixture_nll import EAGER, MODES, Shape

CPU = torch.device("cpu")
TINY = Shape(6, 2, 50)


@pytest.fixture
def quick(monkeypatch):
    """Ours and eager only: compiling takes seconds and is torch's business."""
    variants = {
        "robustgate": mixture_nll._ours,
        **EAGER,
        "compiled as eager": EAGER["eager logsumexp"],
    }
    monkeypatch.setattr(mixture_nll, "variants", lambda: variants)
    monkeypatch.setattr(run, "copy_rate", lambda device: 10.0)
    return variants


def test_every_mode_measures_every_variant_and_writes_csv(quick, tmp_path):
    steps = []
    rows = run.measure_all([TINY], [torch.float32], [1], CPU, seconds=0.01, on_step=steps.append)
    assert len(rows) == len(MODES) * len(quick)
    assert len(steps) == len(MODES)
    for row in rows:
        moved = MODES[row.mode] * 2 * 6 * 50 * 4
        assert row.gigabytes_per_second == pytest.approx(moved / row.median_us / 1e3, abs=0.01)
        assert row.error < 1e-4
    run.write_csv(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["variant"] for row in read] == [row.variant for row in rows]


def test_a_wrong_variant_is_never_timed(quick, monkeypatch):
    quick["eager wrong"] = lambda logits, gate, target: (
        mixture_nll._ours(logits, gate, target) * 1.01
    )
    monkeypatch.setattr(run, "interleaved", lambda *_: pytest.fail("timed a wrong variant"))
    with pytest.raises(RuntimeError, match=r"wrong results.*eager wrong"):
        run.measure(TINY, torch.float32, "forward", CPU)


def test_variants_are_interleaved():
    calls = []
    timings = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, seconds=0.0, warmup=1
    )
    assert calls[2:] == ["a", "b"] * 7
    assert all(isinstance(timing, Timing) for timing in timings.values())
    assert all(timing.p20 <= timing.median <= timing.p80 for timing in timings.values())
