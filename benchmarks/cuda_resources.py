"""Registers and spills of every CUDA kernel, by architecture, as ptxas reports them: a table.

    make ptxas

compiles csrc/cuda for each architecture in turn (minutes); nothing is installed. Shared memory is
sized at launch. Fails where a kernel spills or keeps an array in local memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from os import cpu_count
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "90", "100", "120")
# What CMakeLists.txt compiles them with.
OPTIONS = ("-std=c++17", "-O3", "-ftz=true", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}")


@dataclass(frozen=True)
class Usage:
    registers: int
    local_bytes: int  # stack frame and spills


def compile_kernels(source: Path, arch: str) -> dict[str, Usage]:
    """Return kernel -> usage for one file and architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *OPTIONS, "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v"]
        done = subprocess.run(
            [*command, "-o", f"{folder}/out.cubin", str(source)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        sys.exit(done.stderr)
    report = subprocess.run(
        ["c++filt"], input=done.stderr, capture_output=True, text=True, check=True
    ).stdout
    usage, kernel, local = {}, "", 0
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(?:void )?(.*)' for", line):
            kernel, local = _short(found[1]), 0
        elif "bytes stack frame" in line:
            local = sum(int(number) for number in re.findall(r"(\d+) bytes", line))
        elif found := re.search(r"Used (\d+) registers", line):
            usage[kernel] = Usage(int(found[1]), local)
    return usage


def _short(function: str) -> str:
    """Return ``jsd_kernel<bfloat16, 4>`` for the demangled name of a kernel."""
    function = function.replace("(anonymous namespace)::", "").replace("robustgate::cuda::", "")
    function = function.partition("(")[0].replace("__nv_bfloat16", "bfloat16")
    return function.replace("__half", "float16")


def main() -> None:
    jobs = list(product(sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ARCHITECTURES))
    kernels: dict[str, dict[str, Usage]] = defaultdict(dict)
    with ThreadPoolExecutor(cpu_count() or 1) as pool:
        for (_, arch), found in zip(
            jobs, pool.map(lambda job: compile_kernels(*job), jobs), strict=True
        ):
            for kernel, usage in found.items():
                kernels[kernel][arch] = usage
    print("| registers of | " + " | ".join(f"sm_{arch}" for arch in ARCHITECTURES) + " |")
    print("|---|" + "---|" * len(ARCHITECTURES))
    for kernel, by_arch in sorted(kernels.items()):
        cells = " | ".join(str(by_arch[arch].registers) for arch in ARCHITECTURES)
        print(f"| `{kernel}` | {cells} |")
    spilling = [
        f"{kernel} on sm_{arch}: {usage.local_bytes} bytes"
        for kernel, by_arch in sorted(kernels.items())
        for arch, usage in by_arch.items()
        if usage.local_bytes
    ]
    if spilling:
        sys.exit("\n".join(["local memory:", *spilling]))
    print("\nno spills, no local memory")


if __name__ == "__main__":
    main()
