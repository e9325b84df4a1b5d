"""Write the tables of README.md and benchmarks/README.md, and the charts, from the CSV files.

    python benchmarks/tables.py

Only what stands between a marker such as `<!-- speed -->` and its end is replaced. A file that
holds a row taken beside a busy neighbour is refused.
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from charts import scaling_chart, speed_chart

from robustgate.bench.ops import BENCHMARKS
from robustgate.bench.results import Row, read_csv

HERE = Path(__file__).parent
SHOWN = {
    "forward": "forward",
    "frozen": "forward + backward to the gate",
    "backward": "backward",
    "forward_backward": "forward + backward",
}


def read(path: Path) -> list[Row]:
    rows = read_csv(path)
    if any(row.contended for row in rows):
        raise SystemExit(f"{path} holds rows taken beside a busy neighbour: measure again")
    return rows


Group = list[Row]  # the variants of one measurement


def groups(rows: Iterable[Row]) -> list[Group]:
    found: dict[tuple[object, ...], Group] = {}
    for row in rows:
        size = (row.rows, row.experts, row.vocab, row.hidden, row.threads, row.sweep)
        found.setdefault((row.op, row.dtype, row.mode, *size), []).append(row)
    return list(found.values())


def ours(group: Group) -> Row:
    return next(row for row in group if row.kind == "robustgate")


def fastest(group: Group, kind: str) -> Row | None:
    return min((r for r in group if r.kind == kind), key=lambda r: r.median_us, default=None)


def first_groups(rows: list[Row], threads: int) -> dict[tuple[str, str, str], Group]:
    """The first measurement of each op, dtype and mode: a file may hold others of other sizes."""
    found: dict[tuple[str, str, str], Group] = {}
    for group in groups(rows):
        row = group[0]
        if row.threads == threads:
            found.setdefault((row.op, row.dtype, row.mode), group)
    return found


def markdown(header: list[str], lines: Iterable[list[str]], text_columns: int) -> str:
    align = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, align, *lines])


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1e3:.2f}"


def mebibytes(row: Row | None) -> str:
    return "" if row is None or row.extra_mib is None else f"{row.extra_mib:.0f}"


def rate(row: Row) -> str:
    if row.gigaflops_per_second is None:
        return f"{row.gigabytes_per_second:.1f} GB/s"
    return f"{row.gigaflops_per_second:.0f} GFLOP/s"


def short_table(rows: list[Row]) -> str:
    """One line for each op and dtype: one thread, forward, and forward + backward."""
    found = first_groups(rows, threads=1)
    lines = []
    for op, dtype in dict.fromkeys(key[:2] for key in found):
        cells = [f"`{op}`", dtype]
        for mode in ("forward", "forward_backward"):
            group = found.get((op, dtype, mode))
            if group is None:
                cells += [""] * 4
                continue
            row = ours(group)
            cells += [
                milliseconds(row.median_us),
                f"{row.share_of_roof:.0%}",
                times(row.speedup_compiled),
                times(row.speedup_eager),
            ]
        lines.append(cells)
    header = ["op", "inputs", "forward ms", "of roof", "x compiled", "x eager"]
    header += ["fwd + bwd ms", "of roof", "x compiled", "x eager"]
    return markdown(header, lines, text_columns=2)


def our_table(rows: list[Row], threads: int) -> str:
    lines = []
    for (op, dtype, mode), group in first_groups(rows, threads).items():
        row = ours(group)
        lines.append(
            [
                f"`{op}`",
                dtype,
                SHOWN[mode],
                milliseconds(row.median_us),
                rate(row),
                f"{row.share_of_roof:.0%}",
                times(row.speedup_compiled),
                times(row.speedup_eager),
                f"{row.error:.0e}",
            ]
        )
    header = ["op", "inputs", "pass", "ms", "rate", "of roof", "x compiled", "x eager", "error"]
    return markdown(header, lines, text_columns=3)


def memory_table(rows: list[Row]) -> str:
    """Peak memory: ours, and the least of the others of a kind."""
    lines = []
    for (op, dtype, mode), group in first_groups(rows, threads=1).items():
        if mode not in ("forward", "forward_backward"):
            continue
        known = [row for row in group if row.extra_mib is not None]
        cells = [f"`{op}`", dtype, SHOWN[mode], mebibytes(ours(group))]
        for kind in ("compiled", "eager", "peer"):
            held = [row for row in known if row.kind == kind]
            cells.append(mebibytes(min(held, key=lambda row: row.extra_mib or 0.0, default=None)))
        lines.append(cells)
    header = ["op", "inputs", "pass", "robustgate", "least compiled", "least eager", "least peer"]
    return markdown(header, lines, text_columns=3)


def peer_table(rows: list[Row]) -> str:
    lines = []
    for group in groups(rows):
        mine = ours(group)
        for row in group:
            if row.kind != "peer":
                continue
            lines.append(
                [
                    row.variant,
                    f"`{row.op}`, K = {row.experts}",
                    row.dtype,
                    SHOWN[row.mode],
                    str(row.threads),
                    milliseconds(row.median_us),
                    milliseconds(mine.median_us),
                    f"{row.median_us / mine.median_us:.2f}",
                    f"{mebibytes(row)} / {mebibytes(mine)}",
                    f"{row.error:.0e} / {mine.error:.0e}",
                ]
            )
    header = ["peer", "against", "inputs", "pass", "threads", "its ms", "our ms", "x faster"]
    header += ["MiB, its / ours", "error, its / ours"]
    return markdown(header, lines, text_columns=4) if lines else "No peer was measured."


def full_table(rows: list[Row]) -> str:
    lines = [
        [
            f"`{row.op}`",
            row.dtype,
            row.mode,
            row.variant,
            *(str(n) for n in (row.threads, row.rows, row.experts, row.vocab, row.hidden)),
            *(milliseconds(value) for value in (row.median_us, row.p20_us, row.p80_us)),
            rate(row),
            mebibytes(row),
            f"{row.error:.0e}",
        ]
        for row in rows
    ]
    header = ["op", "inputs", "mode", "variant", "threads", "N", "K", "V", "H", "ms", "p20", "p80"]
    header += ["rate", "MiB", "error"]
    return markdown(header, lines, text_columns=4)


def formula_table() -> str:
    """The work that each op is measured by: the formulas that are evaluated to count it."""
    lines = []
    for benchmark in BENCHMARKS:
        for unit, formulas in (("bytes", benchmark.bytes), ("flops", benchmark.flops)):
            if formulas:
                lines.append(
                    [f"`{benchmark.op}`", unit, *(formulas.get(mode, "") for mode in SHOWN)]
                )
    return markdown(["op", "of", *SHOWN.values()], lines, text_columns=6)


def caption(rows: list[Row], source: Path) -> str:
    first = rows[0]
    commit = f" ({first.commit})" if first.commit else ""
    return (
        f"{first.device}, torch {first.torch}, robustgate {first.robustgate}{commit}, "
        f"{first.date}. Source: `benchmarks/results/{source.name}`."
    )


def replace(page: Path, marker: str, text: str) -> None:
    content = page.read_text(encoding="utf-8")
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", flags=re.DOTALL)
    new, count = pattern.subn(lambda _: f"{start}\n{text}\n{end}", content)
    if count != 1:
        raise SystemExit(f"{page} needs one pair of markers {start} {end}, has {count}")
    page.write_text(new, encoding="utf-8")


def speed_section(rows: list[Row], source: Path) -> str:
    return f"""## Speed

