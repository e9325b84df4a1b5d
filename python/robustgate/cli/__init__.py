"""The command ``robustgate``. Commands import what they need when they run."""

from robustgate.cli import demo, experts, gate, generate, judge, measure
from robustgate.cli.app import app

__all__ = ["app", "demo", "experts", "gate", "generate", "judge", "main", "measure"]


def main() -> None:
    """Run the command line."""
    app()
