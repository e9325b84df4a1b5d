"""Token log-probabilities of encoded documents under one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robustgate.lm.progress import ProgressBar
from robustgate.lm.tokenizer import Tokens
from robustgate.lm.windows import plan_batches, plan_windows
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


@torch.inference_mode()
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

    Windows of similar length share a batch, padded on the right: a causal model never looks
    there, so no mask is needed. The output layer runs on the scored positions alone.

    Args:
        model: a causal language model in evaluation mode, on any device.
        tokens: encoded documents.
        vocab_size: V; further logit columns are padding.
        window: how many tokens the model reads at once.

    Other:
        stride: by how much the window moves along a longer document; half of it if left out.
        batch_tokens: the most inputs in one batch, padding included.
        bar: advanced by the tokens scored.

    Returns:
        float32 [gold tokens] on the CPU, document after document (``tokens.gold_offsets``).

    Source:
        https://huggingface.co/docs/transformers/perplexity (strided windows)
    """
    gold_offsets = tokens.gold_offsets
    windows = plan_windows(
        gold_offsets.diff(), window, max(1, window // 2) if stride is None else stride
    )
    out = torch.empty(int(gold_offsets[-1]), dtype=torch.float32)
    for batch in plan_batches(windows[:, 2] - windows[:, 1], batch_tokens):
        document, start, end, scored = windows[batch].unbind(1)  # [B] each
        width = int((end - start).max())
        position = start.unsqueeze(1) + torch.arange(width)  # [B, width]
        kept = (position >= scored.unsqueeze(1)) & (position < end.unsqueeze(1))
        place = tokens.offsets[document].unsqueeze(1) + position.minimum(end.unsqueeze(1) - 1)
        logits = _logits(model, tokens.ids[place], kept)  # [n, >= V]
        target = tokens.ids[place[kept] + 1].to(logits.device)
        value = expert_log_prob([logits], target, vocab_size=vocab_size)  # [n, 1]
        out[(gold_offsets[document].unsqueeze(1) + position)[kept]] = value[:, 0].float().cpu()
        if bar is not None:
            bar.advance(len(target))
    return out


def _logits(
    model: PreTrainedModel,
    inputs: Tensor,  # [B, T]
    kept: Tensor,  # [B, T] bool
) -> Tensor:  # [n, >= V]
    """Return the logits at the kept positions, computing no others.

    The selection happens where the output layer receives its input, so that whatever the model
    does to the logits afterwards (soft-capping, scaling) still applies.
    """
    rows = kept.to(model.device)

    def select(layer: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0][rows], *arguments[1:])

    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hook = head.register_forward_pre_hook(select)
    try:
        logits: Tensor = model(input_ids=inputs.to(model.device), use_cache=False).logits
    finally:
        hook.remove()
    return logits
