"""What the experts answer to new tokens, and the tokens' log-probabilities."""
# Ignored no-untyped-call: transformers leaves these functions and class hooks unannotated.

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robustgate.lm.causal.cache import GateLayer, ModularCache
from robustgate.lm.causal.checks import reads_on
from robustgate.ops.expert_log_prob import expert_log_prob

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IGNORED = -100


@dataclass(frozen=True, eq=False)
class Reading:
    """What the experts in use answered to the last r tokens.

    Attributes:
        active: their numbers.
        logits: of each of them, ``[B, r, >= V]``, all of one dtype.
        hidden: what their output layers read, ``[B, r, H_k]``; None if nobody asked.
        real: which of the r tokens are no padding, bool ``[B, r]``.
    """

    active: tuple[int, ...]
    logits: list[Tensor]
    hidden: list[Tensor] | None
    real: Tensor


class Reader:
    """Lets the experts of a modular model read the tokens of a cache.

    Args:
        experts: K causal language models.
        names: of the experts.
        hidden: whether to return what their output layers read.

    Raises:
        ValueError: an expert cannot go on from a cache.
    """

    def __init__(
        self, experts: Sequence[PreTrainedModel], names: Sequence[str], *, hidden: bool
    ) -> None:
        """Look at what the experts' ``forward`` accepts."""
        self.experts, self.hidden = list(experts), hidden
        for name, expert in zip(names, experts, strict=True):
            reads_on(name, expert)
        self.columns = sum(expert.config.get_text_config().vocab_size for expert in experts)
        self._accepts = [set(inspect.signature(expert.forward).parameters) for expert in experts]

    @torch.no_grad()
    def __call__(self, cache: ModularCache, end: int, *, store: bool, padded: bool) -> Reading:
        """Let the experts in use read on to token ``end - 1``.

        Args:
            cache: knows the tokens.
            end: how many of them will have been read.
            store: keep the experts' keys and values.
            padded: whether there is padding among the tokens.
        """
        layer = cache.gate
        cache.rewind()
        active = list(range(len(self.experts)))
        if layer.kept is not None:
            active = layer.kept.any(dim=0).nonzero().flatten().tolist()
        start = cache.seen[active[0]]
        mask = layer.history["real"][:, :end].long() if padded else None
        logits: list[Tensor] = []
        hidden: list[Tensor] = []
        for number in active:
            expert = self.experts[number]
            given = {
                "attention_mask": mask,
                "position_ids": layer.history["positions"][:, start:end],
                "past_key_values": cache.experts[number] if store else None,
                "use_cache": store,
            }
            given = {name: given[name] for name in given if name in self._accepts[number]}
            with _last_hidden(expert, hidden) if self.hidden else nullcontext():
                logits.append(expert(input_ids=layer.history["ids"][:, start:end], **given).logits)
            cache.seen[number] = end
        real = layer.history["real"][:, start:end]
        return Reading(tuple(active), one_dtype(logits), hidden if self.hidden else None, real)


def score(
    layer: GateLayer,
    reading: Reading,
    ids: Tensor,  # [B, m]
    experts: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:  # [B, m, K], bool [B, m]
    """Return the log-probabilities of the last m tokens that were read, and which have one.

    A token is scored by the logits after the last real token before it, wherever padding lies;
    the first real token of a document is not scored.

    Args:
        layer: of the cache; has the logits before the reading, unless its first token is re-read.
        reading: of r tokens, r >= m, the last m of which are new.
        ids: the new tokens.
        experts: K.
        vocab_size: V.

    Returns:
        float64, 0 for tokens that are not scored and for experts that were not run; and which
        tokens are scored.
    """
    batch, new = ids.shape
    read = reading.real.shape[1]
    before = _last_real(reading.real)[:, :-1]  # [B, r]; 0: none among these
    before = before[:, read - new :]  # [B, m]
    real = reading.real[:, read - new :]
    past = layer.history["log_probs"].shape[1] if "log_probs" in layer.history else 0
    started = layer.history["real"][:, :past].any(dim=1, keepdim=True)  # [B, 1]
    scored = real & ((before > 0) | started)

    # row i of the targets is the token that comes after row i - 1 of the reading; row 0 belongs
    # to the logits in the cache, row r + 1 to no logits
    targets = ids.new_full((batch, read + 2), _IGNORED)
    targets.scatter_(1, torch.where(scored, before, read + 1), ids)
    values = expert_log_prob(reading.logits, targets[:, 1 : read + 1], vocab_size=vocab_size)
    if layer.rows is None:
        first = torch.zeros_like(values[:, :1])
    else:
        rows = one_dtype([layer.rows[expert] for expert in reading.active])
        first = expert_log_prob(rows, targets[:, 0], vocab_size=vocab_size).unsqueeze(1)
    values = torch.cat([first, values], dim=1).to(torch.float64)  # [B, 1 + r, active]
    own = values.gather(1, before.unsqueeze(-1).expand(-1, -1, len(reading.active)))
    log_probs = own.new_zeros(batch, new, experts)
    log_probs[..., list(reading.active)] = own.masked_fill(~scored.unsqueeze(-1), 0.0)
    return log_probs, scored


def remember(layer: GateLayer, reading: Reading, experts: int) -> None:
    """Keep the logits after the last real token of each document."""
    last = _last_real(reading.real)[:, -1]  # [B]; 0: none
    everywhere = bool(reading.real[:, -1].all())
    document = torch.arange(len(last), device=last.device)
    rows = layer.rows or [reading.logits[0].new_empty(0)] * experts
    for place, expert in enumerate(reading.active):
        logits = reading.logits[place]
        newest = logits[:, -1] if everywhere else logits[document, (last - 1).clamp(min=0)]
        if layer.rows is not None and not everywhere:
            newest = torch.where((last > 0).unsqueeze(1), newest, rows[expert])
        rows[expert] = newest.clone() if everywhere else newest
    layer.rows = rows


def _last_real(real: Tensor) -> Tensor:  # bool [B, r] -> [B, r + 1]
    """Return 1 + the place of the last real token before each place and before the end, or 0."""
    places = torch.arange(1, real.shape[1] + 1, device=real.device)
    last = torch.where(real, places, 0).cummax(dim=1).values
    return torch.nn.functional.pad(last, (1, 0))


def one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors as they are, or in float32 if their dtypes differ."""
    if len({tensor.dtype for tensor in tensors}) == 1:
        return list(tensors)
    return [tensor.float() for tensor in tensors]


@contextmanager
def _last_hidden(expert: PreTrainedModel, into: list[Tensor]) -> Iterator[None]:
    """Append what the output layer of an expert reads."""
    head: nn.Module = expert.get_output_embeddings()  # type: ignore[no-untyped-call]
    hook = head.register_forward_pre_hook(lambda _, arguments: into.append(arguments[0]))
    try:
        yield
    finally:
        hook.remove()
