"""Time of ``game.solve_exact`` from probability tables to a certified value.

    python benchmarks/game_exact.py [--preset small|full|all] [--repeats R]

Domains share a heavy-tailed base distribution, ``p_d ~ base exp(spread n_d)`` with Gaussian n_d;
expert k is domain k distorted by noise of half that spread. A larger spread means domains that are
easier to tell apart: values of about 0.01, 0.4 and 2.1 nats. The time covers everything a caller
waits for: validation, entropies, every best reply, and the certificate computed afresh; not the
gate, which is timed on its own. The solver uses one thread.
"""

import statistics
import time

import torch
from game_robust_prior import announced, parse

from robustgate.game import ExactSolution, solve_exact

PRESETS = {  # points, domains, experts
    "small": (10_000, 4, 4),
    "full": (1_000_000, 8, 8),
}
SPREADS = (0.15, 1.0, 3.0)
TOLERANCES = (1e-4, 1e-6)


def instance(
    points: int, domains: int, experts: int, spread: float
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(rows: int) -> torch.Tensor:
        return spread * torch.randn(rows, points, generator=generator, dtype=torch.float64)

    base = -torch.arange(1, points + 1, dtype=torch.float64).log()  # Zipf
    domain_logits = base + noise(domains)
    expert_logits = domain_logits[torch.arange(experts) % domains] + 0.5 * noise(experts)
    return torch.softmax(domain_logits, dim=1), torch.softmax(expert_logits, dim=1)


def run(preset: str, spread: float, tolerance: float, repeats: int) -> None:
    points, domains, experts = PRESETS[preset]
    data, pi = instance(points, domains, experts, spread)
    seconds = []
    solution: ExactSolution | None = None
    for _ in range(repeats + 1):
        start = time.perf_counter()
        solution = solve_exact(data, pi, tol=tolerance)
        seconds.append(time.perf_counter() - start)
    assert solution is not None
    if not bool(solution.converged):
        raise SystemExit(f"{preset}: gap {float(solution.gap):.1e} above {tolerance:.0e}")
    seconds = sorted(seconds[1:])  # the first run warms the allocator
    start = time.perf_counter()
    gate = solution.gate
    gate_seconds = time.perf_counter() - start
    error = float(((gate * pi).sum(dim=0) / solution.model - 1).abs().amax())
    print(
        f"{preset}: X = {points:,}, D = {domains}, K = {experts}, spread {spread}: "
        f"median {statistics.median(seconds):.3f} s (fastest {seconds[0]:.3f}, "
        f"slowest {seconds[-1]:.3f}, {repeats} runs), {int(solution.iterations)} passes, "
        f"gap {float(solution.gap):.1e}, value {float(solution.value):.6f}, "
        f"mu {float(solution.mu):.4f}; gate {gate_seconds:.3f} s, relative error {error:.0e}"
    )


def main() -> None:
    presets, repeats = parse(__doc__, PRESETS)
    with announced():
        for tolerance in TOLERANCES:
            print(f"gap {tolerance:.0e}")
            for preset in presets:
                for spread in SPREADS:
                    run(preset, spread, tolerance, repeats)


if __name__ == "__main__":
    main()
