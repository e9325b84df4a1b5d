"""Charts of the benchmark's results, as SVG files that do not change when the numbers do not."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, StrMethodFormatter

from robustgate.bench.results import Row

COLOURS = {"robustgate": "#1f6feb", "compiled": "#e3902b", "eager": "#9aa4b2", "peer": "#8957e5"}
LABELS = {
    "robustgate": "robustgate",
    "compiled": "torch.compile, fastest",
    "eager": "eager torch, fastest",
    "peer": "other package, fastest",
}
ROOF = "#cf222e"
SWEEPS = {
    "rows": "N, rows",
    "experts": "K, experts",
    "vocab": "V, vocabulary",
    "threads": "threads",
}
DTYPES = ("float32", "bfloat16")
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}

Group = list[Row]

plt.rcParams.update(
    {
        "svg.hashsalt": "robustgate",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#57606a",
        "axes.axisbelow": True,
        "grid.color": "#e5e8ec",
        "legend.frameon": False,
    }
)


def rate(row: Row) -> float:
    flops = row.gigaflops_per_second
    return row.gigabytes_per_second if flops is None else flops


def is_linear(group: Group) -> bool:
    return group[0].gigaflops_per_second is not None


def best(group: Group) -> dict[str, Row]:
    """The fastest variant of each kind."""
    found: dict[str, Row] = {}
    for row in sorted(group, key=lambda row: row.median_us):
        found.setdefault(row.kind, row)
    return {kind: found[kind] for kind in COLOURS if kind in found}


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def speed_chart(groups: list[Group], path: Path) -> None:
    """Bars for each op: the fastest of each kind, and the roof; linear ops have their own."""
    lines = sorted({is_linear(group) for group in groups})
    panels = {
        (linear, dtype): [g for g in groups if (is_linear(g), g[0].dtype) == (linear, dtype)]
        for linear in lines
        for dtype in DTYPES
    }
    heights = [max(len(panels[linear, dtype]) for dtype in DTYPES) for linear in lines]
    figure, axes = plt.subplots(
        len(lines),
        len(DTYPES),
        figsize=(10, 1.3 + 0.66 * sum(heights)),
        layout="constrained",
        squeeze=False,
        height_ratios=[height + 0.6 for height in heights],
    )
    for axis, (linear, dtype), height in zip(
        axes.flat, panels, [h for h in heights for _ in DTYPES], strict=True
    ):
        if not panels[linear, dtype]:
            axis.set_axis_off()
            continue
        _bars(axis, panels[linear, dtype], "GFLOP/s" if linear else "GB/s")
        axis.set_ylim(height - 0.45, -0.55)
        axis.set_title(f"{dtype} inputs")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in COLOURS]
    figure.legend(handles, LABELS.values(), loc="outside lower center", ncols=len(COLOURS))
    first = groups[0][0]
    plural = "s" * (first.threads > 1)
    title = f"{PASSES[first.mode].capitalize()}, {first.threads} thread{plural}"
    _title(figure, f"{title}: higher is better")
    save(figure, path)


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _bars(axis: Axes, groups: list[Group], unit: str) -> None:
    height = 0.8 / len(COLOURS)
    for line, group in enumerate(groups):
        variants = best(group)
        top = line - height * (len(variants) - 1) / 2
        for place, (kind, row) in enumerate(variants.items()):
            bar = axis.barh(top + place * height, rate(row), height * 0.92, color=COLOURS[kind])
            labels = axis.bar_label(bar, fmt="%.3g", padding=2, fontsize=7, color="#24292f")
            labels[0].set_path_effects([withStroke(linewidth=2, foreground="white")])
    roofs = sorted(rate(row) / row.share_of_roof for g in groups for row in g if row.share_of_roof)
    if roofs:
        roof = roofs[len(roofs) // 2]
        axis.axvline(roof, color=ROOF, linewidth=1, linestyle="--", zorder=0.5)
        name = "GEMM" if unit == "GFLOP/s" else "copy"
        axis.annotate(
            f"{name} {roof:.0f}",
            (roof, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -8),
            textcoords="offset points",
            color=ROOF,
            fontsize=8,
        )
    axis.set_yticks(range(len(groups)), [group[0].op for group in groups])
    axis.margins(x=0.16)
    axis.set_xlabel(unit)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")


def scaling_chart(groups: list[Group], folder: Path) -> list[Path]:
    """A file for each op, dtype and mode with a panel for each size that varies; log axes."""
    studies: dict[tuple[str, str, str], list[Group]] = {}
    for group in groups:
        row = group[0]
        studies.setdefault((row.op, row.mode, row.dtype), []).append(group)
    paths = []
    for (op, mode, dtype), study in studies.items():
        swept = [name for name in SWEEPS if any(group[0].sweep == name for group in study)]
        figure, axes = plt.subplots(
            1,
            len(swept),
            figsize=(2.4 * len(swept) + 0.4, 3.0),
            layout="constrained",
            sharey=True,
            squeeze=False,
        )
        for axis, name in zip(axes[0], swept, strict=True):
            _lines(axis, name, [group for group in study if group[0].sweep == name])
        axes[0][0].set_ylabel("GFLOP/s" if is_linear(study[0]) else "GB/s")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(COLOURS))
        _title(figure, f"{op}, {PASSES.get(mode, mode)}, {dtype} inputs: higher is better")
        paths.append(folder / f"scaling_{op}_{mode}_{dtype}.svg")
        save(figure, paths[-1])
    return paths


def _lines(axis: Axes, sweep: str, groups: list[Group]) -> None:
    points: dict[str, list[tuple[int, float]]] = {}
    for group in groups:
        for kind, row in best(group).items():
            points.setdefault(kind, []).append((getattr(row, sweep), rate(row)))
    for kind, line in points.items():
        sizes, rates = zip(*sorted(line), strict=True)
        strong = kind == "robustgate"
        axis.plot(
            sizes,
            rates,
            marker="o",
            markersize=5 if strong else 4,
            linewidth=2.4 if strong else 1.4,
            color=COLOURS[kind],
            label=LABELS[kind],
        )
    values = sorted({getattr(group[0], sweep) for group in groups})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(values, [f"{value:,}" for value in values])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.minorticks_off()
    axis.set_xlabel(SWEEPS[sweep])
    axis.grid()
    first = groups[0][0]
    sizes = {"N": first.rows, "K": first.experts, "V": first.vocab, "threads": first.threads}
    moving = SWEEPS[sweep].partition(",")[0]
    fixed = ", ".join(f"{name} {size}" for name, size in sizes.items() if name != moving and size)
    axis.set_title(fixed, fontsize=8, color="#57606a")
