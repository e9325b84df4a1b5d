"""The CUDA kernels, compiled for the CPU and run thread for thread: see tests/cuda_on_cpu.

First the emulator itself, on small kernels: each feature, and each mistake it has to catch. Then
the op tests once more, in a process where CPU tensors go to the CUDA kernels.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_on_cpu.build import build_extension, build_self_test

# The order of enum Mistake in self_test.cu.
MISTAKES = {
    "early return": "deadlock: 32 threads wait at their block's barrier",
    "two barriers": "while others of the block wait at",
    "lanes disagree": "lanes of a warp disagree",
    "overrun": r"write of 1 bytes at byte \d+ of 256 of shared memory",
    "underrun": r"write of 1 bytes at byte -\d+ of 256 of shared memory",
    "misaligned": r"misaligned address ...... at .*self_test.cu",
}


@pytest.fixture(scope="module")
def build_folder(request, tmp_path_factory):
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("cuda_on_cpu") if cache else tmp_path_factory.mktemp("cuda_on_cpu")


class SelfTest:
    """The functions of self_test.cu: tensors in, RuntimeError where the kernel fails."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))

    def __getattr__(self, name):
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p

        def call(*arguments):
            error = function(*(_pointer(a) if torch.is_tensor(a) else a for a in arguments))
            if error is not None:
                raise RuntimeError(error.decode())

        return call


def _pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.fixture(scope="module")
def kernels(build_folder):
    return SelfTest(build_self_test(build_folder))


@pytest.fixture(params=range(3))
def seed(request, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_SEED", str(request.param))


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def test_built_in_variables(kernels):
    out = ints(2 * 3 * 4 * 5 * 3 * 2)
    kernels.run_indices(out)
    assert torch.equal(out, torch.arange(720, dtype=torch.int32))


def test_shuffles(kernels):
    out, lane = ints(8, 32), torch.arange(32)
    kernels.run_shuffles(out)
    expected = [
        torch.full((32,), 103),
        100 + lane // 8 * 8 + 3,
        100 + (lane ^ 5),
        100 + torch.where(lane % 16 < 12, lane + 4, lane),
        100 + torch.where(lane >= 9, lane - 9, lane),
        torch.full((32,), sum(1 << i for i in range(0, 32, 3))),
        torch.ones(32),
        torch.where(lane < 16, 15 - lane, lane ^ 1),
    ]
    assert torch.equal(out, torch.stack([row.int() for row in expected]))


def test_votes_of_a_block(kernels):
    out = ints(70, 3)
    kernels.run_votes(out, 70)
    assert torch.equal(out, torch.tensor([[35, 1, 1]], dtype=torch.int32).expand(70, 3))


@pytest.mark.parametrize("threads", [1, 32, 33, 1000])
def test_shared_memory_and_barrier(kernels, seed, threads):
    values = torch.randint(1, 1000, (threads,), dtype=torch.int32)
    out = torch.zeros_like(values)
    kernels.run_reverse(values, out, threads, True)
    assert torch.equal(out, values.flip(0))


def test_missing_barrier_is_caught(kernels, seed):
    values = torch.randint(1, 1000, (64,), dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"race: a (read|write) of what was (written|read)"):
        kernels.run_reverse(values, torch.zeros_like(values), 64, False)


def test_asynchronous_copies(kernels, seed):
    values = torch.arange(1, 64 * 8 + 1, dtype=torch.int32).view(2, 64, 4)
    out = torch.zeros_like(values)
    kernels.run_reverse_async(values, out, 64, True)
    expected = values.flip(1)
    expected[1, :, 2:] = 0  # 8 of 16 bytes are filled with zeros
    assert torch.equal(out, expected)


def test_missing_wait_is_caught(kernels, seed):
    values = torch.arange(64 * 8, dtype=torch.int32)
    out = torch.zeros_like(values)
    with pytest.raises(RuntimeError, match="race"):
        kernels.run_reverse_async(values, out, 64, False)
    assert (out[: 64 * 4] == -1).any()  # the bits of NaN


@pytest.mark.parametrize(("blocks", "size"), [(6, 1), (6, 3), (16, 8)])
def test_cluster(kernels, seed, blocks, size):
    out = ints(blocks)
    kernels.run_cluster_sum(out, blocks, size, True, True)
    expected = torch.arange(1, blocks + 1).view(-1, size).sum(1).repeat_interleave(size)
    assert torch.equal(out, expected.int())


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [(False, True, "may not have started"), (True, False, "has exited|exit after a read")],
)
def test_missing_cluster_barrier_is_caught(kernels, seed, first, last, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.run_cluster_sum(ints(16), 16, 8, first, last)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(kernels, seed, mistake):
    with pytest.raises(RuntimeError, match=MISTAKES[mistake]):
        kernels.run_mistake(list(MISTAKES).index(mistake), ints(64), 64)
    kernels.run_indices(ints(720))  # the next launch is not harmed


def test_access_outside_of_tensors_is_caught(kernels):
    values, out = torch.arange(40, dtype=torch.int32), ints(40)
    library = kernels.library
    library.register_global_memory(_pointer(values), ctypes.c_size_t(160))
    library.register_global_memory(_pointer(out), ctypes.c_size_t(160))
    try:
        kernels.run_reverse(values, out, 40, True)
        assert torch.equal(out, values.flip(0))
        with pytest.raises(RuntimeError, match="write of 4 bytes outside of every tensor"):
            kernels.run_reverse(values, out[1:], 40, True)
        with pytest.raises(RuntimeError, match="read of 4 bytes outside of every tensor"):
            kernels.run_reverse(values[8:], out, 40, True)
    finally:
        library.forget_global_memory()


KIB = 1024


@pytest.mark.parametrize(
    ("capability", "threads", "shared", "opt_in", "cluster", "large", "error"),
    [
        ("9.0", 1024, 48 * KIB, 0, 8, False, None),
        ("9.0", 1025, 4, 0, 1, False, "invalid configuration argument"),
        ("9.0", 32, 227 * KIB, 227 * KIB, 1, False, None),
        ("9.0", 32, 227 * KIB, 200 * KIB, 1, False, "invalid argument"),
        ("9.0", 32, 4, 228 * KIB, 1, False, "invalid argument"),
        ("9.0", 32, 4, 4 * KIB, 16, True, None),
        ("9.0", 32, 4, 4 * KIB, 16, False, "invalid cluster size"),
        ("9.0", 32, 4, 4 * KIB, 32, True, "invalid cluster size"),
        ("9.0", 32, 4, 4 * KIB, 5, True, "invalid cluster size"),
        ("8.0", 32, 4, 4 * KIB, 2, False, "invalid configuration argument"),
        ("8.0", 32, 4, 164 * KIB, 1, False, "invalid argument"),
        ("12.0", 32, 4, 100 * KIB, 1, False, "invalid argument"),
    ],
)
def test_limits_of_a_launch(
    kernels, monkeypatch, capability, threads, shared, opt_in, cluster, large, error
):
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", capability)
    launch = (ints(32), threads, shared, opt_in, 32, cluster, large)
    if error is None:
        kernels.run_shape(*launch)
    else:
        with pytest.raises(RuntimeError, match=error):
            kernels.run_shape(*launch)


@pytest.mark.parametrize("rough", [False, True])
def test_errors_of_functions(kernels, monkeypatch, rough):
    if rough:
        monkeypatch.setenv("CUDA_ON_CPU_ROUGH", "1")
    x = torch.linspace(-20, 20, 1000)
    out = torch.empty_like(x)
    kernels.run_exponentials(x, out, 1000)
    exact = torch.exp2(x.double())
    ulps = (out.double() - exact) / torch.exp2(x.floor() - 23).double()
    assert 1.5 < ulps.abs().max() <= 2.6 if rough else ulps.abs().max() < 1
    x = torch.tensor([0.0, -torch.inf, torch.inf, torch.nan, 3.0])
    kernels.run_exponentials(x, out, 5)
    torch.testing.assert_close(out[:5], torch.exp2(x), rtol=0, atol=0, equal_nan=True)


def test_sixteen_bit_floats(kernels):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 40, (1 << 16,), generator=generator)
    floats = torch.ldexp(torch.randn(1 << 16, generator=generator), exponents)
    # Halfway between two float16 or bfloat16 numbers, where rounding is to the even one.
    floats[::3] = bits.view(torch.float16).float()[::3] * (1 + 2.0**-11)
    floats[1::3] = bits.view(torch.bfloat16).float()[1::3] * (1 + 2.0**-8)
    wide = torch.empty(2, 1 << 16)
    short = torch.empty(2, 1 << 16, dtype=torch.int16)
    kernels.convert(bits, floats, 1 << 16, wide[0], wide[1], short[0], short[1])
    for i, dtype in enumerate((torch.float16, torch.bfloat16)):
        torch.testing.assert_close(
            wide[i], bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True
        )
        torch.testing.assert_close(
            short[i].view(dtype), floats.to(dtype), rtol=0, atol=0, equal_nan=True
        )


