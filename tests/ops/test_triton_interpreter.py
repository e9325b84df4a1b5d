"""The op tests once more on the Triton kernels, in Triton's interpreter: small shapes, no GPU.

Triton decides at its import whether it interprets, so that the tests run in processes of their own
with TRITON_INTERPRET=1: this file, run as a program, is pytest in such a process. The interpreter
takes milliseconds per program, hence the selections; a whole file runs with, for example,

    python tests/ops/test_triton_interpreter.py tests/ops/test_jsd.py
"""

import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch

HERE = Path(__file__).parent

# What to run, by file: values, gradients, extremes, near-equal experts, layouts, masks, random
# mixes of it all; every raw op, forward and backward.
SELECTIONS = {
    "likelihoods": {
        "test_triton_ops.py": "test",
        "test_numerics.py": "not saturated or 60 or 10.0",
        "test_kernels.py": "values and (65 or 1000) or layouts and bfloat16 or each_expert"
        " or ignored or mixture_log_prob and False or leading_shapes",
    },
    "jsd": {
        "test_jsd.py": "513 or numbers or duplicating",
        "test_jsd_numerics.py": "excluded and 1299 or 40 and not 40000 or zero_alone or disjoint"
        " or weight_of_one or 0.0-1 or 1e-06-1 or large_logits or 52 or 1104",
        "test_jsd_near_equal.py": "2-1e-06 or 5-0.001 or one_ulp and None-10] or digits"
        " or identical and dtype1 or impossible and 1e-06",
    },
    "mixtures": {
        "test_mixture_kl.py": "513 or infin or exclude or equal_gates or 1e-06 and None",
        "test_mixture_log_softmax.py": "513 or inf or tiny or zero",
        "test_regularisers.py": "513 or ignored or inf or numbers and True",
    },
    "everything": {
        "test_random_extremes.py": "triton-1] or triton-10 or triton-20 or triton-30 or triton-50",
        "test_every_op.py": "every_other and dtype1 and (smoothed or triton-jsd or kl)"
        " or every_other and dtype1 and softmax or nan_alone and (jsd or kl) and not linear"
        " or ignored_rows and True and not linear or leading_shapes and shape4 and True",
    },
    "linear": {
        "test_linear_mixture_nll.py": "transforms and (2 or 5) or of_the_products or mixed_dtypes"
        " or trainable or excluded or dtype2 and 97",
        "test_linear_jsd.py": "transforms and 2",
    },
    "raw ops": {"test_raw_ops.py": "agree and dtype0 or triton-float16"},
}


def why_not() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    version = metadata.version("triton")
    old = tuple(int(x) for x in version.split(".")[:2]) < (3, 7)
    if old and tuple(int(x) for x in numpy.__version__.split(".")[:2]) >= (2, 4):
        return (
            f"the interpreter of Triton {version} cannot run loops with numpy {numpy.__version__}"
        )
    return None


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SELECTIONS)
def test_interpreter(name):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    selection = SELECTIONS[name]
    keywords = " or ".join(f"{file} and ({words})" for file, words in selection.items())
    backends = "triton,eager" if name == "raw ops" else "triton"
    files = [HERE / file for file in selection]
    result = subprocess.run(
        [sys.executable, __file__, "-q", "-p", "no:cacheprovider", "-k", keywords, *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "ROBUSTGATE_TEST_BACKENDS": backends},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def round_to_bfloat16(cast):
    """Return the interpreter's cast, which truncates, rounding to nearest as every device does."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def run(builder, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(builder, source, dtype)
        rounded = torch.from_numpy(numpy.ascontiguousarray(source.data)).bfloat16()
        bits = rounded.view(torch.int16).numpy().view(numpy.uint16)
        return TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)

    return run


def main():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("ROBUSTGATE_TEST_BACKENDS", "triton")
    from triton.runtime.interpreter import InterpreterBuilder

    from robustgate.ops.triton import launch

    InterpreterBuilder.cast_impl = round_to_bfloat16(InterpreterBuilder.cast_impl)
    # A step takes the interpreter as long for 1024 columns as for the 128 that registers hold.
    launch.column_block = lambda vocab_size, experts, values: launch.block_of(vocab_size, 1024)
    # Infinities and NaN are numbers like any other on a device; numpy warns of them. Triton 3.6
    # turns arrays into loop bounds in a way that numpy 2.3 warns of and later ones refuse.
    ignored = (
        "ignore::RuntimeWarning:triton.runtime.interpreter",
        "ignore:Conversion of an array:DeprecationWarning",
    )
    return pytest.main([*(x for words in ignored for x in ("-W", words)), *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
