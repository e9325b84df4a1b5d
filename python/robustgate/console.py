"""How every command of ``robustgate`` behaves: options with many values, output, errors.

======  ==================================================================================
status  meaning
======  ==================================================================================
0       done
1       failure while running: a loss that is not finite, a full disk, a killed worker
2       bad input: an unknown option, a missing or damaged file, a value out of range
130     interrupted; the same command continues where it stopped
======  ==================================================================================

Results go to standard output, as text or with ``--json`` as one JSON value. Everything else,
progress bars included, goes to standard error. An error is one line; ``ROBUSTGATE_DEBUG=1`` shows
where it came from.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

if TYPE_CHECKING:
    from robustgate.lm.evaluation.results import Evaluation

BAD_INPUT = (
    ValueError,
    TypeError,
    LookupError,
    ImportError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
"""Errors of the caller, exit status 2; any other ends with status 1."""


@dataclass(frozen=True)
class Answer:
    """What a command returns.

    Attributes:
        data: For machines: JSON values.
        view: For people: what rich prints, from top to bottom.
    """

    data: dict[str, Any]
    view: tuple[RenderableType, ...]


class Command(TyperCommand):
    """A command whose repeatable options take several values, and that prints its ``Answer``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse ``--experts a b c`` as ``--experts a --experts b --experts c``."""
        repeatable = {
            name
            for option in self.params
            if getattr(option, "multiple", False)
            for name in option.opts
        }
        return super().parse_args(ctx, spread(args, repeatable))

    def invoke(self, ctx: Any) -> None:
        """Run the command, print what it returns, and end with the status its outcome has."""
        try:
            with redirect_stdout(sys.stderr):
                answer: Answer = super().invoke(ctx)
        except KeyboardInterrupt:
            _complain("interrupted; the same command continues where it stopped")
            raise typer.Exit(130) from None
        except typer.Exit:
            raise
        except Exception as error:
            if os.environ.get("ROBUSTGATE_DEBUG"):
                raise
            _complain(f"error: {describe(error)}")
            raise typer.Exit(2 if isinstance(error, BAD_INPUT) else 1) from None
        if ctx.params["as_json"]:
            sys.stdout.write(json.dumps(answer.data, indent=2) + "\n")
        else:
            console = Console(highlight=False)
            for part in answer.view:
                console.print(part, soft_wrap=isinstance(part, str))


def spread(args: Sequence[str], repeatable: set[str]) -> list[str]:
    """Repeat an option before each of the values that follow it.

    Example:
        >>> spread(["--experts", "a", "b", "--store", "s"], {"--experts"})
        ['--experts', 'a', '--experts', 'b', '--store', 's']
    """
    out: list[str] = []
    option, values = "", 0
    for arg in args:
        if arg.startswith("-"):
            option, values = arg if arg in repeatable else "", 0
        else:
            if option and values:
                out.append(option)
            values += 1
        out.append(arg)
    return out


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Return the leaves of nested mappings with dotted names."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in flatten(value[key], f"{name}.{key}".lstrip("."))]
    return [(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


def evaluation_tables(evaluation: Evaluation) -> tuple[RenderableType, ...]:
    """Return the losses of every system, what it loses in the worst case, and the notes."""
    losses = Table(title="Held-out documents; lower is better")
    losses.add_column("nats per token", no_wrap=True)
    for domain in (*evaluation.domains, "mean"):
        losses.add_column(domain, justify="right")
    worst = Table(title="In the worst mixture of the domains")
    worst.add_column("excess in nats", no_wrap=True)
    for column in ("per document", "per token", "worst domain"):
        worst.add_column(column, justify="right")
    for system in evaluation.systems:
        ours = system.name == evaluation.ours
        style = "bold green" if ours else "" if system.fair else "dim"
        own = [result.nll_per_token for result in system.domains]
        values = (f"{value:.3f}" for value in (*own, system.mean_nll_per_token))
        losses.add_row(system.label, *values, style=style)
        worst.add_row(
            system.label,
            str(system.worst_excess_per_document),
            f"{system.worst_excess_per_token.value:.4f}",
            system.worst_domain,
            style=style,
        )
    return losses, worst, *map(escape, evaluation.notes)


def describe(error: BaseException) -> str:
    """Return an error as one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, LookupError) and error.args:
        text = str(error.args[0])
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__


def _complain(line: str) -> None:
    Console(stderr=True).print(
        line, style="bold red", markup=False, highlight=False, soft_wrap=True
    )
