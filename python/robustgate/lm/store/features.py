"""Features that a gate may read: what the experts' next-token distributions look like.

The same functions serve decoding, where all experts are in memory, and scoring, where they are
loaded one by one and the per-expert parts wait in the store until a gate asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from robustgate.ops.jsd import jsd as jsd_op

_NUMBERS = 1 << 22  # logits in one pass over the vocabulary: bounds the float32 copies
_SEED = 20_260_217  # of the random projections


@dataclass(frozen=True)
class FeatureSpec:
    """Which features a gate reads before each token, in this order.

    Attributes:
        entropy: Entropy of each expert's next-token distribution, in nats; K numbers.
        top: Log-probability of each expert's own most likely token; K numbers.
        agreement: For each pair of experts, (0, 1), (0, 2), ..., 1 where their most likely tokens
            are the same and 0 elsewhere; K (K - 1) / 2 numbers.
        jsd: Jensen-Shannon divergence of all experts with equal weights, in nats; 1 number.
        hidden: Size of a fixed random projection of each expert's last hidden state, the input of
            its output layer; K times as many numbers, expert after expert.

    Example:
        >>> FeatureSpec(entropy=True, agreement=True).width(experts=3)
        6
        >>> FeatureSpec.parse("entropy,hidden=8")
        FeatureSpec(entropy=True, top=False, agreement=False, jsd=False, hidden=8)
    """

    entropy: bool = False
    top: bool = False
    agreement: bool = False
    jsd: bool = False
    hidden: int = 0

    def __post_init__(self) -> None:
        """Refuse a negative size."""
        if self.hidden < 0:
            raise ValueError(f"hidden: expected at least 0, got {self.hidden}")

    @classmethod
    def parse(cls, text: str) -> FeatureSpec:
        """Read ``"entropy,top,agreement,jsd,hidden=16"``; ``"none"`` or an empty text is none.

        Raises:
            ValueError: An unknown feature, or ``hidden`` without a number.
        """
        given: dict[str, Any] = {}
        for item in (part.strip() for part in text.split(",")):
            name, _, size = item.partition("=")
            if name == "hidden" and size.isdecimal():
                given[name] = int(size)
            elif item in ("entropy", "top", "agreement", "jsd"):
                given[name] = True
            elif item not in ("", "none"):
                raise ValueError(
                    "features: expected some of entropy,top,agreement,jsd,hidden=SIZE, "
                    f"got {item!r}"
                )
        return cls(**given)

    def width(self, experts: int) -> int:
        """Return F, the number of features of a token.

        Args:
            experts: K.

        Returns:
            F; 0 if nothing is asked for.
        """
        pairs = experts * (experts - 1) // 2
        own = experts * (self.entropy + self.top + self.hidden)
        return own + pairs * self.agreement + self.jsd

    @property
    def kinds(self) -> tuple[str, ...]:
        """What one expert alone contributes: names of its columns."""
        wanted = {
            "entropy": self.entropy,
            "top": self.top,
            "argmax": self.agreement,
            f"hidden-{self.hidden}": self.hidden > 0,
        }
        return tuple(kind for kind, asked in wanted.items() if asked)

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FeatureSpec:
        """Return what ``to_json`` wrote.

        Raises:
            ValueError: An attribute that this release does not know.
        """
        unknown = sorted(set(content) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"features: unknown to this release: {', '.join(unknown)}")
        return cls(**content)


def context_features(
    spec: FeatureSpec,
    logits: Sequence[Tensor],  # K of [..., >= V]
    hidden: Sequence[Tensor] | None = None,  # K of [..., H_k]
    *,
    vocab_size: int,
) -> Tensor:  # [..., F]
    """Return what a gate knows before the token that the logits predict.

    Args:
        spec: Which features.
        logits: Of each expert, ``[..., >= V]``, any floating dtype.
        hidden: Each expert's input of its output layer, ``[..., H_k]``; needed for
            ``spec.hidden`` alone.
        vocab_size: V; further logit columns are padding.

    Returns:
        float32 ``[..., F]``, ``F = spec.width(K)``, without gradient.

    Raises:
        ValueError: No logits, or hidden states that are missing or not one for each expert.

    Example:
        >>> logits = [torch.zeros(2, 4), torch.zeros(2, 4)]
        >>> context_features(FeatureSpec(entropy=True, jsd=True), logits, vocab_size=4)
        tensor([[1.3863, 1.3863, 0.0000],
                [1.3863, 1.3863, 0.0000]])
    """
    if not logits:
        raise ValueError("logits: expected those of at least one expert, got none")
    if spec.hidden and (hidden is None or len(hidden) != len(logits)):
        got = "none" if hidden is None else len(hidden)
        raise ValueError(f"hidden: expected one for each of {len(logits)} experts, got {got}")
    columns = [
        expert_columns(
            spec, own, hidden[k] if spec.hidden and hidden is not None else None, vocab_size
        )
        for k, own in enumerate(logits)
    ]
    together = uniform_jsd(logits, vocab_size) if spec.jsd else None
    return assemble(spec, columns, together, logits[0].shape[:-1], logits[0].device)


@torch.no_grad()
def expert_columns(
    spec: FeatureSpec,
    logits: Tensor,  # [..., >= V]
    hidden: Tensor | None,  # [..., H]
    vocab_size: int,
) -> dict[str, Tensor]:  # [...], or [..., h]
    """Return what one expert contributes, under the names in ``spec.kinds``.

    Args:
        spec: Which features.
        logits: ``[..., >= V]``.
        hidden: Input of the output layer, ``[..., H]``; needed for ``spec.hidden`` alone.
        vocab_size: V.

    Returns:
        ``entropy`` and ``top`` float32 ``[...]``, ``argmax`` int64 ``[...]``, ``hidden-<h>``
        float32 ``[..., h]``.
    """
    columns: dict[str, Tensor] = {}
    if spec.entropy or spec.top or spec.agreement:
        rows = logits[..., :vocab_size].reshape(-1, vocab_size)  # [N, V]
        step = max(1, _NUMBERS // vocab_size)
        parts = [_row_statistics(part.float(), spec.entropy) for part in rows.split(step)]
        empty = (rows.new_empty(0).float(), rows.new_empty(0).float(), rows.new_empty(0).long())
        entropy, top, argmax = (
            torch.cat(part).view(logits.shape[:-1]) for part in zip(empty, *parts, strict=True)
        )
        values = {"entropy": entropy, "top": top, "argmax": argmax}
        columns = {kind: values[kind] for kind in spec.kinds if kind in values}
    if spec.hidden and hidden is not None:
        projection = _projection(hidden.shape[-1], spec.hidden, hidden.device)
        columns[f"hidden-{spec.hidden}"] = hidden.float() @ projection
    return columns


@torch.no_grad()
def uniform_jsd(
    logits: Sequence[Tensor],  # K of [..., >= V]
    vocab_size: int,
) -> Tensor:  # [...]
    """Return the Jensen-Shannon divergence of all experts with equal weights, float32 ``[...]``."""
    common = len({own.dtype for own in logits}) == 1
    same = list(logits) if common else [own.float() for own in logits]
    return jsd_op(same, reduction="none", vocab_size=vocab_size).float()


def assemble(
    spec: FeatureSpec,
    columns: Sequence[Mapping[str, Tensor]],  # K of [...] or [..., h]
    together: Tensor | None,  # [...]
    shape: torch.Size | Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:  # [..., F]
    """Put the experts' columns into the order of ``FeatureSpec``.

    Args:
        spec: Which features.
        columns: Of each expert, what ``expert_columns`` returned.
        together: ``uniform_jsd``; needed for ``spec.jsd`` alone.
        shape: ``[...]``, the shape of the tokens.
        device: Where the columns are.

    Returns:
        float32 ``[..., F]``.
    """
    features = torch.empty(*shape, spec.width(len(columns)), dtype=torch.float32, device=device)
    parts = [own[kind] for kind in ("entropy", "top") if getattr(spec, kind) for own in columns]
    if spec.agreement:
        pairs = combinations([own["argmax"] for own in columns], 2)
        parts += [one == other for one, other in pairs]
    if spec.jsd and together is not None:
        parts.append(together)
    if spec.hidden:
        for own in columns:
            parts += own[f"hidden-{spec.hidden}"].unbind(-1)
    for column, part in enumerate(parts):
        features[..., column] = part
    return features


def _row_statistics(
    logits: Tensor,  # [n, V]
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [n] each
    """Return entropy (zeros if not asked for), largest log-probability and its token."""
    largest, argmax = logits.max(dim=-1)
    top = largest - logits.logsumexp(dim=-1)
    if not entropy:
        return torch.zeros_like(top), top, argmax
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1), top, argmax


@lru_cache(maxsize=32)
def _projection(width: int, size: int, device: torch.device) -> Tensor:  # [H, h]
    """Return the random projection that every expert of this width shares.

    Entries are normal with variance 1 / H, so that a hidden state of unit scale keeps it. It
    depends on the sizes alone: neither an expert's name nor its place enters.
    """
    generator = torch.Generator().manual_seed(_SEED)
    entries: Tensor = torch.randn(width, size, generator=generator) / width**0.5
    return entries.to(device)