HERE = Path(__file__).parent
# What depends on the arithmetic of the kernels, their indices and their barriers.
NUMERICS = [
    "test_every_op.py",
    "test_jsd.py",
    "test_jsd_near_equal.py",
    "test_jsd_numerics.py",
    "test_kernels.py",
    "test_mixture_kl.py",
    "test_mixture_log_softmax.py",
    "test_numerics.py",
    "test_random_extremes.py",
    "test_raw_ops.py",
    "test_regularisers.py",
    "test_wide_rows.py",
]
# Devices differ in the blocks that share a row and in what of it they keep in shared memory.
SELECTIONS = {
    "9.0": ["../cuda_on_cpu/launches.py", *NUMERICS],
    "8.0": ["test_kernels.py", "test_jsd.py", "test_mixture_kl.py", "test_wide_rows.py"],
    "12.0": ["test_wide_rows.py"],
}


@pytest.fixture(scope="module")
def extension(build_folder):
    return build_extension(build_folder)


@pytest.mark.timeout(1200)  # the first one builds the kernels, too
@pytest.mark.parametrize("capability", SELECTIONS)
def test_op_tests_on_the_cuda_kernels(extension, capability):
    environment = {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "CUDA_ON_CPU_EXTENSION": str(extension),
        "CUDA_ON_CPU_CAPABILITY": capability,
    }
    options = ["-q", "-p", "cuda_on_cpu.plugin", "-p", "no:cacheprovider"]
    options += ["-k", "native or launches"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(HERE / f for f in SELECTIONS[capability])],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
