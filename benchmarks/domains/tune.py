"""What a change of the preset is worth, so that no badly tuned model is what the gates beat.

    python benchmarks/domains/tune.py KIND [FIELD=VALUE ...] [--preset cpu|gpu|quick] [--out FOLDER]

Trains seed 0's ``experts``, ``monolith``, ``brief`` or ``small`` with fields of the preset changed
(``scale``: of the first weights) and prints the loss on validation text, nats per token, of every
domain (that of its own expert) and their mean. Without changes the models are the study's own.
"""

from dataclasses import fields, replace
from pathlib import Path

import torch
import training
from options import chosen, parser
from presets import Preset
from run import claim

from robustgate.lm import ExpertSet, score
from robustgate.lm.training.recipe import SCHEDULES

KINDS = {
    "experts": training.experts,
    "monolith": training.monolith,
    "brief": training.brief,
    "small": training.small,
}


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("kind", choices=KINDS)
    reader.add_argument("changes", nargs="*", metavar="FIELD=VALUE", default=[])
    options = reader.parse_args()
    preset = chosen(options)
    claim(options.out, options.preset, preset)
    try:
        changed(preset, *options.changes)
    except ValueError as error:
        reader.error(str(error))
    torch.set_num_threads(1)
    found = loss(options.data, options.out, preset, options.kind, *options.changes)
    print(options.kind, *options.changes, *(f"{name} {nll:.4f}" for name, nll in found.items()))
    print(f"mean {sum(found.values()) / len(found):.4f}")


def loss(data: Path, out: Path, preset: Preset, kind: str, *changes: str) -> dict[str, float]:
    """Return the losses on validation text by domain, nats per token."""
    place = out / "tuned" / "-".join((kind, *changes)) if changes else out
    preset = changed(preset, *changes)
    training.tokenizer(data, place, preset)
    KINDS[kind](data, place, preset, 0)
    losses = {}
    for corpus in training.corpora(data, "valid", preset):
        name = corpus.name
        trained = place / "seed0" / kind / (name if kind == "experts" else "")
        model = ExpertSet.open({kind: trained})
        store = score(model, [corpus], place / "tuning" / f"{kind}-{name}", progress=False)
        losses[name] = float(-store.document_log_probs(name, (kind,)).sum())
        losses[name] /= store.corpus(name).tokens
    return losses


def changed(preset: Preset, *changes: str) -> Preset:
    """Return the preset with the changes ``FIELD=VALUE``, a number or a word."""
    known = {field.name: type(getattr(preset, field.name)) for field in fields(preset)}
    for change in changes:
        name, _, value = change.partition("=")
        if name == "scale":
            models = {
                key: {**getattr(preset, key), "initializer_range": float(value)}
                for key in ("expert", "monolith")
            }
            preset = replace(preset, **models)
        elif name.endswith("schedule") and value not in SCHEDULES:
            raise ValueError(f"{name}: expected one of {', '.join(SCHEDULES)}, got {value!r}")
        elif known.get(name) in (int, float, str):
            preset = replace(preset, **{name: known[name](value)})
        else:
            raise ValueError(f"expected FIELD=VALUE with a number or word of a preset: {change!r}")
    return preset


if __name__ == "__main__":
    main()
