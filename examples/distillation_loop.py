"""A distillation loop: the loss of a GKD-style trainer, replaced by ``rg.generalized_jsd``.

Run it: ``python examples/distillation_loop.py``. CPU, no download, a few seconds. The guide is
docs/training_loops.md.
"""

from __future__ import annotations

import math

import torch
from tiny import batch, encode, freeze, kept_bytes, relative_difference, texts, tiny_llama, train
from torch import Tensor
from transformers import LlamaForCausalLM

import robustgate as rg

ROWS, LENGTH, PROMPT = 8, 96, 32  # B, T, tokens of a row that are given, not learned
TEMPERATURE = 2.0


def plain_generalized_jsd(
    student: Tensor,  # [B, T, V]
    teacher: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    beta: float,
    num_items: Tensor | None = None,
) -> Tensor:
    """Return the loss in plain torch, as trainers write it: several copies of the logits."""
    s = torch.log_softmax(student / TEMPERATURE, -1)
    t = torch.log_softmax(teacher / TEMPERATURE, -1)
    if beta == 0:
        divergence = t.exp() * (t - s)
    elif beta == 1:
        divergence = s.exp() * (s - t)
    else:
        m = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
        divergence = beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)
    counted = labels != -100
    return divergence[counted].sum() / (counted.sum() if num_items is None else num_items)


def labelled(tokens: Tensor) -> tuple[Tensor, Tensor]:  # [B, T], [B, T]
    """Return tokens and labels; prompts, and the padding of every other row, do not count."""
    labels = tokens.clone()
    labels[:, :PROMPT] = -100
    labels[::2, -20:] = -100
    return tokens, labels


def distil(student: LlamaForCausalLM, teacher: LlamaForCausalLM, stream: Tensor) -> None:
    """Train the student towards the teacher: two micro-batches a step, one divisor."""
    optimiser = torch.optim.AdamW(student.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(1)
    losses, difference = [], 0.0
    for _ in range(30):
        batches = [labelled(batch(stream, ROWS // 2, LENGTH, generator)) for _ in range(2)]
        num_items = sum(torch.count_nonzero(labels[:, 1:] != -100) for _, labels in batches)
        total = 0.0
        for tokens, labels in batches:
            with torch.no_grad():
                teacher_logits = teacher(input_ids=tokens).logits[:, :-1]  # [B, T - 1, V]
            student_logits = student(input_ids=tokens).logits[:, :-1]
            loss = rg.generalized_jsd(
                student_logits,
                teacher_logits,
                beta=0.5,
                target=labels[:, 1:],  # the usual shift; -100 does not count
                temperature=TEMPERATURE,
                num_items=num_items,
            )
            loss.backward()
            total += loss.item()
            plain = plain_generalized_jsd(
                student_logits.detach(), teacher_logits, labels[:, 1:], 0.5, num_items
            )
            difference = max(difference, abs((loss - plain).item()))
        optimiser.step()
        optimiser.zero_grad()
        losses.append(total)
    print(f"  student: loss {losses[0]:.4f} -> {losses[-1]:.4f} nats per token")
    print(f"  largest difference from plain torch: {difference:.1e}")


def compare(states: list[Tensor], heads: list[Tensor], target: Tensor) -> None:
    """Compare values and gradients with plain torch for every kind of beta."""
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        student, teacher = logits_of(states, heads)
        fused = rg.generalized_jsd(student, teacher, beta, target=target, temperature=TEMPERATURE)
        plain = plain_generalized_jsd(student, teacher, target, beta)
        got, want = (torch.autograd.grad(z, heads[0], retain_graph=True) for z in (fused, plain))
        apart = relative_difference(got[0], want[0])
        print(f"  beta {beta}: {fused:.6f}, plain torch {plain:.6f}, gradients {apart:.1e} apart")


def compare_memory(states: list[Tensor], heads: list[Tensor], target: Tensor) -> None:
    """Compare what each form of the loss holds until the backward pass."""
    beta = 0.5

    def plain() -> Tensor:
        return plain_generalized_jsd(*logits_of(states, heads), target, beta)

    def fused() -> Tensor:
        logits = logits_of(states, heads)
        return rg.generalized_jsd(*logits, beta, target=target, temperature=TEMPERATURE)

    def linear() -> Tensor:
        weights = torch.tensor([1 - beta, beta])  # of the student, of the teacher
        return rg.linear_jsd(states, heads, weights, target=target, temperature=TEMPERATURE)

    print(f"  without logits: {linear():.6f}, with them {fused():.6f}")
    for loss in (plain, fused, linear):
        print(
            f"  {loss.__name__} form keeps {kept_bytes(loss) / 2**20:.1f} MiB for the backward pass"
        )


def logits_of(states: list[Tensor], heads: list[Tensor]) -> list[Tensor]:
    """Return the logits of hidden states, ``[B, T - 1, V]`` each."""
    return [h @ w.t() for h, w in zip(states, heads, strict=True)]


def main() -> None:
    """Train a teacher, distil it, compare the forms of the loss."""
    stream = encode(texts())["code"]
    teacher = freeze(train(tiny_llama(hidden=64, layers=2, seed=0), stream, steps=40))
    student = tiny_llama(hidden=32, layers=1, seed=1)
    print("1. distillation, two micro-batches a step")
    distil(student, teacher, stream)
    tokens, labels = labelled(batch(stream, ROWS, LENGTH, torch.Generator()))
    models, target = (student, teacher), labels[:, 1:]
    states = [m.model(input_ids=tokens).last_hidden_state[:, :-1].detach() for m in models]
    heads = [m.lm_head.weight for m in models]
    print("2. every beta")
    compare(states, heads, target)
    print("3. hidden states and heads instead of logits")
    compare_memory(states, heads, target)


if __name__ == "__main__":
    main()
