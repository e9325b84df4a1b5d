"""The paper's synthetic study, with what it leaves out.

    python benchmarks/paper/run.py [--quick] [--seeds N] [--jobs J] [--device D] [--out FOLDER]

Writes ``results.json`` (every number of every seed), ``table.md`` (claim, reproduced?, figures) and
charts as SVG. ``--quick``: one seed of the clean variant with little training, to see it run.
"""

import argparse
import json
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from figures import draw
from study import Effort, Outcome, run
from table import table
from tasks import VARIANTS

FULL = Effort(model_steps=3000, game_steps=1500, router_steps=300, pool=4000, oracles=7)
QUICK = Effort(model_steps=600, game_steps=300, router_steps=100, pool=1000, oracles=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="seeds at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("paper-study"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    effort, seeds = (QUICK, 1) if options.quick else (FULL, options.seeds)
    variants = VARIANTS[:1] if options.quick else VARIANTS
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the models are too small for more
    device = torch.device(options.device)
    waiting: dict[str, list[Future[Outcome]]] = {}
    start = time.perf_counter()
    with ProcessPoolExecutor(
        options.jobs, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        for variant in variants:
            runs = [pool.submit(run, variant, seed, effort, device) for seed in range(seeds)]
            waiting[variant.name] = runs
        found: dict[str, list[Outcome]] = {}
        for name, runs in waiting.items():
            found[name] = [future.result() for future in runs]
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    numbers = {name: [asdict(outcome) for outcome in runs] for name, runs in found.items()}
    (options.out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
    text = table(found)
    (options.out / "table.md").write_text(text, "utf-8")
    draw(found, options.out)
    print(text)


if __name__ == "__main__":
    main()
