"""The report of an evaluated modular model: one HTML file with figures, and Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from robustgate import __version__
from robustgate.lm.evaluation.results import Evaluation
from robustgate.lm.evaluation.trace import Trace
from robustgate.lm.modular import ModularModel
from robustgate.lm.report.page import Page, Section
from robustgate.lm.report.palette import Palette
from robustgate.lm.report.sections import by_domain, headline_numbers, pairs, worst_case
from robustgate.lm.report.sections_experts import differences, forgetting, provenance
from robustgate.lm.report.sections_gate import gate, solver, switch, training


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
    palette = Palette(evaluation)
    documents = sum(result.documents for result in evaluation.systems[0].domains)
    sections = (
        worst_case(model, evaluation, palette),
        by_domain(evaluation, palette),
        pairs(evaluation, palette),
        gate(trace, palette),
        switch(evaluation, palette),
        forgetting(evaluation, palette),
        differences(evaluation, palette),
        solver(model, palette),
        training(model, palette),
        provenance(model, evaluation, palette),
        *appendix,
    )
    page = Page(
        title,
        f"{_count(len(model.experts), 'frozen expert')}, "
        f"{_count(len(evaluation.domains), 'domain')}, evaluated on "
        f"{_count(documents, 'held-out document')}. All losses are in nats; lower is better.",
        " ".join(
            [model.sentence(), *([] if model.training is None else [model.training.sentence()])]
        ),
        tuple(section for section in sections if section is not None),
        f"Written by robustgate {__version__}.",
        headline_numbers(model, evaluation),
        palette.keys(),
    )
    return page.write(Path(out))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
