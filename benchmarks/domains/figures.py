"""The study's charts: excess by domain, and what happens where a text changes its domain."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from summary import Outcome

COLOURS = {
    "static uniform mixture": "#b0b8c4",
    "previous-token gate": "#8c959f",
    "weight-averaged soup": "#d4a72c",
    "monolith-small": "#f0883e",
    "monolith-brief": "#e16f57",
    "monolith": "#cf222e",
    "uniform Bayes mixture": "#8957e5",
    "robust Bayes mixture": "#6639ba",
    "token mlp": "#54aeff",
    "token transformer": "#0969da",
}
SWITCH = ("uniform Bayes mixture", "fixed-share mixture", "token mlp", "token transformer")
plt.rcParams.update({"svg.hashsalt": "robustgate", "svg.fonttype": "none", "font.size": 9})


def draw(found: list[Outcome], folder: Path) -> None:
    """Draw both charts into a folder."""
    _excess(found, folder / "excess.svg")
    if found[0].switch:
        _switch(found, folder / "switch.svg")


def _excess(found: list[Outcome], file: Path) -> None:
    """One point per system and domain, mean over seeds with the range of the seeds."""
    shown = [name for name in COLOURS if name in found[0].systems["experts"]]
    domains = found[0].domains
    figure, axes = plt.subplots(figsize=(9, 4))
    for place, name in enumerate(shown):
        rows = np.array([run.systems["experts"][name].excess for run in found])  # [seeds, D]
        x = np.arange(len(domains)) + (place - (len(shown) - 1) / 2) * 0.8 / len(shown)
        centre = rows.mean(axis=0)
        reach = np.abs(np.stack([rows.min(axis=0), rows.max(axis=0)]) - centre)
        axes.errorbar(x, centre, yerr=reach, fmt="o", markersize=4, color=COLOURS[name], label=name)
    axes.axhline(0.0, color="#57606a", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=0.1)  # what is close to 0 matters most
    marks = (-0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2)
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.set_yticks([], minor=True)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("NLL less the oracle expert's, nats per token")
    axes.legend(frameon=False, fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    _save(figure, file)


def _switch(found: list[Outcome], file: Path) -> None:
    """Excess by distance from the switch, mean over seeds."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for name in SWITCH:
        if name in found[0].switch:
            rows = np.array([run.switch[name] for run in found])
            axes.plot(
                found[0].switch_positions,
                rows.mean(axis=0),
                color=COLOURS.get(name, "#2da44e"),
                label=name,
            )
    axes.axhline(0.0, color="#57606a", linewidth=0.8)
    axes.axvline(0.0, color="#57606a", linewidth=0.8, linestyle=":")
    axes.set(xlabel="tokens from the switch", ylabel="NLL less that of each half's oracle")
    axes.legend(frameon=False, fontsize=7)
    _save(figure, file)


def _save(figure: plt.Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
