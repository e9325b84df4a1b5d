"""The command line that the study's commands share."""

import argparse
import os
from pathlib import Path

from presets import PRESETS


def parser(purpose: str) -> argparse.ArgumentParser:
    """Return a parser of what every command reads; commands add their own."""
    made = argparse.ArgumentParser(description=purpose.splitlines()[0])
    made.add_argument("--preset", choices=PRESETS, default="cpu")
    made.add_argument("--out", type=Path, default=Path("domains-study"))
    text = os.environ.get("ROBUSTGATE_DATA")
    made.add_argument("--data", type=Path, default=text, required=text is None)
    return made
