"""Compiles the CUDA sources for a CPU, with what calls them; only what changed is recompiled."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = "g++"  # clang++ leaves copies of structs out of what -fsanitize=thread sees
JOBS = 2
COMMON = ["-std=c++20", "-fPIC", f"-I{HERE}", f"-I{CSRC}"]
INCLUDE = f"-I{HERE / 'include'}"
KERNEL = (
    INCLUDE,
    "-include",
    "cuda_runtime.h",
    "-xc++",
    "-O1",
    "-w",
    "-fsanitize=alignment,thread",
)


@dataclass(frozen=True)
class Source:
    path: Path
    flags: tuple[str, ...]


def _runtime() -> list[Source]:
    return [Source(path, (INCLUDE, "-O2")) for path in sorted((HERE / "runtime").glob("*.cpp"))]


def _extension() -> list[Source]:
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        pytest.skip(f"no headers of Python in {python}")
    host = (f"-I{pybind11.get_include()}", f"-I{python}", "-DROBUSTGATE_WITH_CUDA", "-O1")
    sources = [Source(CSRC / "bindings.cpp", host)]
    for path in sorted((CSRC / "cpu").glob("*.cpp")):
        per_instruction_set = path.stem not in ("dispatch", "thread_pool")
        extra = ("-DRG_ISA=baseline", "-Wno-psabi") if per_instruction_set else ()
        sources.append(Source(path, (*host, *extra)))
    return sources + [Source(path, KERNEL) for path in sorted((CSRC / "cuda").glob("*.cu"))]


def build_extension(folder: Path) -> Path:
    """Return the path of ``robustgate._C`` with the CUDA kernels compiled for the CPU."""
    return _link("_C", [*_extension(), *_runtime()], folder)


def build_self_test(folder: Path) -> Path:
    """Return the path of the library of the emulator's own small kernels."""
    return _link("self_test", [Source(HERE / "self_test.cu", KERNEL), *_runtime()], folder)


def _link(name: str, sources: list[Source], folder: Path) -> Path:
    if sys.platform != "linux" or shutil.which(COMPILER) is None:
        pytest.skip(f"needs Linux and {COMPILER} on PATH")
    headers = _digest_of_headers()
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda source: _compile(source, headers, folder), sources))
    arguments = [*map(str, objects), "-shared", "-lpthread", "-ldl"]
    return _cached(arguments, folder, name, "".join(arguments).encode(), ".so")


def _compile(source: Source, headers: str, folder: Path) -> Path:
    arguments = [*COMMON, *source.flags, "-c", str(source.path)]
    content = "\0".join([headers, *arguments]).encode() + source.path.read_bytes()
    return _cached(arguments, folder, source.path.name, content, ".o")


def _cached(arguments: list[str], folder: Path, name: str, content: bytes, suffix: str) -> Path:
    """Run the compiler unless it did for the same content; a later version replaces an earlier."""
    output = folder / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
    if output.exists():
        return output
    partial = output.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [COMPILER, *arguments, "-o", str(partial)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"{COMPILER} {' '.join(arguments)}\n{done.stderr[:4000]}", pytrace=False)
    for earlier in folder.glob(f"{name}-*{suffix}"):
        earlier.unlink(missing_ok=True)
    return partial.rename(output)


def _digest_of_headers() -> str:
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version)
    for root in (CSRC, HERE):
        for path in sorted(root.rglob("*.h")) + sorted(root.rglob("*.cuh")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
