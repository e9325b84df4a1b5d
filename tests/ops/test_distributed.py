"""DistributedDataParallel on two processes (gloo), with an expert that no batch uses.

Each rank has half of the batch; the gradients have to be those of one process with all of it.
Rank 1 has fewer tokens that count, so that a mean over ranks would be another loss: the tokens of
both are given as num_items, and DDP's mean of two is undone by a factor of 2.
"""

import os
import subprocess
import sys

import pytest
import torch

WORKER = """
import os
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import robustgate as rg

VOCAB, WIDTH, ROWS = 31, 12, 8


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Linear(6, WIDTH)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, VOCAB) for _ in range(3))
        self.gate = torch.nn.Linear(6, 2)

    def forward(self, x, target, items, op):
        h, heads = torch.tanh(self.trunk(x)), self.heads[:2]  # the third expert is not used
        if op == "mixture_nll":
            logits = [head(h) for head in heads]
            return rg.mixture_nll(logits, self.gate(x), target, num_items=items)
        return rg.linear_mixture_nll(
            [h, h],
            [head.weight for head in heads],
            self.gate(x),
            target,
            bias=[head.bias for head in heads],
            num_items=items,
        )


def batch():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 6, generator=g)
    target = torch.randint(0, VOCAB, (ROWS,), generator=g)
    target[5:7] = -100
    return x, target, (target != -100).sum()


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    x, target, items = batch()
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    results = {}
    for op in ("mixture_nll", "linear_mixture_nll"):
        for variant in ("find_unused_parameters", "static_graph"):
            module = DistributedDataParallel(Experts(), **{variant: True})
            for _ in range(2):  # a static graph is recorded in the first step
                module.zero_grad()
                (2 * module(x[half], target[half], items, op)).backward()
            results[f"{op} {variant}"] = gradients(module.module)
    dist.destroy_process_group()
    torch.save(results, f"{folder}/rank{rank}.pt")


if __name__ == "__main__":
    folder = sys.argv[1]
    single = {}
    for op in ("mixture_nll", "linear_mixture_nll"):
        module = Experts()
        module(*batch(), op).backward()
        single[op] = gradients(module)
    torch.save(single, f"{folder}/single.pt")
    mp.spawn(run, (folder,), nprocs=2)
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ddp")
    script = folder / "worker.py"  # a file: spawned processes import it
    script.write_text(WORKER)
    result = subprocess.run(
        [sys.executable, str(script), str(folder)],
        # All traffic stays on this machine, also where its name resolves to nothing.
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("op", ["mixture_nll", "linear_mixture_nll"])
@pytest.mark.parametrize("variant", ["find_unused_parameters", "static_graph"])
def test_gradients_are_those_of_one_process(outcome, op, variant):
    want = outcome["single"][op]
    assert {name for name, grad in want.items() if grad is None} == {
        "heads.2.weight",
        "heads.2.bias",
    }
    for rank in ("rank0", "rank1"):
        got = outcome[rank][f"{op} {variant}"]
        for name, grad in want.items():
            if grad is None:
                assert got[name] is None or (got[name] == 0).all()
            else:
                assert grad.abs().max() > 0
                # Float32 sums over 6 rows, in another order.
                torch.testing.assert_close(got[name], grad, atol=1e-7, rtol=1e-5)
