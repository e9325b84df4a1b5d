"""Every Triton kernel compiles for GPUs that are not here, and its default configuration fits them.

What the launchers would launch is recorded and compiled ahead of time (triton_resources.py); ptxas
says what it takes.
"""

import importlib.util
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "triton_resources.py"
NVIDIA = ["sm_80", "sm_90", "sm_100"]
# The version these configurations were chosen with spills nothing; ptxas of an older one may put a
# few of a row's scalars on the stack.
SPILLED_BYTES = 0 if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9) else 64
SHARED_BYTES = 163 * 1024  # of a block on sm_80, which has the least


@pytest.fixture(scope="module")
def resources():
    spec = importlib.util.spec_from_file_location("triton_resources", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def launches(resources):
    """One launch of each kernel, by name, for (experts, dtype)."""

    def of(experts, dtype):
        return {x.name: x for x in resources.default_launches(experts, dtype)}

    return of


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(("experts", "dtype"), [(2, torch.float32), (4, torch.bfloat16)])
def test_no_spills(resources, launches, target, experts, dtype):
    spilling = {}
    for name, launch in launches(experts, dtype).items():
        figures = resources.compile_ahead(launch, resources.TARGETS[target])
        assert figures.registers > 0
        assert figures.shared_bytes <= SHARED_BYTES, name
        if figures.spills > SPILLED_BYTES:
            spilling[name] = figures.spills
    assert spilling == {}


def test_amd(resources, launches):
    for name, launch in launches(4, torch.bfloat16).items():
        figures = resources.compile_ahead(launch, resources.TARGETS["gfx942"])
        assert figures.registers > 0, name


def test_logits_are_read_in_vectors(resources, launches):
    """16 bytes a load, also where the vocabulary is no multiple of a vector (rows are padded)."""
    for vocab in (128256, 128255):
        launch = next(
            x
            for x in resources.default_launches(2, torch.bfloat16, vocab)
            if x.name == "expert_log_prob._forward_kernel"
        )
        strides = ((0, 0), (128256, 128256))
        arguments = (launch.arguments[0], *strides, *launch.arguments[3:])
        padded = resources.Launch(launch.kernel, arguments, launch.options)
        code = resources.compile_ahead(padded, resources.TARGETS["sm_90"]).code
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", code)) == 2  # 16 columns of 16 bits


def test_every_launcher_is_compiled(launches):
    names = {name.partition(".")[0] for name in launches(2, torch.bfloat16)}
    folder = SCRIPT.parents[1] / "python" / "robustgate" / "ops" / "triton"
    kernels = {p.stem for p in folder.glob("*.py") if "_kernel[" in p.read_text()}
    assert names == kernels


def test_the_number_of_rows_compiles_nothing_anew(resources):
    """Not 1, which Triton would make a constant, nor a multiple of 16, whose alignment it notes."""

    def sources(rows):
        launches = resources.default_launches(2, torch.bfloat16, 4096, rows)
        return [(x.name, resources.source_of(x).hash()) for x in launches]

    want = sources(2)
    assert all(sources(rows) == want for rows in (1, 16, 1024))


def test_where_it_cannot_run_another_backend_is_told(monkeypatch):
    from robustgate.ops.backends import triton as backend

    why = backend.why_unusable.__wrapped__  # nothing is remembered
    monkeypatch.setattr(backend, "why_not_installed", backend.why_not_installed.__wrapped__)
    properties = SimpleNamespace(has_fp64=0)
    device = SimpleNamespace(
        is_available=lambda: True, get_device_properties=lambda index: properties
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device_type: device)
    monkeypatch.setenv("CC", "gcc")
    assert "float64" in why(0, "xpu")
    properties.has_fp64 = 1
    assert why(0, "xpu") is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "C compiler" in why(0, "xpu")
