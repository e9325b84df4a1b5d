"""Microseconds that one small call costs: N = 8, K = 4, V = 64, one thread.

    python benchmarks/call_overhead.py

Each figure is the fastest of 20 batches of 200 calls: what the code costs, not what the machine was
doing besides.
"""

import time
from collections.abc import Callable

import torch

import robustgate as rg


def microseconds(function: Callable[[], object], batches: int = 20, calls: int = 200) -> float:
    for _ in range(calls):
        function()
    fastest = float("inf")
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest / calls * 1e6


def main() -> None:
    torch.set_num_threads(1)
    logits = [torch.randn(8, 64) for _ in range(4)]
    target = torch.randint(0, 64, (8,))
    gate = torch.randn(8, 4)
    trained = gate.clone().requires_grad_()
    log_prob = rg.expert_log_prob(logits, target)
    rows = {
        "mixture_nll, no reduction": lambda: rg.mixture_nll(logits, gate, target, reduction="none"),
        "mixture_nll, no reduction, gate gradient": lambda: rg.mixture_nll(
            logits, trained, target, reduction="none"
        ),
        "mixture_nll, mean": lambda: rg.mixture_nll(logits, gate, target),
        "expert_log_prob": lambda: rg.expert_log_prob(logits, target),
        "mixture_log_prob": lambda: rg.mixture_log_prob(log_prob, gate),
        "torch.nn.functional.cross_entropy (one expert)": lambda: torch.nn.functional.cross_entropy(
            logits[0], target
        ),
    }
    for name, function in rows.items():
        print(f"{microseconds(function):6.1f} us  {name}")


if __name__ == "__main__":
    main()
