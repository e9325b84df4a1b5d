"""``generate``: text from a modular model."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustgate.cli.app import Json, app
from robustgate.console import Answer, Command

if TYPE_CHECKING:
    from robustgate.lm.serve import Generation, NewToken

COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red", "bright_black", "white")


class Streaming(Command):
    """A command that prints while it works; the command finds the output in ``ctx.meta``."""

    def invoke(self, ctx: Any) -> None:
        """Keep the standard output, which is turned away from libraries while they run."""
        ctx.meta["stdout"] = sys.stdout
        super().invoke(ctx)


@app.command(cls=Streaming)
def generate(
    ctx: typer.Context,
    model: Annotated[Path, typer.Option(help="Modular model, as fit or save_pretrained wrote it.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.", min=1)] = 100,
    greedy: Annotated[
        bool | None,
        typer.Option(
            "--greedy/--sample",
            help="Likeliest token each time, or drawn; drawn if an option asks for it.",
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the mixture.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of the mixture.")] = None,
    top_k_experts: Annotated[
        int | None, typer.Option(help="Experts that go on after the prompt; default: all.", min=1)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws.", min=0)] = None,
    show_gate: Annotated[
        bool, typer.Option("--show-gate", help="Show which expert each token came from.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None,
    as_json: Json = False,
) -> Answer:
    """Continue a prompt with the mixture of all experts, token by token."""
    import torch

    from robustgate.lm.files import require

    require("transformers")
    from robustgate.lm.serve import complete, open_model

    drawn = greedy is False or (greedy is None and {temperature, top_p, seed} != {None})
    if greedy and {temperature, top_p} != {None}:
        raise ValueError("--greedy: --temperature and --top-p are for --sample")
    if drawn and seed is not None:
        torch.manual_seed(seed)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    opened, tokenizer = open_model(model, device=place)
    names = opened.config.names
    console = Console(file=ctx.meta["stdout"], highlight=False)
    result = complete(
        opened,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=None if not drawn else 1.0 if temperature is None else temperature,
        top_p=top_p,
        top_k_experts=top_k_experts,
        on_token=None if as_json else printer(console, names, prompt, coloured=show_gate),
    )
    data = {**asdict(result), "experts": list(names)}
    return Answer(data, ("", gate_table(result, names)) if show_gate else ("",))


def printer(
    console: Console, names: tuple[str, ...], prompt: str, *, coloured: bool
) -> Callable[[NewToken], None]:
    """Return what prints a token, before the first one the prompt.

    In colour, a token has that of its expert. Without, the expert's name stands in brackets
    wherever it changes.
    """
    last: str | None = None

    def show(token: NewToken) -> None:
        nonlocal last
        if last is None:
            console.print(Text(prompt, style="dim"), end="", soft_wrap=True)
            last = ""
        if not coloured or not token.text:
            console.print(Text(token.text), end="", soft_wrap=True)
            return
        if not console.is_terminal and token.expert != last:
            console.print(Text(f"[{token.expert}]"), end="", soft_wrap=True)
        last = token.expert
        colour = COLOURS[names.index(token.expert) % len(COLOURS)]
        console.print(Text(token.text, style=colour), end="", soft_wrap=True)

    return show


def gate_table(result: Generation, names: tuple[str, ...]) -> Table:
    """Return the legend: how many tokens came from each expert, and its weight at the end."""
    counts = Counter(token.expert for token in result.tokens)
    table = Table("expert", "tokens", "last weight")
    for place, (name, weight) in enumerate(zip(names, result.weights, strict=True)):
        style = COLOURS[place % len(COLOURS)]
        table.add_row(name, str(counts[name]), f"{weight:.3f}", style=style)
    return table
