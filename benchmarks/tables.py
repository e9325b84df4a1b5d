"""Write the tables of README.md and benchmarks/README.md, and the figure, from the CSV files.

    python benchmarks/tables.py

Only what stands between `<!-- speed -->` and `<!-- /speed -->` is replaced.
"""

import csv
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SUMMARY = ("forward", "frozen", "backward")
MEANING = {
    "forward": "forward",
    "frozen": "forward + backward to the gate",
    "backward": "backward to the logits",
}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    contended = [row for row in rows if row["contended"] == "True"]
    assert not contended, f"{path.name} holds rows taken beside a busy neighbour"
    return rows


def groups(rows: list[dict[str, str]]) -> dict[tuple[str, ...], list[dict[str, str]]]:
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("threads", "dtype", "mode", "rows", "experts", "vocab"))
        found.setdefault(key, []).append(row)
    return found


def table(rows: list[dict[str, str]]) -> str:
    lines = [
        "| threads | logits | pass | ms | GB/s | of copy | x fastest compiled | x fastest eager |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (threads, dtype, mode, *_), variants in groups(rows).items():
        ours = next(row for row in variants if row["variant"] == "robustgate")
        lines.append(
            f"| {threads} | {dtype} | {MEANING[mode]} | {float(ours['median_us']) / 1e3:.2f} | "
            f"{float(ours['gigabytes_per_second']):.1f} | {float(ours['share_of_copy']):.0%} | "
            f"{float(ours['speedup_compiled']):.1f} | {float(ours['speedup_eager']):.1f} |"
        )
    return "\n".join(lines)


def full_table(rows: list[dict[str, str]]) -> str:
    lines = [
        "| threads | logits | pass | N | K | V | variant | median ms | p20 | p80 | GB/s | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (threads, dtype, mode, *shape), variants in groups(rows).items():
        for row in variants:
            times = " | ".join(
                f"{float(row[name]) / 1e3:.2f}" for name in ("median_us", "p20_us", "p80_us")
            )
            lines.append(
                f"| {threads} | {dtype} | {mode} | {' | '.join(shape)} | {row['variant']} "
                f"| {times} | {float(row['gigabytes_per_second']):.1f} | {row['error']} |"
            )
    return "\n".join(lines)


def caption(rows: list[dict[str, str]], source: Path) -> str:
    first = rows[0]
    return (
        f"{first['device']}, torch {first['torch']}, robustgate {first['robustgate']} "
        f"({first['commit']}), {first['date']}; N = {first['rows']}, K = {first['experts']}, "
        f"V = {first['vocab']}. Source: `benchmarks/results/{source.name}`."
    )


def replace(page: Path, text: str) -> None:
    content = page.read_text(encoding="utf-8")
    block = f"<!-- speed -->\n{text}\n<!-- /speed -->"
    new, count = re.subn(r"<!-- speed -->.*?<!-- /speed -->", lambda _: block, content, flags=re.S)
    assert count == 1, f"{page} needs one pair of speed markers"
    page.write_text(new, encoding="utf-8")


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Bars of GB/s: one thread, forward pass, every variant."""
    plt.rcParams.update({"svg.hashsalt": "robustgate", "svg.fonttype": "none", "font.size": 10})
    dtypes = ("float32", "bfloat16")
    fig, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", sharey=True)
    for axis, dtype in zip(axes, dtypes, strict=True):
        chosen = [
            row
            for row in rows
            if (row["threads"], row["mode"], row["dtype"]) == ("1", "forward", dtype)
        ]
        names = [row["variant"] for row in chosen][::-1]
        values = [float(row["gigabytes_per_second"]) for row in chosen][::-1]
        colours = ["#1f6feb" if name == "robustgate" else "#b8c0cc" for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        ours = next(row for row in chosen if row["variant"] == "robustgate")
        roof = float(ours["gigabytes_per_second"]) / float(ours["share_of_copy"])
        axis.axvline(roof, color="#d1242f", linewidth=1)
        axis.set_title(f"{dtype}: GB/s of logits, one thread (red: large copy)", fontsize=10)
        axis.set_xlim(0, 1.15 * max(roof, *values))
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, metadata={"Date": None})


def main() -> None:
    source = HERE / "results" / "cpu.csv"
    rows = read(source)
    note = caption(rows, source)
    figure(rows, HERE / "figures" / "mixture_nll_cpu.svg")
    picture = "![mixture_nll forward on one thread](benchmarks/figures/mixture_nll_cpu.svg)"
    replace(
        HERE.parent / "README.md",
        f"## Speed\n\n{picture}\n\n`mixture_nll` against the fastest of two compiled and three "
        "eager formulations, the variants of a line measured in one run:\n\n"
        f"{table(rows)}\n\n{note}\nHow it is measured, and what falls short: "
        "[benchmarks/README.md](benchmarks/README.md).",
    )
    replace(HERE / "README.md", f"{table(rows)}\n\nEvery variant:\n\n{full_table(rows)}\n\n{note}")


if __name__ == "__main__":
    main()
