"""What models say about the tokens of encoded documents: log-probabilities and features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robustgate.lm.progress import ProgressBar
from robustgate.lm.store.features import FeatureSpec, expert_columns, uniform_jsd
from robustgate.lm.store.shards import LOG_PROBS
from robustgate.lm.store.windows import plan_batches, plan_windows
from robustgate.lm.tokenizer import Tokens
from robustgate.ops.expert_log_prob import expert_log_prob

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def check_causal(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose predictions depend on the future, such as an encoder with a head.

    Args:
        model: at least 5 tokens in its vocabulary.
        name: what to call it in the message.

    Raises:
        ValueError: a change of the last token moves the logits before it.
    """
    inputs = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=model.device)
    one, other = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()  # [3, V] each
    scale = float(one.nan_to_num(posinf=0.0, neginf=0.0).abs().max())
    rounding = 1e-4 if model.dtype == torch.float32 else 0.03
    if not torch.allclose(one, other, rtol=0.0, atol=rounding * scale, equal_nan=True):
        raise ValueError(
            f"expert {name!r} looks ahead: another last token changes its earlier predictions, so "
            "its log-probabilities mean nothing; use a causal (decoder) model"
        )


def token_log_probs(
    model: PreTrainedModel,
    tokens: Tokens,
    *,
    vocab_size: int,
    window: int,
    stride: int | None = None,
    batch_tokens: int = 4096,
    bar: ProgressBar | None = None,
) -> Tensor:  # [gold tokens]
    """Return ``log p(x_t | x_<t)`` of every token but the BOS of each document.

    Arguments as in ``read_documents``.

    Returns:
        float32 [gold tokens] on the CPU, document after document (``tokens.gold_offsets``).
    """
    columns, _ = read_documents(
        [model],
        tokens,
        FeatureSpec(),
        vocab_size=vocab_size,
        window=window,
        stride=max(1, window // 2) if stride is None else stride,
        batch_tokens=batch_tokens,
        bar=bar,
    )
    return columns[0][LOG_PROBS]


@torch.inference_mode()
def read_documents(
    models: Sequence[PreTrainedModel],
    tokens: Tokens,
    spec: FeatureSpec,
    *,
    vocab_size: int,
    window: int,
    stride: int,
    batch_tokens: int = 4096,
    bar: ProgressBar | None = None,
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:  # [gold tokens] or [gold tokens, h]
    """Return what models say about every token but the BOS of each document.

    Windows of similar length share a batch, padded on the right: a causal model never looks
    there, so no mask is needed. The output layer runs on the scored positions alone.

    Args:
        models: causal language models in evaluation mode, on any one device.
        tokens: encoded documents.
        spec: features wanted beside the log-probabilities.
        vocab_size: V; further logit columns are padding.
        window: how many tokens a model reads at once.
        stride: by how much the window moves along a longer document.

    Other:
        batch_tokens: the most inputs in one batch, padding included.
        bar: advanced by the tokens scored, once for each model.

    Returns:
        For each model its log-probabilities, under ``LOG_PROBS``, and its columns of features,
        under ``spec.kinds``; and what they say together: ``jsd`` if asked for. Tensors lie on the
        CPU, document after document (``tokens.gold_offsets``).

    Source:
        https://huggingface.co/docs/transformers/perplexity (strided windows)
    """
    gold_offsets = tokens.gold_offsets
    windows = plan_windows(gold_offsets.diff(), window, stride)
    own: list[dict[str, Tensor]] = [{} for _ in models]
    together: dict[str, Tensor] = {}
    for batch in plan_batches(windows[:, 2] - windows[:, 1], batch_tokens):
        document, start, end, scored = windows[batch].unbind(1)  # [B] each
        width = int((end - start).max())
        position = start.unsqueeze(1) + torch.arange(width)  # [B, width]
        kept = (position >= scored.unsqueeze(1)) & (position < end.unsqueeze(1))
        place = tokens.offsets[document].unsqueeze(1) + position.minimum(end.unsqueeze(1) - 1)
        rows = (gold_offsets[document].unsqueeze(1) + position)[kept]  # [n]
        inputs, target = tokens.ids[place], tokens.ids[place[kept] + 1]
        seen = []
        for model, columns in zip(models, own, strict=True):
            logits, hidden = _logits(model, inputs, kept)  # [n, >= V], [n, H]
            gold = expert_log_prob([logits], target.to(logits.device), vocab_size=vocab_size)
            values = {LOG_PROBS: gold[:, 0], **expert_columns(spec, logits, hidden, vocab_size)}
            _place(columns, values, rows, int(gold_offsets[-1]))
            if spec.jsd:
                seen.append(logits)
            if bar is not None:
                bar.advance(len(target))
        if spec.jsd:
            _place(together, {"jsd": uniform_jsd(seen, vocab_size)}, rows, int(gold_offsets[-1]))
    return own, together


def _place(
    columns: dict[str, Tensor],
    values: dict[str, Tensor],  # [n] or [n, h]
    rows: Tensor,  # [n]
    tokens: int,
) -> None:
    """Write the values of one batch where they belong: float32, or int32 for token numbers."""
    for kind, value in values.items():
        dtype = torch.float32 if value.is_floating_point() else torch.int32
        if kind not in columns:
            columns[kind] = torch.empty(tokens, *value.shape[1:], dtype=dtype)
        columns[kind][rows] = value.to("cpu", dtype)


def _logits(
    model: PreTrainedModel,
    inputs: Tensor,  # [B, T]
    kept: Tensor,  # [B, T] bool
) -> tuple[Tensor, Tensor]:  # [n, >= V], [n, H]
    """Return the logits at the kept positions, computing no others, and what they come from.

    The selection happens where the output layer receives its input, so that whatever the model
    does to the logits afterwards (soft-capping, scaling) still applies.
    """
    rows = kept.to(model.device)
    hidden: list[Tensor] = []

    def select(layer: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden.append(arguments[0][rows])
        return (hidden[-1], *arguments[1:])

    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hook = head.register_forward_pre_hook(select)
    try:
        logits: Tensor = model(input_ids=inputs.to(model.device), use_cache=False).logits
    finally:
        hook.remove()
    return logits, hidden[-1]
