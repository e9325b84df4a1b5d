"""Triton kernels of the raw ops: one op a file, the launcher beside the kernel.

They serve CUDA, ROCm and XPU tensors where no compiled kernel does, and check the compiled ones
where both run. Nothing is imported here: Triton is loaded when the first kernel is asked for
(:mod:`robustgate.ops.backends.triton`).
"""
