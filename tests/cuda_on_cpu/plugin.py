"""A pytest plugin: "native" kernels of CPU tensors are the CUDA kernels, emulated on the CPU.

CUDA_ON_CPU_EXTENSION is the path of the extension that holds them. Results that a kernel does not
write stay NaN, and memory that it was given no pointer to is out of bounds.
"""

import ctypes
import functools
import importlib.util
import os

import torch

from robustgate.ops.backends import cuda, divergences, likelihoods, native
from robustgate.ops.library import eager_where, register_kernel

PATH = os.environ["CUDA_ON_CPU_EXTENSION"]
library = ctypes.CDLL(PATH)
_data_ptr = torch.Tensor.data_ptr


class _Extension:
    """The extension's functions; during a call kernels reach the tensors it has pointers to."""

    def __init__(self):
        spec = importlib.util.spec_from_file_location("_C", PATH)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)

    def __getattr__(self, name):
        function = getattr(self.module, name)

        @functools.wraps(function)
        def call(*arguments):
            try:
                return function(*arguments)
            finally:
                library.forget_global_memory()

        return call


def _registered_data_ptr(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    library.register_global_memory(
        ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes())
    )
    return _data_ptr(tensor)


def pytest_configure() -> None:
    torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
    torch.Tensor.data_ptr = _registered_data_ptr
    likelihoods._C = divergences._C = _Extension()
    native.where = lambda tensor: (0, 0)  # device 0, default stream
    for kernels, unserved in (
        (likelihoods.KERNELS, cuda._is_float64),
        (divergences.KERNELS, cuda._is_unserved),
    ):
        for kernel in kernels:
            register_kernel(kernel.__name__, "cpu", "native", eager_where(unserved, kernel))
