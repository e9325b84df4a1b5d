"""The study's charts, drawn like the paper's: losses against lambda, lambda_t, Z_t."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from study import EVERY, Outcome
from table import at

COLOURS = {
    "gate": "#1f6feb",
    "uniform Bayes": "#8957e5",
    "distilled router": "#2da44e",
    "retrained, small": "#9aa4b2",
    "retrained, large": "#57606a",
}
plt.rcParams.update({"svg.hashsalt": "robustgate", "svg.fonttype": "none", "font.size": 9})


def band(axes: Axes, x: np.ndarray, rows: np.ndarray, colour: str, label: str) -> None:
    """Mean over seeds with a band of one standard deviation; rows: [seeds, points]."""
    centre, width = rows.mean(axis=0), rows.std(axis=0)
    axes.plot(x, centre, color=colour, label=label)
    axes.fill_between(x, centre - width, centre + width, color=colour, alpha=0.2, linewidth=0)


def draw(found: dict[str, list[Outcome]], folder: Path) -> None:
    for name, runs in found.items():
        figure, (losses, mixture, normaliser) = plt.subplots(1, 3, figsize=(12, 3.4))
        shares = np.linspace(0, 1, 21)
        for model, colour in COLOURS.items():
            rows = np.array([[at(run.nll[model], s) for s in shares] for run in runs])
            band(losses, shares, rows, colour, model)
        points = np.array([[nll for _, nll in run.oracle] for run in runs])
        band(losses, np.array([s for s, _ in runs[0].oracle]), points, "#cf222e", "oracle, large")
        losses.set(xlabel="share of domain A", ylabel="NLL, nats per token", title=name)
        losses.legend(frameon=False, fontsize=7)
        steps = EVERY * np.arange(len(runs[0].mixture))
        band(mixture, steps, np.array([run.mixture for run in runs]), "#1f6feb", "")
        mixture.set(xlabel="step", ylabel="lambda_A", ylim=(0, 1))
        band(normaliser, steps, np.array([run.normaliser for run in runs]), "#1f6feb", "")
        normaliser.axhline(1.0, color="#57606a", linewidth=0.8)
        normaliser.set(xlabel="step", ylabel="Z, estimated")
        figure.tight_layout()
        file = folder / f"{name.replace(' ', '_')}.svg"
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
