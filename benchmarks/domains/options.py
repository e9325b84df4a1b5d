"""The command line that the study's commands share."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from presets import DOMAINS, PRESETS, Preset


def parser(purpose: str) -> argparse.ArgumentParser:
    """Return a parser of what every command reads; commands add their own."""
    made = argparse.ArgumentParser(description=purpose.splitlines()[0])
    made.add_argument("--preset", choices=PRESETS, default="cpu")
    made.add_argument("--out", type=Path, default=Path("domains-study"))
    text = os.environ.get("ROBUSTGATE_DATA")
    made.add_argument("--data", type=Path, default=text, required=text is None)
    return made


def chosen(options: argparse.Namespace) -> Preset:
    """Return the preset, over the domains whose text is there: the study's own first."""
    found = sorted(path.parent.name for path in options.data.glob("*/train.txt"))
    if len(found) < 2:
        raise SystemExit(f"{options.data}: expected <domain>/train.txt of two domains or more")
    own = [name for name in DOMAINS if name in found]
    others = [name for name in found if name not in DOMAINS]
    return replace(PRESETS[options.preset], domains=(*own, *others))
