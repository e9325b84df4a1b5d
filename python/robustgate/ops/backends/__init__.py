"""Backends: each module registers its kernels on the schemas, and nothing else.

Which one serves which op is visible in ``robustgate env``; a backend that cannot run says why in
:func:`unavailable`.
"""

from robustgate.ops.backends import cpu, cuda, divergences, likelihoods, native, triton


def unavailable() -> dict[str, str]:
    """Return, for each backend that cannot serve this process, the reason."""
    reasons = {}
    if native.import_error is not None:
        reasons["native"] = f"the compiled extension cannot be imported: {native.import_error}"
    if (reason := cuda.why_unusable()) is not None:
        reasons["native (cuda)"] = reason
    if (reason := triton.why_unusable()) is not None:
        reasons["triton"] = reason
    return reasons


def left_to_eager() -> dict[str, str]:
    """Return, for each backend, what eager torch runs in its place."""
    return {"native (cpu)": cpu.LEAVES, "native (cuda)": cuda.LEAVES, "triton": triton.LEAVES}


__all__ = [
    "cpu",
    "cuda",
    "divergences",
    "left_to_eager",
    "likelihoods",
    "native",
    "triton",
    "unavailable",
]
