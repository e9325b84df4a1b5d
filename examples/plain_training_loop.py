"""A plain training loop, changed step by step: cross-entropy, mixture, heads without logits.

Run it: ``python examples/plain_training_loop.py``. CPU, no download, a few seconds. The guide is
docs/training_loops.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny import VOCAB, batch, encode, freeze, kept_bytes, relative_difference, texts, tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

import robustgate as rg

ROWS, LENGTH = 8, 96  # B, T
ALONE = torch.zeros(1)  # the gate of one expert


def train_expert(stream: Tensor, seed: int, steps: int) -> LlamaForCausalLM:
    """Train one expert with ``mixture_nll`` in place of ``F.cross_entropy``, K = 1."""
    model = tiny_llama(hidden=64, layers=2, seed=seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(seed)
    losses, difference = [], 0.0
    for _ in range(steps):
        tokens = batch(stream, ROWS, LENGTH, generator)
        logits, target = model(input_ids=tokens).logits[:, :-1], tokens[:, 1:]  # [B, T - 1, V]
        before = F.cross_entropy(logits.detach().reshape(-1, VOCAB), target.reshape(-1))
        loss = rg.mixture_nll([logits], ALONE, target)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        difference = max(difference, abs(losses[-1] - before.item()))
    print(f"  expert {seed}: loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token")
    print(f"  largest difference from F.cross_entropy: {difference:.1e}")
    return freeze(model)


def train_router(experts: list[LlamaForCausalLM], streams: list[Tensor], steps: int) -> None:
    """Train a gate over frozen experts: the backward pass does not touch their logits."""
    router = torch.nn.Linear(experts[0].config.hidden_size, len(experts))
    optimiser = torch.optim.AdamW(router.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(7)
    losses = []
    for _ in range(steps):
        tokens = torch.cat([batch(s, ROWS // 2, LENGTH, generator) for s in streams])
        with torch.no_grad():
            features = experts[0].model(input_ids=tokens).last_hidden_state[:, :-1]  # [B, T-1, H]
            logits = [model(input_ids=tokens).logits[:, :-1] for model in experts]
        loss = rg.mixture_nll(logits, router(features), tokens[:, 1:])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    alone = min(rg.mixture_nll([z], ALONE, tokens[:, 1:]).item() for z in logits)
    print(f"  router: loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token")
    print(f"  the best expert alone: {alone:.3f}")


def without_logits(experts: list[LlamaForCausalLM], tokens: Tensor) -> None:
    """Take hidden states and heads instead of logits: the same loss and gradients."""
    target, gate = tokens[:, 1:], torch.zeros(len(experts))
    hidden = [model.model(input_ids=tokens).last_hidden_state[:, :-1] for model in experts]
    heads = [model.lm_head.weight.detach().clone().requires_grad_() for model in experts]

    def from_logits() -> Tensor:
        logits = [h @ w.t() for h, w in zip(hidden, heads, strict=True)]
        return rg.mixture_nll(logits, gate, target)

    def from_heads() -> Tensor:
        return rg.linear_mixture_nll(hidden, heads, gate, target)

    want = torch.autograd.grad(from_logits(), heads)
    got = torch.autograd.grad(from_heads(), heads)
    apart = max(relative_difference(a, b) for a, b in zip(got, want, strict=True))
    print(f"  loss {from_heads():.5f} without logits, {from_logits():.5f} with them")
    print(f"  relative difference of the heads' gradients: {apart:.1e}")
    print(f"  kept for the backward pass with logits: {kept_bytes(from_logits) / 2**20:.1f} MiB")
    print(f"  kept for the backward pass without: {kept_bytes(from_heads) / 2**20:.1f} MiB")


def accumulate(model: LlamaForCausalLM, documents: list[Tensor]) -> None:
    """Split a packed batch into micro-batches: the gradients add up to the whole batch's."""
    tokens, target = pack(documents)
    model.requires_grad_(True)
    num_items = torch.count_nonzero(target != -100)  # a tensor, never read by the host

    def gradient(parts: int, divisor: Tensor | None) -> Tensor:
        for x, y in zip(tokens.chunk(parts), target.chunk(parts), strict=True):
            logits = model(input_ids=x).logits
            loss = rg.mixture_nll([logits], ALONE, y, num_items=divisor)
            (loss if divisor is not None else loss / parts).backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return flat

    whole = gradient(1, None)
    print(f"  {num_items} of {target.numel()} positions count; 4 micro-batches against 1:")
    print(f"  with num_items: {relative_difference(gradient(4, num_items), whole):.1e} off")
    print(f"  with a mean of means: {relative_difference(gradient(4, None), whole):.1e} off")


def pack(documents: list[Tensor]) -> tuple[Tensor, Tensor]:  # [B, T], [B, T]
    """Lay documents end to end; no position predicts across a border or into the padding."""
    tokens = torch.zeros(ROWS * LENGTH, dtype=torch.int64)
    target = torch.full_like(tokens, -100)
    start = 0
    for document in documents:
        stop = start + len(document)
        tokens[start:stop], target[start : stop - 1] = document, document[1:]
        start = stop
    return tokens.view(ROWS, LENGTH), target.view(ROWS, LENGTH)


def regularise(model: LlamaForCausalLM, tokens: Tensor) -> None:
    """Compare label smoothing and z-loss with plain torch."""
    logits, target = model(input_ids=tokens).logits[:, :-1].detach(), tokens[:, 1:]
    want = F.cross_entropy(logits.reshape(-1, VOCAB), target.reshape(-1), label_smoothing=0.1)
    want = want + 1e-4 * torch.logsumexp(logits, -1).square().mean()
    got = rg.mixture_nll([logits], ALONE, target, label_smoothing=0.1, z_loss=1e-4)
    print(f"  loss {got:.5f}, difference from plain torch: {abs(got - want):.1e}")


def main() -> None:
    """Run every step and print what it shows."""
    streams = list(encode(texts()).values())
    print("1. cross-entropy as a mixture of one")
    experts = [train_expert(stream, seed, steps=40) for seed, stream in enumerate(streams)]
    print("2. a router over frozen experts")
    train_router(experts, streams, steps=30)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.cat([batch(s, ROWS // 2, LENGTH, generator) for s in streams])
    print("3. hidden states and heads instead of logits")
    without_logits(experts, tokens)
    print("4. gradient accumulation over packed documents")
    accumulate(experts[0], [streams[0][1000 * i : 1000 * i + 30 + 60 * i] for i in range(4)])
    print("5. label smoothing and z-loss")
    regularise(experts[0], tokens)


if __name__ == "__main__":
    main()
