"""Five domains of real text: experts, one robust model of them, and what it is compared with.

    python benchmarks/domains/run.py [--preset cpu|gpu|quick] [--seeds N] [--jobs J] [--out FOLDER]

Data: ``<domain>/{train,valid,test}.txt`` in the folder ``--data``, by default that named by the
environment variable ROBUSTGATE_DATA. Finished stages are skipped and a killed training goes on
where it stopped, so that a call after a kill costs only what is missing. Writes ``results.json``
(every number of every seed), ``table.md`` and charts as SVG.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import judging
import training
from figures import draw
from presets import PRESETS, Preset
from summary import Outcome, summarise
from table import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("domains-study"))
    parser.add_argument("--data", type=Path, default=os.environ.get("ROBUSTGATE_DATA"))
    options = parser.parse_args()
    if options.data is None:
        parser.error("say where the text is: --data FOLDER, or ROBUSTGATE_DATA")
    data, preset = Path(options.data), PRESETS[options.preset]
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
    numbers = [asdict(outcome) for outcome in found]
    (out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
    text = table(found)
    (out / "table.md").write_text(text, "utf-8")
    draw(found, out)
    print(text)


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
