"""The report of an evaluated modular model: one HTML file with figures, and Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from robustgate import __version__
from robustgate.lm.modular import ModularModel
from robustgate.lm.page import Page, Section
from robustgate.lm.results import Evaluation
from robustgate.lm.sections import by_domain, gate, provenance, solver, worst_case
from robustgate.lm.trace import Trace


def write_report(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    title: str = "One model from many experts",
    appendix: Sequence[Section] = (),
) -> Path:
    """Write ``index.html`` and ``report.md`` about an evaluated modular model.

    Args:
        run: Folder of the model, after ``robustgate evaluate``.
        out: Folder to write to, made if needed.

    Other:
        title: Heading of the page.
        appendix: Further sections, such as how the experts were trained.

    Returns:
        Path of ``index.html``, one file that needs no other and no network.

    Raises:
        FileNotFoundError: ``run`` holds no model, or one that was not evaluated.
        ValueError: A file in ``run`` is damaged.
        ImportError: An optional dependency is missing.

    Example:
        >>> write_report("modular/", "report/")                               # doctest: +SKIP
        PosixPath('report/index.html')
    """
    model = ModularModel.load(run)
    evaluation = Evaluation.load(run)
    trace = Trace.load(run)
    documents = sum(result.documents for result in evaluation.systems[0].domains)
    page = Page(
        title,
        f"{len(model.experts)} frozen experts, {len(model.domains)} domains, evaluated on "
        f"{documents:,} held-out documents. All losses are in nats; lower is better.",
        model.sentence(),
        (
            worst_case(model, evaluation),
            by_domain(evaluation),
            solver(model),
            gate(trace),
            provenance(model, evaluation),
            *appendix,
        ),
        f"Written by robustgate {__version__}.",
    )
    return page.write(Path(out))
