"""One colour for each expert, and the same everywhere in a report."""

from __future__ import annotations

from robustgate.lm.evaluation.results import Evaluation, SystemResult
from robustgate.lm.report.page import Key
from robustgate.lm.report.svg import COLOURS


class Palette:
    """The classes of a report's colours.

    A domain has the colour of its best expert. The model itself has the accent colour, the
    monolith the colour of text, and every other system is grey.

    Args:
        evaluation: The evaluation.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        """Give each expert a colour, in their order."""
        self._experts = {name: f"c{k % COLOURS}" for k, name in enumerate(evaluation.experts)}
        self._domains = {
            domain: self._experts[best]
            for domain, best in zip(evaluation.domains, evaluation.best_expert, strict=True)
        }
        self._monoliths = [s.name for s in evaluation.systems if s.kind == "monolith"]
        self._ours = evaluation.ours

    def expert(self, name: str) -> str:
        """Return the class of an expert."""
        return self._experts[name]

    def domain(self, name: str) -> str:
        """Return the class of a domain; grey if it was not evaluated."""
        return self._domains.get(name, "rival")

    def system(self, system: SystemResult) -> str:
        """Return the class of a system."""
        if system.name == self._ours:
            return "chosen"
        if system.kind == "expert":
            return self.expert(system.name)
        grey = {"monolith": "dark", "oracle": "bound", "bound": "bound"}
        return grey.get(system.kind, "rival")

    def keys(self) -> tuple[Key, ...]:
        """Return the legend of the whole page."""
        return (
            Key(f"this model ({self._ours})", "chosen"),
            *(Key(f"expert {name}", style) for name, style in self._experts.items()),
            *(Key(name, "dark") for name in self._monoliths),
            Key("other systems", "rival"),
        )
