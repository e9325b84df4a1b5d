"""Run lm-evaluation-harness on a modular model: ``python -m robustgate.lm.harness``.

All arguments are those of ``lm-eval``::

    python -m robustgate.lm.harness --model_args pretrained=modular --tasks lambada_openai
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Register the model ``robustgate`` with lm_eval and run its command line.

    Args:
        arguments: of the command line; those of this process if left out.

    Raises:
        SystemExit: lm_eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise SystemExit(
            'lm_eval is not installed; install it with: pip install "robustgate[harness]"'
        )
    from lm_eval.__main__ import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
        cli_evaluate,
    )

    from robustgate.lm.harness_model import NAME

    given = list(sys.argv[1:] if arguments is None else arguments)
    runs = bool(given) and given[0] not in ("ls", "validate", "-h", "--help")
    if runs and "--model" not in given:
        given += ["--model", NAME]
    sys.argv = ["lm-eval", *given]
    cli_evaluate()


if __name__ == "__main__":
    main()