![Rate of each op, forward, one thread](benchmarks/figures/speed_forward.svg)

One thread. "of roof" is the share of the machine's copy rate, for the linear ops of its GEMM rate;
"x compiled" and "x eager" are against the fastest of two compiled and of three eager formulations,
all measured in the same rounds, all with float32 arithmetic.

{short_table(rows)}

{caption(rows, source)}
How it is measured, other packages, memory, and what falls short:
[benchmarks/README.md](benchmarks/README.md)."""


def results_section(rows: list[Row], source: Path, charts: list[Path]) -> str:
    parts = [caption(rows, source)]
    for threads in sorted({row.threads for row in rows}):
        plural = "s" * (threads > 1)
        parts += [f"### robustgate, {threads} thread{plural}", our_table(rows, threads)]
    parts += ["### Against other packages", peer_table(rows)]
    parts += [
        "### Peak memory beyond inputs and results",
        "MiB, one thread. A gradient that is returned is not counted; what is saved for it is.",
        memory_table(rows),
    ]
    parts += [f"![{path.stem.replace('_', ' ')}](figures/{path.name})" for path in charts]
    details = f"<details>\n<summary>Every variant</summary>\n\n{full_table(rows)}\n\n</details>"
    return "\n\n".join([*parts, details])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpu", type=Path, default=HERE / "results" / "cpu.csv")
    parser.add_argument("--scaling", type=Path, default=HERE / "results" / "scaling.csv")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--page", type=Path, default=HERE / "README.md")
    parser.add_argument("--figures", type=Path, default=HERE / "figures")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    rows = read(arguments.cpu)
    arguments.figures.mkdir(parents=True, exist_ok=True)
    charts = []
    measured = first_groups(rows, threads=1)
    for mode in ("forward", "forward_backward"):
        chosen = [group for (_, _, m), group in measured.items() if m == mode]
        if chosen:
            charts.append(arguments.figures / f"speed_{mode}.svg")
            speed_chart(chosen, charts[-1])
    if arguments.scaling.exists():
        charts += scaling_chart(groups(read(arguments.scaling)), arguments.figures)
    replace(arguments.readme, "speed", speed_section(rows, arguments.cpu))
    replace(arguments.page, "speed", results_section(rows, arguments.cpu, charts))
    replace(arguments.page, "formulas", formula_table())


if __name__ == "__main__":
    main()
