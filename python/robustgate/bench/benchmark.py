"""What a benchmark is: an op, other ways to write it, its inputs, and the work it cannot avoid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

MODES = {
    "forward": "the value, no gradient",
    "frozen": "the value and the gate's gradient: experts are frozen",
    "backward": "the gradient of what is trained, its forward pass not timed",
    "forward_backward": "the value and the gradient of what is trained",
}
"""What is timed, by name."""

Argument = Tensor | list[Tensor]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement; 0 for a size that the op does not have.

    Attributes:
        rows: N, tokens.
        experts: K.
        vocab: V.
        hidden: H, width of the hidden states.
    """

    rows: int
    experts: int
    vocab: int = 0
    hidden: int = 0

    def letters(self) -> dict[str, int]:
        """Return the sizes by the letter that formulas and pages use."""
        return {"N": self.rows, "K": self.experts, "V": self.vocab, "H": self.hidden}


def count(formula: str, shape: Shape, itemsize: int) -> int:
    """Return the value of a formula such as ``"K N V e + 4 N V"``: a sum of products.

    Args:
        formula: numbers, the letters N K V H of :class:`Shape`, and e for bytes in an element.
        shape: sizes.
        itemsize: e.

    Example:
        >>> count("K N V e + 4 N V", Shape(rows=2, experts=3, vocab=10), itemsize=2)
        200
    """
    sizes = {**shape.letters(), "e": itemsize}
    return sum(
        prod(sizes[factor] if factor in sizes else int(factor) for factor in term.split())
        for term in formula.split("+")
    )


@dataclass(frozen=True)
class Peer:
    """The same loss in another package.

    Attributes:
        name: as tables show it.
        package: what to install.
        load: imports the package and returns the function.
        modes: in which modes the comparison is fair. A function that makes its gradients in the
            forward pass has none but ``forward_backward``.
        experts: the only K it has, or None.
        device: the only device type it runs on, or None.
        narrow: whether it is for inputs below float32 only.
    """

    name: str
    package: str
    load: Callable[[], Function]
    modes: tuple[str, ...]
    experts: int | None = None
    device: str | None = None
    narrow: bool = False

    def refusal(self, shape: Shape, dtype: torch.dtype, mode: str, device: torch.device) -> str:
        """Return why it cannot take part in a measurement; empty if it can."""
        if self.device not in (None, device.type):
            return f"runs on {self.device} only"
        if self.experts not in (None, shape.experts):
            return f"has K = {self.experts} only"
        if self.narrow and dtype.itemsize >= 4:
            return "is for narrower inputs"
        if mode not in self.modes:
            return f"compared in {', '.join(self.modes)} only"
        return ""


@dataclass(frozen=True)
class Benchmark:
    """One op: how to call it, how else to write it, and the work that no form of it can avoid.

    Every function takes the tensors that ``inputs`` returns and gives the op's value.

    Attributes:
        op: name of the public function.
        ours: calls it.
        formulations: plain torch by name, float32 or better inside, differentiable.
        compiled: names of the formulations that are also measured under ``torch.compile``.
        truth: name of the formulation that is the truth when it runs in float64.
        inputs: (shape, dtype, generator) -> initialised tensors on the CPU.
        by_row: for each of them, whether its tensors have one entry per row.
        trained: picks from them what ``backward`` and ``forward_backward`` differentiate.
        gate: the same for ``frozen``; None if the op has no gate.
        shape: sizes that are measured by default. A letter that is in no formula is no size of
            the op: it has a fixed value.
        bytes: mode -> formula of the bytes that have to be read and written. Values that are a few
            per row are left out. The keys are the op's modes.
        flops: mode -> formula of the arithmetic that no form avoids; empty for an op whose limit
            is the memory.
        peers: the same loss in other packages.
        dtypes: of the logits, hidden states or log-probs.
        block: at most so many rows are drawn, and repeated until there are N.
    """

    op: str
    ours: Function
    formulations: Mapping[str, Function]
    compiled: tuple[str, ...]
    truth: str
    inputs: Callable[[Shape, torch.dtype, torch.Generator], tuple[Argument, ...]]
    by_row: tuple[bool, ...]
    trained: Callable[..., Sequence[Tensor]]
    gate: Callable[..., Sequence[Tensor]] | None
    shape: Shape
    bytes: Mapping[str, str]
    flops: Mapping[str, str] = field(default_factory=dict)
    peers: tuple[Peer, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    block: int = 16

    @property
    def modes(self) -> tuple[str, ...]:
        """The op's modes."""
        return tuple(self.bytes)

    def has(self, letter: str) -> bool:
        """Return whether a letter is a size of the op."""
        formulas = " ".join([*self.bytes.values(), *self.flops.values()])
        return letter in formulas.split()

    def variants(self, compiler: Callable[[Function], Function] | None) -> dict[str, Function]:
        """Return ours, every formulation, and the compiled ones, by the name tables show.

        Args:
            compiler: makes a compiled function, which compiles on its first call; None leaves the
                compiled ones out.
        """
        eager = {f"eager {name}": function for name, function in self.formulations.items()}
        compiled = (
            {f"compiled {name}": compiler(self.formulations[name]) for name in self.compiled}
            if compiler
            else {}
        )
        return {"robustgate": self.ours, **eager, **compiled}
