"""Take a finished study's small results into the repository.

    python benchmarks/domains/publish.py FOLDER

Copies ``results.json`` to ``benchmarks/results/domains.json`` and the charts to
``benchmarks/figures/``, and puts ``table.md`` between the markers of ``docs/evidence.md``.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    study = Path(sys.argv[1])
    shutil.copy(study / "results.json", ROOT / "benchmarks" / "results" / "domains.json")
    for chart in study.glob("*.svg"):
        shutil.copy(chart, ROOT / "benchmarks" / "figures" / f"domains_{chart.name}")
    page = ROOT / "docs" / "evidence.md"
    start, end = "<!-- domains -->", "<!-- /domains -->"
    table = (study / "table.md").read_text("utf-8").strip()
    text, count = re.subn(
        f"{start}.*?{end}",
        lambda _: f"{start}\n{table}\n{end}",
        page.read_text("utf-8"),
        flags=re.DOTALL,
    )
    if count != 1:
        sys.exit(f"{page}: expected one pair of markers {start} {end}, found {count}")
    page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
