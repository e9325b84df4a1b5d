"""Refusals of what K experts and a gate cannot do, and the arguments that remain."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robustgate.lm.causal.cache import ModularCache
from robustgate.lm.causal.gate import BayesTrack, Track
from robustgate.lm.causal.tokens import NewTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def token_ids(
    ids: Tensor | None,  # [B, T]
    inputs_embeds: Tensor | None,
    others: dict[str, Any],
) -> Tensor:  # [B, T]
    """Return the token ids of a call.

    Raises:
        ValueError: there are none, embeddings are given, or common attentions or hidden states are
            asked for.
    """
    no_embeddings(inputs_embeds)
    if ids is None or ids.dim() != 2 or ids.shape[1] == 0:
        got = None if ids is None else tuple(ids.shape)
        raise ValueError(f"input_ids: expected shape [B, T] with T >= 1, got {got}")
    for name in ("output_attentions", "output_hidden_states"):
        if others.get(name):
            raise ValueError(f"{name}: K experts have none in common; ask one of model.experts")
    return ids


def no_embeddings(inputs_embeds: Tensor | None) -> None:
    """Refuse ``inputs_embeds``.

    Raises:
        ValueError: they are given.
    """
    if inputs_embeds is not None:
        raise ValueError(
            "inputs_embeds: every expert has its own embeddings; pass input_ids instead"
        )


def cache(given: Any) -> ModularCache | None:
    """Return the cache of a call, or None if there is none.

    Raises:
        ValueError: it is the cache of another kind of model.
    """
    if given is not None and not isinstance(given, ModularCache):
        raise ValueError(
            "past_key_values: expected a ModularCache, as make_cache() returns, got "
            f"{type(given).__name__}; static, quantized and offloaded caches are not supported"
        )
    return given


def cache_implementation(name: str | None) -> None:
    """Refuse caches that cannot hold a gate.

    Raises:
        ValueError: naming the implementation.
    """
    if name not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"cache_implementation: {name!r} is not supported: the experts' caches and the gate's "
            "state grow together, which static, quantized, offloaded and paged caches cannot do; "
            "leave it out"
        )


def context(limit: int, past: int, new: NewTokens) -> None:
    """Refuse documents that are longer than what every expert reads.

    Raises:
        ValueError: a real token lies at or behind position ``limit``.
    """
    if past + new.ids.shape[1] > limit and int(new.positions.max()) >= limit:
        raise ValueError(
            f"input_ids: {int(new.positions.max()) + 1} tokens, but not every expert reads more "
            f"than {limit}; shorten the prompt or generate fewer tokens"
        )


def reads_on(name: str, expert: PreTrainedModel) -> None:
    """Refuse an expert that cannot go on from a cache as the others do.

    Raises:
        ValueError: it keeps no keys and values, or a state that cannot be cut off behind a token;
            or it counts positions in a way of its own.
    """
    if "past_key_values" not in inspect.signature(expert.forward).parameters:
        raise ValueError(f"expert {name!r}: keeps no past_key_values, so it cannot generate")
    # transformers' own answers to whether a cache can be cropped, and is one of the usual layers
    usual: Callable[[], bool] = getattr(expert, "_supports_default_dynamic_cache")  # noqa: B009
    if expert._is_stateful or not usual():
        raise ValueError(
            f"expert {name!r}: {type(expert).__name__} keeps a recurrent state, which cannot be "
            "cropped and read on like keys and values, so it cannot generate with the others"
        )
    if any(hasattr(part, "create_position_ids_from_input_ids") for part in expert.modules()):
        raise ValueError(
            f"expert {name!r}: {type(expert).__name__} counts positions from behind its padding "
            "token (the RoBERTa family), not from 0 as the other experts do"
        )


def same_count(cache: ModularCache, count: int | None) -> None:
    """Refuse another number of experts than that of the cache that is given.

    Raises:
        ValueError: naming both.
    """
    if count is not None and count != cache.gate.top_k_experts:
        raise ValueError(
            f"top_k_experts: {count}, but the cache keeps {cache.gate.top_k_experts or 'all'}; "
            f"make it with model.make_cache(top_k_experts={count})"
        )


def use_cache(cache: ModularCache | None, wanted: bool | None) -> None:
    """Refuse ``generate`` with a cache that it is told not to use.

    Raises:
        ValueError: a cache and ``use_cache=False``.
    """
    if cache is not None and wanted is False:
        kept = cache.gate.top_k_experts
        why = "past_key_values: given" if kept is None else "top_k_experts: needs a cache"
        raise ValueError(f"{why}, but use_cache is False; leave out use_cache=False")


def kept_experts(count: int, experts: int, track: Track) -> None:
    """Refuse to keep some experts after a prompt where that has no meaning.

    Raises:
        ValueError: the number is out of range, or the gate is no Bayes gate.
    """
    if not 1 <= count <= experts:
        raise ValueError(f"top_k_experts: expected 1 to {experts}, got {count}")
    if not isinstance(track, BayesTrack):
        raise ValueError(
            "top_k_experts: needs a Bayes gate without a window; a learned gate reads all experts "
            "before every token"
        )


def wanted_rows(
    logits_to_keep: int | Tensor,
    tokens: int,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:  # [rows], [wanted]
    """Return the numbers of the rows to compute, rising, and which of these to return.

    The second is None where all are returned in this order.
    """
    rows = torch.arange(tokens, device=device)
    if isinstance(logits_to_keep, int):
        return rows[-logits_to_keep:] if logits_to_keep else rows, None
    kept, order = rows[logits_to_keep.to(device)].unique(return_inverse=True)
    return kept, order
