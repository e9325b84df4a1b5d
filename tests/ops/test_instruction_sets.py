"""The kernels' tests once more for each instruction set this processor has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustgate import _C

HERE = Path(__file__).parent
# What depends on the arithmetic of the kernels.
NUMERICS = [
    "test_jsd.py",
    "test_jsd_near_equal.py",
    "test_jsd_numerics.py",
    "test_kernels.py",
    "test_mixture_kl.py",
    "test_mixture_log_softmax.py",
    "test_numerics.py",
    "test_random_extremes.py",
    "test_regularisers.py",
]
LESSER = {"avx512": ["avx2", "baseline"], "avx2": ["baseline"], "baseline": []}


def run(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "ROBUSTGATE_CPU": instruction_set},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("instruction_set", ["avx2", "baseline"])
def test_kernels(instruction_set):
    if instruction_set not in LESSER[_C.instruction_set()]:
        pytest.skip(f"the suite itself runs on {_C.instruction_set()}")
    tests = [str(HERE / name) for name in NUMERICS]
    result = run(
        instruction_set, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native", *tests
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_unknown_instruction_set_is_refused():
    result = run("avx1024", "-c", "import robustgate")
    assert result.returncode != 0
    assert "ROBUSTGATE_CPU='avx1024' cannot be served" in result.stderr
