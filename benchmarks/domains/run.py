"""Five domains of real text: experts, one robust model of them, and what it is compared with.

    python benchmarks/domains/run.py [--preset cpu|gpu|quick] [--seeds N] [--jobs J] [--out FOLDER]

Data: ``<domain>/{train,valid,test}.txt`` in the folder ``--data``, by default that named by the
environment variable ROBUSTGATE_DATA; two domains or more. Finished stages are skipped and a killed
training goes on where it stopped, so that a call after a kill costs only what is missing. Writes
``results.json`` (every number of every seed), ``table.md`` and charts as SVG.
"""

import json
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import judging
import training
from figures import draw
from options import chosen, parser
from presets import Preset
from summary import Outcome, summarise
from table import table


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--seeds", type=int, default=3)
    reader.add_argument("--jobs", type=int, default=2, help="processes at once, one thread each")
    options = reader.parse_args()
    data, preset = options.data, chosen(options)
    claim(options.out, options.preset, preset)
    training.tokenizer(data, options.out, preset)
    with ProcessPoolExecutor(
        options.jobs, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        for tasks in stages(preset, options.seeds):
            waiting = {
                pool.submit(task, data, options.out, preset, seed): (task, seed)
                for task, seed in tasks
            }
            start = time.perf_counter()
            for future in as_completed(waiting):
                future.result()
                task, seed = waiting[future]
                spent = time.perf_counter() - start
                print(f"seed {seed}: {task.__name__} after {spent:.0f} s", flush=True)
    found = [summarise(options.out, seed) for seed in range(options.seeds)]
    write(found, options.out)


def stages(preset: Preset, seeds: int) -> list[list[tuple[training.Task, int]]]:
    """Return what may run side by side, stage after stage; the longest tasks come first."""
    every = range(seeds)
    train = [(training.monolith, seed) for seed in every]
    shorter = (training.experts, training.small, training.brief)
    train += [(task, seed) for seed in every for task in shorter]
    train += [(training.scratch, seed) for seed in range(min(seeds, preset.scratch_seeds))]
    scores = [(task, seed) for seed in every for task in (judging.test, judging.valid)]
    return [train, scores, [(judging.judge, seed) for seed in every]]


def write(found: list[Outcome], out: Path) -> None:
    """Write numbers, tables and charts."""
    numbers = json.dumps(_rounded([asdict(outcome) for outcome in found]), indent=1)
    rows = re.sub(r"\[[^][{}]*\]", lambda row: " ".join(row[0].split()), numbers)
    (out / "results.json").write_text(rows + "\n", "utf-8")
    text = table(found)
    (out / "table.md").write_text(text, "utf-8")
    draw(found, out)
    print(text)


def _rounded(content: Any) -> Any:
    """Return the content with six significant digits of every number."""
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_rounded(value) for value in content]
    return float(f"{content:.6g}") if isinstance(content, float) else content


def claim(out: Path, name: str, preset: Preset) -> None:
    """Make the folder this preset's, or refuse one that is another's."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "preset.json"
    wanted = json.loads(json.dumps({"name": name, **asdict(preset)}))
    if not file.exists():
        file.write_text(json.dumps(wanted, indent=1) + "\n", "utf-8")
    elif json.loads(file.read_text("utf-8")) != wanted:
        sys.exit(f"{out}: holds another preset, or another version of it; choose another folder")


if __name__ == "__main__":
    main()
