"""Tiny measurements shared by the benchmark's tests."""

from dataclasses import replace

import torch

from robustgate.bench import run
from robustgate.bench.measure import Effort
from robustgate.bench.plan import plan

CPU = torch.device("cpu")
TINY = Effort(seconds=0.0, rounds=2, copy_bytes=1 << 16, gemm_size=16, canary_calls=2)
SIZES = {"rows": 12, "experts": 2, "vocab": 40, "hidden": 8}


def tiny(op, mode="forward", dtype="float32"):
    (task,) = plan([op], [mode], [dtype], sizes=SIZES)
    return task


def measure(task, **options):
    return run.measure(task, CPU, effort=TINY, **{"compiler": None, **options})


def changed(task, **changes):
    return replace(task, benchmark=replace(task.benchmark, **changes))
