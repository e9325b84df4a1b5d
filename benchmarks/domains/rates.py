"""The learning rates of the monoliths, so that a badly tuned one is not what the gates beat.

    python benchmarks/domains/rates.py [--preset cpu|gpu|quick] [--jobs J] [--data DATA] --out STUDY

Trains seed 0's monoliths at half, once and twice the preset's rates, and prints the loss of each on
validation text, nats per token. Those at the preset's rates are the study's own, in its folder. The
small monolith has the experts' rate.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from shutil import copytree

import torch
import training
from presets import DOMAINS, PRESETS, Preset

from robustgate.lm import ExpertSet, score

FACTORS = (1.0, 0.5, 2.0)
KINDS = {"monolith": training.monolith, "brief": training.brief}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, one thread each")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=os.environ.get("ROBUSTGATE_DATA"))
    options = parser.parse_args()
    if options.data is None:
        parser.error("say where the text is: --data FOLDER, or ROBUSTGATE_DATA")
    data, preset = Path(options.data), PRESETS[options.preset]
    training.tokenizer(data, options.out, preset)
    tasks = [(kind, factor) for kind in KINDS for factor in FACTORS]
    with ProcessPoolExecutor(
        options.jobs, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        found = [pool.submit(loss, data, options.out, preset, *task) for task in tasks]
        for (kind, factor), future in zip(tasks, found, strict=True):
            rate = getattr(preset, f"{kind}_rate") * factor
            print(f"{kind:9} {rate:g}  {future.result():.4f}", flush=True)


def loss(data: Path, out: Path, preset: Preset, kind: str, factor: float) -> float:
    """Return the loss on validation text, nats per token, mean over domains."""
    own = factor == 1.0
    place = out if own else out / "rates" / f"{kind}-{factor:g}"
    rates = {name: getattr(preset, name) * factor for name in ("monolith_rate", "brief_rate")}
    if not own:
        copytree(out / "tokenizer", place / "tokenizer", dirs_exist_ok=True)
    KINDS[kind](data, place, replace(preset, **rates), 0)
    documents = training.corpora(data, "valid", preset.documents)
    model = ExpertSet.open({kind: place / "seed0" / kind})
    store = score(model, documents, out / "rates" / f"{kind}-{factor:g}-valid", progress=False)
    losses = []
    for name in DOMAINS:
        log_probs = store.document_log_probs(name, (kind,))
        losses.append(float(-log_probs.sum() / store.corpus(name).tokens))
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
