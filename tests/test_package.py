"""The installed package: metadata, import cost, symbols of the binary."""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import robustgate
from robustgate import _C, env

PACKAGE = Path(robustgate.__file__).parent
BINARY = Path(_C.__file__)


def run(code: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, check=False
    )


def test_version_comes_from_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", robustgate.__version__)
    try:
        installed = metadata.version("robustgate")
    except metadata.PackageNotFoundError:
        pytest.skip("running from a source tree that is not installed")
    assert installed == robustgate.__version__


def test_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()


def test_public_names_exist():
    for module in (robustgate, robustgate.game, robustgate.lm):
        for name in module.__all__:
            assert getattr(module, name).__doc__


def test_import_needs_only_the_base_dependencies():
    """transformers, matplotlib, ... belong to the lm extra and are imported where they are used."""
    code = (
        "import sys\n"
        "import robustgate, robustgate.cli\n"
        "extra = {'transformers', 'tokenizers', 'accelerate', 'pyarrow', 'matplotlib', 'jinja2',"
        " 'triton', 'scipy'} & set(sys.modules)\n"
        "assert not extra, extra\n"
    )
    result = run(code, "-W", "error")
    assert result.returncode == 0, result.stderr


def test_a_missing_extension_is_loud_and_eager_serves():
    code = (
        "import sys, warnings\n"
        "sys.modules['robustgate._C'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import robustgate as rg\n"
        "assert any('runs on eager torch only' in str(w.message) for w in caught)\n"
        "import torch\n"
        "print(float(rg.mixture_nll([torch.zeros(1, 4)], torch.zeros(1), torch.tensor([2]))))\n"
        "from robustgate import env\n"
        "report = env.collect()\n"
        "assert 'cannot be imported' in report['unavailable']['native']\n"
        "assert report['serving']['cpu']['mixture_nll'] == ['eager']\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(1.3862944)


def test_env_says_which_backend_serves_which_op():
    report = env.collect()
    ops = [
        "expert_log_prob",
        "jsd",
        "mixture_kl",
        "mixture_log_prob",
        "mixture_log_softmax",
        "mixture_mean_log_prob",
        "mixture_nll",
    ]
    assert sorted(report["serving"]["cpu"]) == sorted([*ops, *(f"{op}_backward" for op in ops)])
    assert all(backends == ["native", "eager"] for backends in report["serving"]["cpu"].values())
    assert report["cpu"]["instruction_set"] in ("baseline", "avx2", "avx512")
    assert "triton" in report["unavailable"]


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed")
def test_binary_needs_no_torch_symbol_and_exports_only_its_init_function():
    def symbols(kind: str) -> list[str]:
        text = subprocess.run(
            ["nm", "-D", kind, str(BINARY)], capture_output=True, text=True, check=True
        ).stdout
        return [line.split()[-1] for line in text.splitlines()]

    needed = [
        name for name in symbols("--undefined-only") if re.search("c10|at::|torch|aoti", name)
    ]
    assert needed == []
    if sys.platform == "linux":
        assert symbols("--defined-only") == ["PyInit__C"]
