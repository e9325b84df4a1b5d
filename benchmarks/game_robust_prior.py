"""Time of ``game.robust_prior`` from a matrix of document log-probabilities to a certified prior.

    python benchmarks/game_robust_prior.py [--preset small|full|all] [--repeats R]

Documents are Gaussian: expert k on domain d has mean log-probability -300 + skill_dk, document
noise of 5 nats, skill of 3 nats. The time covers everything a caller waits for: validation, the
exponentials, every pass, and the certificate recomputed in log space. The solver uses one thread.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from robustgate.bench.measure import contention
from robustgate.game import RobustPrior, robust_prior

PRESETS = {  # documents, experts, domains
    "small": (20_000, 5, 5),
    "full": (1_000_000, 16, 16),
}
TOLERANCE = 1e-6


def instance(documents: int, experts: int, domains: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    skill = 3 * torch.randn(domains, experts, generator=generator, dtype=torch.float64)
    log_probs = {}
    for d in range(domains):
        size = documents // domains
        noise = 5 * torch.randn(size, experts, generator=generator, dtype=torch.float64)
        log_probs[f"d{d}"] = noise + skill[d] - 300
    return log_probs


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def run(preset: str, repeats: int) -> None:
    documents, experts, domains = PRESETS[preset]
    log_probs = instance(documents, experts, domains, seed=0)
    seconds, processor_seconds = [], []
    solution: RobustPrior | None = None
    for _ in range(repeats + 1):
        start, used = time.perf_counter(), time.process_time()
        solution = robust_prior(log_probs, tol=TOLERANCE)
        seconds.append(time.perf_counter() - start)
        processor_seconds.append(time.process_time() - used)
        if not solution.converged:
            raise SystemExit(f"{preset}: gap {solution.gap:.1e} above {TOLERANCE:.0e}; not timed")
    seconds = sorted(seconds[1:])  # the first run warms the allocator
    assert solution is not None
    print(
        f"{preset}: n = {documents:,}, K = {experts}, D = {domains}: "
        f"median {statistics.median(seconds):.3f} s (fastest {seconds[0]:.3f}, "
        f"slowest {seconds[-1]:.3f}, {repeats} runs), processor time "
        f"{statistics.median(processor_seconds[1:]):.3f} s, {len(solution.trajectory)} passes, "
        f"gap {solution.gap:.1e}, value {solution.value:.6f}"
    )


@contextmanager
def announced() -> Iterator[None]:
    """Name the machine before the measurements; say after them whether it was busy."""
    torch.set_num_threads(1)
    print(f"{processor()}, one thread, torch {torch.__version__}, float64")
    before = contention()
    yield
    after = contention()
    if before.contended or after.contended:
        used = min(before.utilisation, after.utilisation)
        print(f"CONTENDED: got {used:.0%} of a core; do not quote these times")


def parse(description: str, presets: dict[str, tuple[int, int, int]]) -> tuple[list[str], int]:
    """Return the presets and the number of runs asked for."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--preset", choices=[*presets, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    return list(presets) if options.preset == "all" else [options.preset], options.repeats


def main() -> None:
    presets, repeats = parse(__doc__, PRESETS)
    with announced():
        for preset in presets:
            run(preset, repeats)


if __name__ == "__main__":
    main()
