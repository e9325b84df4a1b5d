"""``linear_mixture_nll``: the mixture's loss from hidden states and heads, without the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustgate.ops import checks, linear
from robustgate.ops.autograd import once_differentiable
from robustgate.ops.expert_log_prob import (
    SETTINGS,
    check_target_range,
    fresh_gradients,
    per_expert,
    trainable,
)
from robustgate.ops.library import define_composed
from robustgate.ops.linear_gradients import gradients
from robustgate.ops.mixture_log_prob import mixture_log_prob
from robustgate.ops.reference import effective_target_logit


def _fake(
    hidden: Sequence[Tensor],
    lm_head: Sequence[Tensor],
    bias: Sequence[Tensor],
    target: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor]:  # [..., K], [..., K]
    shape = (*target.shape, len(hidden))
    double = hidden[0].dtype == torch.float64
    return (
        target.new_empty(shape, dtype=torch.float64 if double else torch.float32),
        target.new_empty(shape, dtype=torch.float64),
    )


def _forward(
    hidden: Sequence[Tensor],
    lm_head: Sequence[Tensor],
    bias: Sequence[Tensor],
    target: Tensor,
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    if target.device.type == "cpu":
        check_target_range(target, vocab_size, ignore_index)
    rows = linear.Rows.counted(target, target.numel(), ignore_index)
    counted = rows.pick(target.flatten())
    log_prob, log_sum = [], []
    with linear.no_autocast(target.device):
        for head in linear.heads_of(hidden, lm_head, bias, vocab_size):
            logit, lse = linear.log_sum_exp(head, rows, counted, workspace, temperature, softcap)
            # NaN where the target is out of range: no tile held it.
            value = effective_target_logit(logit, temperature, softcap) - lse
            log_prob.append(rows.spread(value.clamp_max(0.0).to(logit.dtype)))
            log_sum.append(rows.spread(lse))
    shape = (*target.shape, len(hidden))
    ignored = (target == ignore_index).unsqueeze(-1)
    return (
        torch.stack(log_prob, -1).view(shape).masked_fill_(ignored, 0.0),
        torch.stack(log_sum, -1).view(shape).masked_fill_(ignored, 0.0),
    )


def _fake_backward(
    grad: Tensor,
    hidden: Sequence[Tensor],
    lm_head: Sequence[Tensor],
    bias: Sequence[Tensor],
    target: Tensor,
    lse: Tensor,
    needs_grad: Sequence[bool],
    *settings: Any,
) -> list[Tensor]:
    return fresh_gradients(trainable([*hidden, *lm_head, *bias], needs_grad))


def _backward(
    grad: Tensor,
    hidden: Sequence[Tensor],
    lm_head: Sequence[Tensor],
    bias: Sequence[Tensor],
    target: Tensor,
    lse: Tensor,
    needs_grad: Sequence[bool],
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    workspace: int,
) -> list[Tensor]:
    experts = len(hidden)
    rows = linear.Rows.counted(target, target.numel(), ignore_index)
    counted = rows.pick(target.flatten())
    needs = linear.needs_of(needs_grad, experts)
    # The log-sum-exps of ignored rows are 0, not theirs: nothing may be asked of such a row.
    grads = grad.masked_fill((target == ignore_index).unsqueeze(-1), 0.0).view(-1, experts)
    results: list[linear.HeadGradients] = []
    with linear.no_autocast(target.device):
        for k, head in enumerate(linear.heads_of(hidden, lm_head, bias, vocab_size)):
            coefficient, log_sum = rows.pick(grads[:, k]), rows.pick(lse.view(-1, experts)[:, k])

            def tile_gradient(
                tile: linear.Tile, coefficient: Tensor = coefficient, log_sum: Tensor = log_sum
            ) -> Sequence[Tensor]:
                # a (1[v = y] - p_v) where the tile holds the target, else -a p_v.
                local, inside = linear.within(counted[tile.rows], tile.columns)
                a = coefficient[tile.rows]
                out: Sequence[Tensor] = torch.ops.robustgate.expert_log_prob_backward(
                    torch.where(inside, a, 0).unsqueeze(1),
                    torch.where(inside, 0, -a).unsqueeze(1),
                    tile.logits,
                    local,
                    log_sum[tile.rows].unsqueeze(1),
                    tile.columns.stop - tile.columns.start,
                    -1,
                    temperature,
                    softcap,
                )
                return out

            results += gradients([head], rows, needs[k : k + 1], workspace, tile_gradient)
    return linear.collect(results)


_linear_expert_log_prob = define_composed(
    f"linear_expert_log_prob({linear.HEADS}, Tensor target, {SETTINGS}, int workspace) "
    "-> (Tensor, Tensor)",
    _fake,
    _forward,
)
_linear_expert_log_prob_backward = define_composed(
    f"linear_expert_log_prob_backward(Tensor grad, {linear.HEADS}, Tensor target, Tensor lse, "
    f"bool[] needs_grad, {SETTINGS}, int workspace) -> Tensor[]",
    _fake_backward,
    _backward,
)


class _LinearExpertLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, target: Tensor, experts: int, settings: tuple[Any, ...], *tensors: Tensor
    ) -> Tensor:
        log_prob: Tensor
        parts = linear.split(tensors, experts)
        log_prob, lse = _linear_expert_log_prob(*parts, target, *settings)
        ctx.save_for_backward(target, lse, *tensors)
        ctx.experts, ctx.settings = experts, settings
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        target, lse, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        grads = _linear_expert_log_prob_backward(
            grad.contiguous(),
            *linear.split(tensors, ctx.experts),
            target,
            lse,
            needs,
            *ctx.settings,
        )
        return (None, None, None, *per_expert(grads, needs))


_apply: Callable[..., Tensor] = _LinearExpertLogProb.apply


def linear_mixture_nll(
    hidden: Sequence[Tensor],  # K x [..., H_k]
    lm_head: Sequence[Tensor],  # K x [V, H_k]
    gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor,  # [...]
    *,
    bias: Sequence[Tensor] | None = None,  # K x [V]
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    r"""Return the mixture's negative log-likelihood from hidden states and language-model heads.

    .. math:: -\log \sum_k g_k \, p_k(y), \qquad g = \mathrm{softmax}(a), \quad
              p_k = \mathrm{softmax}(z'_k), \quad z_k = W_k h_k + b_k, \quad
              z' = c \tanh(z / c) / \tau

    :func:`mixture_nll` of ``hidden[k] @ lm_head[k].T``, without ever holding the K N V logits: the
    products are made in tiles over rows and vocabulary. Logits and all sums are float32 whatever
    the inputs are. The backward pass makes the tiles once more, for trainable experts only; with
    frozen experts it needs the K saved log-probabilities of each row and no product at all.

    Args:
        hidden: list of K tensors ``[..., H_k]``, the widths may differ.
        lm_head: list of K tensors ``[V, H_k]``, the layout of ``torch.nn.Linear.weight``.
        gate_logits: a, ``[..., K]`` or ``[K]`` for one gate on every row.
        target: integer ``[...]``, the token ids.

    Other args:
        bias: list of K tensors ``[V]``, or None.
        reduction: ``"mean"`` over the rows that count (0 if there are none), ``"sum"`` or
            ``"none"``.
        num_items: what ``"mean"`` divides by instead of the rows that count: a number or a tensor
            of one.
        ignore_index: rows with this target give 0 and no gradient; on a CPU they cost nothing.
        temperature: :math:`\tau`, positive.
        softcap: :math:`c`, positive, or None for no cap.
        vocab_size: number of head rows V that count; the rest is padding with gradient 0. Needed
            when the heads' sizes differ.
        workspace_bytes: bound on the memory beyond inputs and results, at least 1 MiB; default
            64 MiB on a CPU, 512 MiB elsewhere. A few statistics per row come on top.

    Returns:
        Loss in nats: a scalar, or ``[...]`` for ``reduction="none"``; float32 (float64 for float64
        inputs).

    Raises:
        ValueError: shapes, devices, scalars or (on a CPU) a target out of range.
        TypeError: dtypes; float64 does not mix with others, the rest does.
        RuntimeError: inside a ``torch.func`` transform, or on double backward.

    Gradients for the gate, hidden states, heads and biases, each only where required.

    Example:
        >>> import robustgate as rg, torch
        >>> hidden = [torch.ones(3, 4), torch.ones(3, 6)]
        >>> heads = [torch.zeros(8, 4), torch.zeros(8, 6)]
        >>> rg.linear_mixture_nll(hidden, heads, torch.zeros(2), torch.tensor([0, 7, -100]))
        tensor(2.0794)
    """
    op = "linear_mixture_nll"
    checks.refuse_transforms(op)
    heads = checks.unpack_heads(op, hidden, lm_head, bias, vocab_size)
    target = checks.check_target(op, target, heads.hidden)
    experts = len(heads.hidden)
    gate = checks.check_gate(op, gate_logits, (*target.shape, experts), heads.like)
    checks.check_transform(op, temperature, softcap)
    checks.check_reduction(op, reduction, num_items)
    workspace = checks.check_workspace(op, workspace_bytes, target.device)
    settings = (heads.vocab_size, ignore_index, temperature, softcap, workspace)
    tensors = (*heads.hidden, *heads.lm_head, *heads.bias)
    if heads.requires_grad and torch.is_grad_enabled():
        log_prob = _apply(target, experts, settings, *tensors)
    else:
        log_prob = _linear_expert_log_prob(
            heads.hidden, heads.lm_head, heads.bias, target, *settings
        )[0]
    nll = -mixture_log_prob(log_prob, gate).masked_fill(target == ignore_index, 0.0)
    return checks.reduce(nll, target, ignore_index, reduction, num_items)
