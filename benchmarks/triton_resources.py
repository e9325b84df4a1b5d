"""Registers, shared memory and spills of every Triton kernel, compiled ahead of time.

    python benchmarks/triton_resources.py --out benchmarks/results/triton_resources.csv

No GPU is needed. The raw ops' launchers run on CPU tensors with every launch recorded instead of
made, so that what is compiled is what they would launch by default. Figures for NVIDIA come from
``ptxas -v`` on the emitted PTX, for AMD from the assembly's metadata (vector registers).
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from robustgate.ops.triton import (
    expert_log_prob,
    jsd,
    jsd_backward,
    linear_mixture_nll,
    mixture_kl,
    mixture_log_prob,
    mixture_log_softmax,
    mixture_mean_log_prob,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
}
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as its launcher makes it."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Module and function: ``jsd._forward_kernel``."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


@dataclass(frozen=True)
class Figures:
    """What a compiled kernel takes; spills in bytes (AMD: registers)."""

    registers: int
    spills: int
    shared_bytes: int
    code: str  # PTX or AMD assembly


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record the launches of a block instead of making them."""
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, args, options))

    made, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = made


def default_launches(
    experts: int = 4, dtype: torch.dtype = torch.bfloat16, vocab: int = 128256, rows: int = 2
) -> list[Launch]:
    """Return every launch of every raw op, forward and backward, on rows of a large vocabulary."""
    logits = [torch.empty(rows, vocab, dtype=dtype) for _ in range(experts)]
    per_expert, per_row = torch.empty(rows, experts), torch.empty(rows)
    target, lse = torch.empty(rows, dtype=torch.int64), torch.empty(rows, experts).double()
    wide = torch.empty(rows, vocab)
    needs, settings = [True] * experts, (vocab, -100, 1.0, None)
    hidden = [torch.empty(rows, 1024, dtype=dtype) for _ in range(experts)]
    heads = [torch.empty(vocab, 1024, dtype=dtype) for _ in range(experts)]
    with recording() as launches:
        expert_log_prob.forward(logits, target, *settings)
        expert_log_prob.backward(per_expert, per_expert, logits, target, lse, *settings)
        mixture_log_prob.forward(per_expert, per_expert, target, -1.0, -100)
        mixture_log_prob.backward(per_row, per_expert, per_expert, target, -1.0, -100)
        mixture_log_softmax.forward(logits, per_expert, vocab, 1.0, None)
        mixture_log_softmax.backward(wide, logits, per_expert, lse, needs, vocab, 1.0, None)
        mixture_mean_log_prob.forward(logits, per_expert, target, *settings)
        mixture_mean_log_prob.backward(
            per_row, logits, per_expert, target, per_expert, lse, needs, *settings
        )
        jsd.forward(logits, per_expert, None, target, *settings)
        jsd_backward.backward(
            per_row, logits, per_expert, per_expert, lse, target, needs, *settings
        )
        mixture_kl.forward(logits, per_expert, per_expert, target, *settings)
        mixture_kl.backward(
            per_row, logits, per_expert, per_expert, per_row, lse, target, needs, *settings
        )
        linear_mixture_nll.forward(hidden, heads, [], target, *settings)
    return launches


def _describe(value: Any) -> Any:
    """Return Triton's type of an argument; integers of 1 are compile-time constants."""
    if isinstance(value, tuple):
        return tuple(_describe(x) for x in value)
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        return "constexpr"
    return _integer(value)


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _specialise(
    value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]
) -> None:
    """Note the constants and the numbers divisible by 16 of an argument, as Triton does."""
    if isinstance(value, tuple):
        for i, x in enumerate(value):
            _specialise(x, (*path, i), constants, attributes)
    elif isinstance(value, torch.Tensor):
        attributes[path] = _DIVISIBLE  # torch's allocations are aligned
    elif isinstance(value, int) and value == 1:
        constants[path] = 1
    elif isinstance(value, int) and value % 16 == 0:
        attributes[path] = _DIVISIBLE


def source_of(launch: Launch) -> ASTSource:
    """Return what Triton compiles for a launch: the kernel, its types, constants and attributes."""
    parameters = launch.kernel.params
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, parameter in enumerate(parameters):
        if i >= len(launch.arguments):
            signature[parameter.name] = "constexpr"
            constants[i,] = launch.options[parameter.name]
        elif parameter.do_not_specialize:
            signature[parameter.name] = _integer(launch.arguments[i])
        else:
            signature[parameter.name] = _describe(launch.arguments[i])
            _specialise(launch.arguments[i], (i,), constants, attributes)
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_ahead(launch: Launch, target: GPUTarget) -> Figures:
    """Compile a launch for a device that need not be there."""
    names = launch.kernel.arg_names
    options = {name: x for name, x in launch.options.items() if name not in names}
    compiled = triton.compile(source_of(launch), target=target, options=options)
    if target.backend == "hip":
        return _amd_figures(compiled.asm["amdgcn"], compiled.metadata.shared)
    registers, spills = _ptxas(compiled.asm["ptx"], target.arch)
    return Figures(registers, spills, compiled.metadata.shared, compiled.asm["ptx"])


def _ptxas(ptx: str, architecture: int) -> tuple[int, int]:
    """Return registers and bytes of spill stores and loads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        name = re.search(r"\.target (\w+)", ptx)[1]
        command = [get_ptxas(architecture).path, "-v", f"-arch={name}", path, "-o", path.name]
        log = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
    return int(re.search(r"Used (\d+) registers", log)[1]), int(stores) + int(loads)


def _amd_figures(assembly: str, shared_bytes: int) -> Figures:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    # The metadata leave out shared memory that is allocated at launch.
    return Figures(number("vgpr_count"), number("vgpr_spill_count"), shared_bytes, assembly)


def table(experts: list[int], targets: list[str]) -> list[dict[str, Any]]:
    """Return the figures of every kernel as rows of a CSV file."""
    rows = []
    for count in experts:
        for dtype in (torch.bfloat16, torch.float32):
            launches = {x.name: x for x in default_launches(count, dtype)}
            for launch in launches.values():
                for name in targets:
                    figures = compile_ahead(launch, TARGETS[name])
                    rows.append(
                        {
                            "kernel": launch.name,
                            "experts": count,
                            "dtype": _TYPES[dtype],
                            "target": name,
                            "warps": launch.options["num_warps"],
                            "registers": figures.registers,
                            "spills": figures.spills,
                            "shared_bytes": figures.shared_bytes,
                            "triton": triton.__version__,
                            "date": date.today().isoformat(),
                        }
                    )
                    print(*rows[-1].values(), sep="\t", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = table(arguments.experts, arguments.targets)
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
