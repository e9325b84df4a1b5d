"""One thread for the solvers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch's operators on the calling thread inside the block; restore the setting after.

    The solvers make thousands of calls of a millisecond or less. Where a neighbour is busy, or a
    container grants fewer cores than the machine shows, each parallel call waits at its barrier
    until the other thread is scheduled: a million documents took 13 s on two threads beside a busy
    process, 0.6 s on one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
