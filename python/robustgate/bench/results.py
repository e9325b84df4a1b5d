"""One row of results, and CSV files of rows."""

from __future__ import annotations

import csv
import io
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, get_type_hints

import torch

from robustgate import __version__
from robustgate.lm.files import write_atomic


@dataclass(frozen=True)
class Row:
    """One variant of one measurement; None where there is nothing to say.

    Attributes:
        op: public function.
        mode: what was timed, a name of :data:`robustgate.bench.benchmark.MODES`.
        variant: ``robustgate``, ``eager ...``, ``compiled ...``, else a peer.
        dtype: of logits, hidden states or log-probs.
        rows: N.
        experts: K.
        vocab: V.
        hidden: H.
        threads: of torch.
        median_us: microseconds.
        p20_us: 20th percentile.
        p80_us: 80th percentile.
        gigabytes_per_second: the op's byte formula / median.
        gigaflops_per_second: the op's formula of arithmetic / median, for linear ops.
        share_of_roof: of the machine's copy rate; for linear ops, of its GEMM rate.
        speedup_eager: time of the fastest eager variant / this one's.
        speedup_compiled: time of the fastest compiled variant / this one's.
        extra_mib: peak memory beyond inputs and results, MiB.
        error: largest relative L2 error against float64.
        contended: a neighbour was busy; the ratios are worth nothing.
        device: name of the processor or GPU.
        torch: version.
        robustgate: version.
        commit: of the source tree, if there is one.
        date: ISO 8601.
        sweep: the size that a scaling study varies, else empty.
    """

    op: str
    mode: str
    variant: str
    dtype: str
    rows: int
    experts: int
    vocab: int
    hidden: int
    threads: int
    median_us: float
    p20_us: float
    p80_us: float
    gigabytes_per_second: float
    gigaflops_per_second: float | None
    share_of_roof: float
    speedup_eager: float | None
    speedup_compiled: float | None
    extra_mib: float | None
    error: float
    contended: bool
    device: str
    torch: str
    robustgate: str
    commit: str
    date: str
    sweep: str

    @property
    def kind(self) -> str:
        """``robustgate``, ``eager``, ``compiled`` or ``peer``."""
        return kind_of(self.variant)


def kind_of(variant: str) -> str:
    """Return ``robustgate``, ``eager``, ``compiled`` or ``peer``."""
    first = variant.partition(" ")[0]
    return first if first in ("robustgate", "eager", "compiled") else "peer"


def provenance(device: torch.device) -> dict[str, str]:
    """Return the columns that say where and with what a row was measured."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "robustgate": __version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from robustgate import env

    return f"{env.collect()['cpu']['name']} ({platform.machine()})"


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write rows, header first; None is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomic(path, text.getvalue().encode())


def read_csv(path: Path) -> list[Row]:
    """Read what :func:`write_csv` wrote.

    Raises:
        ValueError: the header is another, or a cell is not of its column's type.
    """
    types = get_type_hints(Row)
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(types):
            raise ValueError(f"{path}: expected the columns {','.join(types)}")
        try:
            return [
                Row(**{name: _parse(types[name], cell) for name, cell in line.items()})
                for line in reader
            ]
        except ValueError as error:
            raise ValueError(f"{path}: line {reader.line_num}: {error}") from error


def _parse(kind: Any, cell: str) -> Any:
    if kind is bool:
        return {"True": True, "False": False}[cell]
    if kind in (str, int, float):
        return kind(cell)
    return float(cell) if cell else None
