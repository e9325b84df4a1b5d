"""The benchmark on tiny shapes: every variant is right, wrong ones are never timed. No time is
asserted."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from bench_cases import CPU, SIZES, TINY, changed, measure, tiny

import robustgate as rg
from robustgate.bench import run
from robustgate.bench.benchmark import MODES, Peer, Shape, count
from robustgate.bench.case import make_case
from robustgate.bench.measure import Call, Clock, Contention, Effort, interleaved
from robustgate.bench.memory import peak_extra_bytes
from robustgate.bench.ops import BENCHMARKS
from robustgate.bench.plan import SWEEPS, plan, select
from robustgate.ops.library import requested_backend

FLOAT32 = torch.float32
OPS = [benchmark.op for benchmark in BENCHMARKS]

# Without inductor: generating C++ takes seconds and is torch's business.
TRACED = partial(torch.compile, backend="eager", dynamic=False)


# --- the registry -----------------------------------------------------------------------------


def test_every_public_op_has_a_benchmark():
    public = {name for name in rg.__all__ if getattr(rg.ops, name, None) is getattr(rg, name)}
    assert set(OPS) == public - {"backend"}
    assert len(OPS) == len(set(OPS))


@pytest.mark.parametrize("op", OPS)
def test_every_benchmark_has_enough_formulations(op):
    (benchmark,) = select([op])
    assert len(benchmark.formulations) >= 3
    assert len(set(benchmark.compiled)) >= 2
    assert set(benchmark.compiled) | {benchmark.truth} <= set(benchmark.formulations)
    assert set(benchmark.modes) <= set(MODES)
    assert ("frozen" in benchmark.modes) == (benchmark.gate is not None)
    assert not benchmark.flops or set(benchmark.flops) == set(benchmark.bytes)


@pytest.mark.parametrize("op", OPS)
def test_every_variant_of_every_mode_is_right_and_measured(op):
    for task in plan([op], sizes=SIZES):
        results = measure(task)
        variants = task.benchmark.variants(None)
        assert [row.variant for row in results.rows] == list(variants)
        assert not results.skipped
        formulas = task.benchmark.flops or task.benchmark.bytes
        work = count(formulas[task.mode], task.shape, task.dtype.itemsize)
        for row in results.rows:
            rate = row.gigaflops_per_second if task.benchmark.flops else row.gigabytes_per_second
            assert rate == pytest.approx(work / row.median_us / 1e3, rel=0.1, abs=0.01)
            # Half an ulp of bfloat16 is 0.2 % of a gradient; float32 sums of 40 columns: 1e-5.
            assert row.error <= (1e-5 if row.dtype == "float32" else 5e-3)
            assert (row.op, row.mode, row.rows) == (op, task.mode, task.shape.rows)


@pytest.mark.parametrize("op", OPS)
def test_compiled_variants_are_right(op):
    results = measure(tiny(op, "forward_backward"), compiler=TRACED)
    assert not results.skipped
    compiled = [row for row in results.rows if row.kind == "compiled"]
    assert len(compiled) >= 2
    fastest = min(row.median_us for row in compiled)
    for row in results.rows:
        assert row.speedup_compiled == pytest.approx(fastest / row.median_us, abs=0.01)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_every_variant_is_right_and_measured_on_a_gpu(op):
    for task in plan([op], sizes=SIZES):
        results = run.measure(task, torch.device("cuda"), effort=TINY, compiler=None)
        assert len(results.rows) == len(task.benchmark.variants(None))


# --- what is counted, by hand, for N = 2, K = 3, V = 10, H = 5 and two bytes an element ---------

COUNTED = {
    "mixture_nll": {"forward": 120, "frozen": 120, "backward": 240, "forward_backward": 360},
    "expert_log_prob": {"forward": 120, "backward": 240, "forward_backward": 360},
    # 60 logits of 2 bytes; 20 results of 4 bytes; their upstream gradient once more.
    "mixture_log_softmax": {
        "forward": 120 + 80,
        "frozen": 200 + 120 + 160,
        "backward": 240 + 160,
        "forward_backward": 200 + 240 + 160,
    },
    "jsd": {"forward": 120, "frozen": 120, "backward": 240, "forward_backward": 360},
    # Two models of 20 logits, a gradient for one of them.
    "generalized_jsd": {"forward": 80, "backward": 120, "forward_backward": 200},
    "mixture_kl": {"forward": 120, "frozen": 120, "backward": 240, "forward_backward": 360},
    # 30 hidden values and 150 of heads.
    "linear_mixture_nll": {
        "forward": 360,
        "frozen": 360,
        "backward": 720,
        "forward_backward": 1080,
    },
    # The first expert's gradients: 10 + 50 values.
    "linear_jsd": {"forward": 360, "frozen": 360, "backward": 480, "forward_backward": 840},
    # 6 log-probs and 6 gate logits in, 2 values out; backward: those and 2 in, 12 out.
    "mixture_log_prob": {
        "forward": 2 * 14,
        "frozen": 2 * (14 + 14 + 6),
        "backward": 2 * (14 + 12),
        "forward_backward": 2 * (14 + 14 + 12),
    },
    "sequence_log_prob": {"forward": 12, "backward": 12, "forward_backward": 24},
}
# One product is 2 x 2 x 10 x 5 = 200 operations per expert; a gradient through it is two.
FLOPS = {
    "linear_mixture_nll": {
        "forward": 600,
        "frozen": 600,
        "backward": 1200,
        "forward_backward": 1800,
    },
    "linear_jsd": {"forward": 600, "frozen": 600, "backward": 400, "forward_backward": 1000},
}


@pytest.mark.parametrize("op", OPS)
def test_formulas_count_what_is_counted_by_hand(op):
    (benchmark,) = select([op])
    shape = Shape(rows=2, experts=3, vocab=10, hidden=5)
    assert {m: count(f, shape, 2) for m, f in benchmark.bytes.items()} == COUNTED[op]
    assert {m: count(f, shape, 2) for m, f in benchmark.flops.items()} == FLOPS.get(op, {})


# --- the gate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["mixture_nll", "mixture_log_softmax", "linear_jsd"])
def test_the_truth_of_a_block_is_the_truth_of_all_rows(op, mode):
    task = tiny(op, mode)
    shape = replace(task.shape, rows=12)
    whole, blocks = (
        make_case(replace(task.benchmark, block=block), shape, torch.float64, mode, CPU)
        for block in (12, 4)
    )
    exact = task.benchmark.formulations[task.benchmark.truth]
    for case in (whole, blocks):
        # Gates are float32, as users' are, so that gradients are right to its rounding.
        assert case.error(case.call(exact).once()) < 1e-5
    assert len(blocks.arguments[0][0]) == 12
    assert torch.equal(blocks.arguments[0][0][:4], blocks.arguments[0][0][8:])


@pytest.fixture
def timed(monkeypatch):
    """What is timed, by name; the results are those of the real clock."""
    names = []

    def spy(calls, clock, effort):
        names.extend(calls)
        return interleaved(calls, clock, effort)

    monkeypatch.setattr(run, "interleaved", spy)
    return names


@pytest.mark.parametrize("kind", ["ours", "eager"])
def test_a_wrong_variant_is_an_error_and_never_timed(kind, timed):
    task = tiny("mixture_nll")

    def wrong(*arguments):
        return 1.01 * rg.mixture_nll(*arguments)

    forms = {**task.benchmark.formulations, "wrong": wrong}
    task = changed(task, **({"ours": wrong} if kind == "ours" else {"formulations": forms}))
    with pytest.raises(RuntimeError, match=r"(robustgate|eager wrong) is wrong: relative error 1"):
        measure(task)
    assert not timed


def test_a_wrong_gradient_of_a_right_value_is_an_error():
    task = tiny("mixture_nll", "forward_backward")

    def half(logits, gate, target):
        value = rg.mixture_nll(logits, gate, target)
        return 0.5 * value + 0.5 * value.detach()

    with pytest.raises(RuntimeError, match="robustgate is wrong"):
        measure(changed(task, ours=half))


def test_peers_are_timed_only_if_they_are_there_and_right(timed):
    def raises(*_):
        raise NotImplementedError("no CPU\nkernel")

    def missing():
        raise ImportError("No module named 'peer'")

    def peer(name, function, **limits):
        return Peer(name, "peer-package", lambda: function, ("forward",), **limits)

    peers = (
        peer("right", rg.mixture_nll),
        peer("wrong", lambda *arguments: rg.mixture_nll(*arguments) + 0.01),
        peer("nan", lambda *arguments: rg.mixture_nll(*arguments) * float("nan")),
        peer("broken", raises),
        Peer("missing", "peer-package", missing, ("forward",)),
        peer("elsewhere", raises, device="cuda"),
        peer("single", raises, experts=1),
        peer("narrow", raises, narrow=True),
        Peer("together", "peer-package", lambda: raises, ("forward_backward",)),
    )
    task = changed(tiny("mixture_nll"), peers=peers)
    assert not measure(task).skipped
    results = measure(task, peers=True)
    assert [row.variant for row in results.rows if row.kind == "peer"] == ["right"]
    reasons = {skipped.variant: skipped.reason for skipped in results.skipped}
    assert reasons.pop("wrong").startswith("wrong: relative error ")
    assert reasons.pop("nan").startswith("wrong: relative error nan")
    assert reasons == {
        "broken": "failed: NotImplementedError: no CPU",
        "missing": "needs pip install peer-package (No module named 'peer')",
        "elsewhere": "runs on cuda only",
        "single": "has K = 1 only",
        "narrow": "is for narrower inputs",
        "together": "compared in forward_backward only",
    }
    assert not set(timed) & {"wrong", "nan", "broken", "missing", "elsewhere", "single"}


def test_the_other_backends_of_a_gpu_are_variants_too(monkeypatch):
    served = {"jsd": ["native", "triton", "eager"], "mixture_nll": ["native", "triton", "eager"]}
    monkeypatch.setattr(run, "serving", lambda *_: served)
    assert run.other_backends(torch.device("cuda", 0)) == ["triton"]
    assert run.other_backends(CPU) == []
    seen = []

    def note(state=None):
        seen.append(requested_backend())
        return state

    run.on_backend("triton", Call(note, note)).once()
    assert seen == ["triton", "triton"]
    assert requested_backend() == "auto"


def test_the_best_of_each_kind_is_never_too_slow():
    times = {"robustgate": 900.0, "eager a": 600.0, "eager b": 601.0, "compiled a": 10.0, "p": 501}
    assert run._too_slow(times) == ["eager b", "p"]


# --- measuring --------------------------------------------------------------------------------


def test_variants_take_turns():
    order = []

    def call(name):
        return Call(lambda: order.append(f"prepare {name}"), lambda _: order.append(name) or ())

    timings = interleaved({"a": call("a"), "b": call("b")}, Clock(CPU), Effort(0.0, rounds=3))
    assert order == ["prepare a", "a", "prepare b", "b"] * 3
    assert all(timing.p20 <= timing.median <= timing.p80 for timing in timings.values())


def test_a_measurement_uses_its_own_number_of_threads():
    before = torch.get_num_threads()
    seen = []

    def ours(*arguments):
        seen.append(torch.get_num_threads())
        return rg.mixture_nll(*arguments)

    task = changed(tiny("mixture_nll"), ours=ours)
    results = measure(replace(task, threads=3))
    assert set(seen) == {3}
    assert {row.threads for row in results.rows} == {3}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("busy", "attempts", "contended"), [(0, 1, False), (2, 2, False), (99, 3, True)]
)
def test_a_busy_neighbour_is_waited_for_and_then_marked(
    busy, attempts, contended, monkeypatch, timed
):
    heard = []

    def canary(calls):
        heard.append(calls)
        return Contention(1, utilisation=0.5 if len(heard) <= busy else 1.0, barrier_p99=9.0)

    monkeypatch.setattr(run, "contention", canary)
    results = measure(tiny("mixture_log_prob"))
    assert timed.count("robustgate") == attempts
    assert {row.contended for row in results.rows} == {contended}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_is_the_peak_beyond_inputs_and_results():
    mib = 1 << 20
    inputs = torch.zeros(32 * mib, dtype=torch.uint8)

    def run_call(state):
        first = torch.ones(48 * mib, dtype=torch.uint8)
        del first
        second = torch.ones(64 * mib, dtype=torch.uint8)
        return (inputs[: 16 * mib] + second[: 16 * mib],)

    def prepare():
        return torch.ones(24 * mib, dtype=torch.uint8)

    for _ in range(2):  # memory that the first call freed is not taken for granted by the second
        extra = peak_extra_bytes(Call(prepare, run_call), CPU) / mib
        # Pages of 4 KiB; what Python and the allocator keep besides is well below 4 MiB.
        assert extra == pytest.approx(64, abs=4)


# --- what an invocation measures --------------------------------------------------------------


def test_plan_resizes_what_an_op_has():
    tasks = plan(["generalized_jsd", "mixture_nll"], ["forward"], ["float32"], sizes=SIZES)
    assert [task.shape for task in tasks] == [Shape(12, 2, 40), Shape(12, 2, 40)]
    (task,) = plan(["generalized_jsd"], ["forward"], ["float32"], sizes={"experts": 7})
    assert task.shape.experts == 2
    assert {task.mode for task in plan(["sequence_log_prob"])} == set(MODES) - {"frozen"}
    assert {task.benchmark.op for task in plan()} == set(OPS)
    assert [task.threads for task in plan(["jsd"], ["forward"], ["float32"], [1, 2])] == [1, 2]


def test_plan_sweeps_one_size_at_a_time():
    tasks = plan(["jsd", "mixture_log_prob"], sweeps=["rows", "vocab"])
    assert {(task.mode, task.dtype) for task in tasks} == {("forward", FLOAT32)}
    swept = [(task.benchmark.op, task.sweep) for task in tasks]
    assert set(swept) == {("jsd", "rows"), ("jsd", "vocab"), ("mixture_log_prob", "rows")}
    vocab = [task.shape.vocab for task in tasks if task.sweep == "vocab"]
    assert tuple(vocab) == SWEEPS["vocab"]
    threads = plan(["jsd"], sweeps=["threads"])
    assert tuple(task.threads for task in threads) == SWEEPS["threads"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["softmax"]}, "--op: expected some of mixture_nll"),
        ({"modes": ["sideways"]}, "--mode: expected some of forward"),
        ({"dtypes": ["int8"]}, "--dtype: expected some of float32"),
        ({"sweeps": ["hidden"]}, "--sweep: expected some of rows"),
        ({"ops": ["jsd"], "modes": ["frozen"], "sweeps": []}, None),
        ({"ops": ["generalized_jsd"], "modes": ["frozen"]}, "nothing to measure"),
        ({"ops": ["sequence_log_prob"], "sweeps": ["vocab"]}, "nothing to measure"),
    ],
)
def test_plan_names_what_is_unknown(arguments, message):
    if message is None:
        assert plan(**arguments)
        return
    with pytest.raises(ValueError, match=message):
        plan(**arguments)
