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


__all__ = ["cpu", "cuda", "divergences", "likelihoods", "native", "triton", "unavailable"]
