"""The report of an evaluated modular model: one self-contained HTML file, and Markdown."""

from robustgate.lm.report.write import write_report

__all__ = ["write_report"]
