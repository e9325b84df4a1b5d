"""The cache of a modular model: those of its experts and what the gate knows of the document."""
# Ignored no-untyped-call: transformers leaves these functions and class hooks unannotated.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


class GateLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What the gate keeps of each token, and the experts' last logits.

    Attributes:
        history: tensors ``[B, n, ...]`` with one entry for each of the n tokens so far:
            ``ids`` int64 and ``positions`` int64; ``real`` bool, false for padding;
            ``scored`` bool, true for real tokens but the first; ``log_probs`` float64
            ``[B, n, K]``, ``log pi_k`` of the token, 0 where it is not scored; ``log_weights``
            float64 ``[B, n, K]``, in force after the token; and the state of the gate.
        rows: the logits after the last real token of each document, K tensors ``[B, V_k]``; None
            before the first token and after a ``crop``.
        top_k_experts: how many experts go on after the prompt; None for all.
        prompt_length: after how many tokens they are chosen.
        kept: the chosen experts, bool ``[B, K]``; None while all are in use.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, top_k_experts: int | None = None, prompt_length: int = 0) -> None:
        """Start with no token."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.history: dict[str, Tensor] = {}
        self.rows: list[Tensor] | None = None
        self.top_k_experts, self.prompt_length = top_k_experts, prompt_length
        self.kept: Tensor | None = None

    def expect_prompt(self, length: int) -> None:
        """Choose experts after ``length`` tokens, if any are to be chosen and none are yet."""
        if self.kept is None:
            self.prompt_length = length

    def last(self, name: str) -> Tensor | None:  # [B, ...]
        """Return the newest entry of a history, or None if there is none."""
        values = self.history.get(name)
        return None if values is None or values.shape[1] == 0 else values[:, -1]

    def append(self, **entries: Tensor) -> None:
        """Lengthen histories by ``[B, m, ...]`` each."""
        for name, new in entries.items():
            old = self.history.get(name)
            self.history[name] = new if old is None else torch.cat([old, new], dim=1)

    def get_seq_length(self) -> int:
        """Return n, the number of tokens so far."""
        return self.history["ids"].shape[1] if "ids" in self.history else 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of an attention mask over all tokens."""
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer holds no keys."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Refuse: no attention reads this layer."""
        raise TypeError("update: the gate's layer holds no keys and values")

    def offload(self) -> None:
        """Stay: a modular cache is never offloaded."""

    def prefetch(self) -> None:
        """Stay: a modular cache is never offloaded."""

    def reset(self) -> None:
        """Forget all tokens."""
        self.history, self.rows, self.kept = {}, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; experts dropped after them come back."""
        if tokens_to_remove == 0:
            return
        length = max(0, self.get_seq_length() + tokens_to_remove)
        self.history = {name: values[:, :length] for name, values in self.history.items()}
        self.rows = None
        if length < self.prompt_length:
            self.kept = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put other documents' states in the places of the batch."""
        self._each(lambda values: values.index_select(0, beam_idx.to(values.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every document."""
        self._each(lambda values: values.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some documents of the batch."""
        self._each(lambda values: values[indices])

    def _each(self, change: Any) -> None:
        self.history = {name: change(values) for name, values in self.history.items()}
        self.rows = None if self.rows is None else [change(row) for row in self.rows]
        self.kept = None if self.kept is None else change(self.kept)


class _WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A sliding window that may read several times while it keeps its past for a ``crop``.

    In transformers 5.17 the layer then returns more keys than its attention mask has columns.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new keys and values, and return those within the window of a new token."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[:, :, -visible:], values[:, :, -visible:]


def expert_cache(config: PreTrainedConfig) -> Cache:
    """Return an empty cache for one expert.

    Args:
        config: of the expert.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        _WindowLayer(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    return cache


class ModularCache(Cache):
    """One cache for K experts and a gate: its layers are the gate's and all the experts'.

    Whatever generation does to a cache, reordering beams, cropping rejected drafts, repeating
    prompts, reaches every expert and the gate alike. After a ``crop`` the logits behind the new
    last token are gone, so the experts are cropped by one token more and read it again.

    Args:
        experts: the experts' own caches.
        gate: the gate's layer.

    Attributes:
        seen: how many tokens each expert has read.
    """

    def __init__(self, experts: Sequence[Cache], gate: GateLayer) -> None:
        """List all layers."""
        super().__init__(layers=[gate, *(layer for cache in experts for layer in cache.layers)])
        self.experts = list(experts)
        self.gate = gate
        self.seen = [0] * len(self.experts)
        self._known: int | None = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Experts are cropped before they read again, once for all crops since: a sliding window
        forgets what is outside it at every crop. Like any cache of transformers it can be cropped
        behind its last tokens only after ``activate_past_recording``.

        Args:
            tokens_to_remove: minus their number; 0 lets sliding windows drop what is outside.

        Raises:
            ValueError: a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected at most 0, got {tokens_to_remove}")
        if tokens_to_remove < 0:
            length = max(0, self.gate.get_seq_length() + tokens_to_remove)
            self._known = self._last_common(length)
            self.gate.crop(tokens_to_remove)
        elif self._known is None:
            self._crop_experts(max(self.seen))

    def rewind(self) -> None:
        """Crop the experts to what is still true, before they read on."""
        if self._known is not None:
            self._crop_experts(self._known)
            self._known = None

    def _crop_experts(self, known: int) -> None:
        for expert, cache in enumerate(self.experts):
            surplus = max(0, self.seen[expert] - known)
            if self.seen[expert]:
                cache.crop(-surplus)
            self.seen[expert] -= surplus

    def _last_common(self, length: int) -> int:
        """Return up to where no document has its last real token among the first ``length``."""
        if length == 0:
            return 0
        real = self.gate.history["real"][:, :length]
        places = torch.where(real, torch.arange(length, device=real.device), -1).amax(dim=1)  # [B]
        return int(torch.where(places < 0, length - 1, places).min())

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[no-untyped-call]
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # transformers 5.17 leaves zeros of the old length
                layer.keys, layer.values, layer.is_initialized = None, None, False
        self.seen, self._known = [0] * len(self.experts), None
