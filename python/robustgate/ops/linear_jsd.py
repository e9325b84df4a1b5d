"""``linear_jsd``: the experts' JSD from hidden states and heads, without the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustgate.ops import checks, linear
from robustgate.ops.autograd import once_differentiable
from robustgate.ops.expert_log_prob import SETTINGS, fresh_gradients, per_expert, trainable
from robustgate.ops.jsd import weights_gradient
from robustgate.ops.library import define_composed
from robustgate.ops.linear_gradients import gradients


def _fake(
    hidden: Sequence[Tensor],
    lm_head: Sequence[Tensor],
    bias: Sequence[Tensor],
    weights: Tensor,
    target: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # [...], [..., K], [..., K]
    shape = (*hidden[0].shape[:-1], len(hidden))
    return (
        weights.new_empty(shape[:-1]),
        weights.new_empty(shape),
        weights.new_empty(shape, dtype=torch.float64),
    )


def _forward(
    hidden: Sequence[Tensor],
    lm_head: Sequence[Tensor],
    bias: Sequence[Tensor],
    weights: Tensor,
    target: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*hidden[0].shape[:-1], len(hidden))
    rows = linear.Rows.counted(target, hidden[0].shape[:-1].numel(), ignore_index)
    heads = linear.heads_of(hidden, lm_head, bias, vocab_size)
    w = _by_row(weights, rows)
    ignored = None if target is None else rows.pick(target.flatten())
    transform = (ignore_index, temperature, softcap)
    with linear.no_autocast(weights.device):
        whole = linear.plan(heads, rows.count, workspace, whole_rows=True)
        kl = weights.new_zeros(rows.count, len(hidden))
        lse = weights.new_zeros(rows.count, len(hidden), dtype=torch.float64)
        if whole.rows >= min(rows.count, _ENOUGH_ROWS):
            for block, tiles in linear.whole_rows(heads, rows, whole):
                _, kl[block], lse[block] = torch.ops.robustgate.jsd(
                    tiles, w[block], None, _part(ignored, block), vocab_size, *transform
                )
        else:
            # Whole rows of every expert do not fit: the products are made twice.
            first = torch.zeros(rows.count, dtype=torch.int64, device=weights.device)
            for k, head in enumerate(heads):
                lse[:, k] = linear.log_sum_exp(head, rows, first, workspace, *transform[1:])[1]
            tiling = linear.plan(heads, rows.count, workspace)
            for tile in linear.tiles(heads, rows, tiling):
                block, size = tile.rows, tile.columns.stop - tile.columns.start
                kl[block] += torch.ops.robustgate.jsd(
                    tile.logits, w[block], lse[block], _part(ignored, block), size, *transform
                )[1]
        value = torch.where(w == 0, 0.0, w * kl).sum(-1)
    if ignored is not None:
        nothing = (ignored == ignore_index).unsqueeze(-1)
        value, lse = value.masked_fill(nothing.squeeze(-1), 0.0), lse.masked_fill(nothing, 0.0)
    return (
        rows.spread(value).view(shape[:-1]),
        rows.spread(kl).view(shape),
        rows.spread(lse).view(shape),
    )


# Fewer rows than this at a time make a GEMM slow, and making it twice costs less.
_ENOUGH_ROWS = 64


def _by_row(weights: Tensor, rows: linear.Rows) -> Tensor:  # [count, K]
    """Return the weights of the rows that count."""
    if weights.dim() == 1:
        return weights.expand(rows.count, -1)
    return rows.pick(weights.reshape(-1, weights.shape[-1]))


def _part(target: Tensor | None, block: slice) -> Tensor | None:
    return None if target is None else target[block]


def _fake_backward(
    grad: Tensor,
    hidden: Sequence[Tensor],
    lm_head: Sequence[Tensor],
    bias: Sequence[Tensor],
    weights: Tensor,
    kl: Tensor,
    lse: Tensor,
    target: Tensor | None,
    needs_grad: Sequence[bool],
    *settings: Any,
) -> list[Tensor]:
    return fresh_gradients(trainable([*hidden, *lm_head, *bias], needs_grad))


def _backward(
    grad: Tensor,
    hidden: Sequence[Tensor],
    lm_head: Sequence[Tensor],
    bias: Sequence[Tensor],
    weights: Tensor,
    kl: Tensor,
    lse: Tensor,
    target: Tensor | None,
    needs_grad: Sequence[bool],
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    workspace: int,
) -> list[Tensor]:
    experts = len(hidden)
    rows = linear.Rows.counted(target, grad.numel(), ignore_index)
    w = _by_row(weights, rows)
    upstream = rows.pick(grad.flatten())
    kl, lse = rows.pick(kl.view(-1, experts)), rows.pick(lse.view(-1, experts))
    ignored = None if target is None else rows.pick(target.flatten())
    needs = linear.needs_of(needs_grad, experts)
    moving = [any(need) for need in needs]

    def tile_gradient(tile: linear.Tile) -> Sequence[Tensor | None]:
        block = tile.rows
        grads = torch.ops.robustgate.jsd_backward(
            upstream[block],
            tile.logits,
            w[block],
            kl[block],
            lse[block],
            _part(ignored, block),
            moving,
            tile.columns.stop - tile.columns.start,
            ignore_index,
            temperature,
            softcap,
        )
        return per_expert(grads, moving)

    with linear.no_autocast(grad.device):
        heads = linear.heads_of(hidden, lm_head, bias, vocab_size)
        return linear.collect(gradients(heads, rows, needs, workspace, tile_gradient))


_linear_jsd = define_composed(
    f"linear_jsd({linear.HEADS}, Tensor weights, Tensor? target, {SETTINGS}, int workspace) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
    _forward,
)
_linear_jsd_backward = define_composed(
    f"linear_jsd_backward(Tensor grad, {linear.HEADS}, Tensor weights, Tensor kl, Tensor lse, "
    f"Tensor? target, bool[] needs_grad, {SETTINGS}, int workspace) -> Tensor[]",
    _fake_backward,
    _backward,
)


class _LinearJSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        target: Tensor | None,
        experts: int,
        settings: tuple[Any, ...],
        *tensors: Tensor,
    ) -> Tensor:
        value: Tensor
        parts = linear.split(tensors, experts)
        value, kl, lse = _linear_jsd(*parts, weights, target, *settings)
        # The weights' gradient is the saved KL_k; one trainable expert needs every logit.
        kept = tensors if any(ctx.needs_input_grad[4:]) else ()
        ctx.save_for_backward(weights, target, kl, lse, *kept)
        ctx.experts, ctx.settings = experts, settings
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, target, kl, lse, *tensors = ctx.saved_tensors
        needs_weights, _, _, _, *needs = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(needs)
        if tensors:
            found = _linear_jsd_backward(
                grad.contiguous(),
                *linear.split(tensors, ctx.experts),
                weights,
                kl,
                lse,
                target,
                needs,
                *ctx.settings,
            )
            grads = per_expert(found, needs)
        grad_weights = weights_gradient(grad, kl, weights) if needs_weights else None
        return (grad_weights, None, None, None, *grads)


_apply: Callable[..., Tensor] = _LinearJSD.apply


def linear_jsd(
    hidden: Sequence[Tensor],  # K x [..., H_k]
    lm_head: Sequence[Tensor],  # K x [V, H_k]
    weights: Tensor | None = None,  # [..., K] or [K]
    *,
    bias: Sequence[Tensor] | None = None,  # K x [V]
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    target: Tensor | None = None,  # [...]
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    r"""Return the experts' Jensen-Shannon divergence from hidden states and language-model heads.

    .. math:: \sum_k w_k \, \mathrm{KL}(p_k \,\|\, m), \qquad m = \sum_k w_k p_k, \quad
              p_k = \mathrm{softmax}(z'_k), \quad z_k = W_k h_k + b_k, \quad
              z' = c \tanh(z / c) / \tau

    :func:`jsd` of ``hidden[k] @ lm_head[k].T``, without ever holding the K N V logits: the products
    are made in tiles, float32 whatever the inputs are. Where whole rows of all experts fit the
    workspace each product is made once in the forward pass, else twice; the backward pass makes it
    once more, and writes gradients only for what requires them.

    Args:
        hidden: list of K tensors ``[..., H_k]``, the widths may differ.
        lm_head: list of K tensors ``[V, H_k]``, the layout of ``torch.nn.Linear.weight``.
        weights: w, ``[..., K]`` or ``[K]``, at least 0 and summing to 1 (not checked); None for
            1/K each.

    Other args:
        bias: list of K tensors ``[V]``, or None.
        reduction: ``"mean"`` over the rows that count (0 if there are none), ``"sum"`` or
            ``"none"``.
        num_items: what ``"mean"`` divides by instead of the rows that count: a number or a tensor
            of one.
        target: integer ``[...]``; only compared with ``ignore_index``, for packed and padded
            batches.
        ignore_index: rows with this target give 0 and no gradient; on a CPU they cost nothing.
        temperature: :math:`\tau`, positive.
        softcap: :math:`c`, positive, or None for no cap.
        vocab_size: number of head rows V that count; the rest is padding with gradient 0. Needed
            when the heads' sizes differ.
        workspace_bytes: bound on the memory beyond inputs and results, at least 1 MiB; default
            64 MiB on a CPU, 512 MiB elsewhere. A few statistics per row come on top.

    Returns:
        Divergence in nats: a scalar, or ``[...]`` for ``reduction="none"``; float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: shapes, devices or scalars out of range.
        TypeError: dtypes; float64 does not mix with others, the rest does.
        RuntimeError: inside a ``torch.func`` transform, or on double backward.

    Gradients for the weights, hidden states, heads and biases, each only where required.

    Example:
        >>> import robustgate as rg, torch
        >>> hidden = [torch.ones(3, 4), torch.ones(3, 6)]
        >>> rg.linear_jsd(hidden, [torch.zeros(8, 4), torch.zeros(8, 6)])
        tensor(0.)
    """
    op = "linear_jsd"
    checks.refuse_transforms(op)
    heads = checks.unpack_heads(op, hidden, lm_head, bias, vocab_size)
    target = checks.check_mask(op, target, heads.hidden)
    experts = len(heads.hidden)
    w = checks.check_weights(op, weights, (*heads.hidden[0].shape[:-1], experts), heads.like)
    checks.check_transform(op, temperature, softcap)
    checks.check_reduction(op, reduction, num_items)
    workspace = checks.check_workspace(op, workspace_bytes, w.device)
    settings = (heads.vocab_size, ignore_index, temperature, softcap, workspace)
    if (heads.requires_grad or w.requires_grad) and torch.is_grad_enabled():
        tensors = (*heads.hidden, *heads.lm_head, *heads.bias)
        value = _apply(w, target, experts, settings, *tensors)
    else:
        value = _linear_jsd(heads.hidden, heads.lm_head, heads.bias, w, target, *settings)[0]
    return checks.reduce(value, target, ignore_index, reduction, num_items)
