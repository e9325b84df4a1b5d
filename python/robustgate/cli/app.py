"""What the commands share: the application, options, and the domains on a command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from robustgate.lm import Corpus

app = typer.Typer(
    name="robustgate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
Domains = Annotated[
    list[str],
    typer.Option("--domain", metavar="NAME=FILE...", help="Domain and its documents."),
]


@app.callback(invoke_without_command=True)
def robustgate(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Combine frozen expert language models into one that is good on every mixture of domains."""
    if version:
        from robustgate import __version__

        typer.echo(__version__)
        raise typer.Exit


def parse_domains(pairs: list[str]) -> list[Corpus]:
    """Read ``NAME=FILE`` pairs.

    Raises:
        ValueError: A pair has no ``=``, or a name comes twice.
    """
    from robustgate.lm import read_corpus

    corpora: dict[str, Corpus] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise ValueError(f"--domain: expected NAME=FILE, got {pair!r}")
        if name in corpora:
            raise ValueError(f"--domain: {name!r} is given twice")
        corpora[name] = read_corpus(path, name)
    return list(corpora.values())
