"""The scripts of examples/: they run, warn of nothing, and what they print holds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"


def run(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", EXAMPLES / script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def numbers(output: str, pattern: str) -> list[tuple[float, ...]]:
    """Return the numbers of every line that matches, ``#`` standing for one."""
    found = re.findall(re.escape(pattern).replace(r"\#", NUMBER), output)
    assert found, f"no {pattern!r} in\n{output}"
    return [tuple(map(float, row if isinstance(row, tuple) else (row,))) for row in found]


@pytest.fixture(scope="module")
def plain() -> str:
    return run("plain_training_loop.py")


@pytest.fixture(scope="module")
def distillation() -> str:
    return run("distillation_loop.py")


def test_every_expert_learns_and_its_loss_is_the_cross_entropy(plain):
    losses = numbers(plain, "loss # -> # nats per token")
    assert len(losses) == 3  # two experts and the router
    assert all(last < 0.75 * first for first, last in losses[:2])
    # Means of 760 losses of up to 8 nats, each right to 5e-7, summed in another order.
    assert all(d[0] <= 4e-6 for d in numbers(plain, "difference from F.cross_entropy: #"))


def test_the_router_beats_every_expert(plain):
    first, last = numbers(plain, "router: loss # -> # nats per token")[0]
    ((alone,),) = numbers(plain, "the best expert alone: #")
    assert last < first < alone


def test_heads_give_what_logits_give_and_keep_less(plain):
    ((without, logits),) = numbers(plain, "loss # without logits, # with them")
    assert abs(without - logits) <= 2e-5  # printed with five decimals
    # Both are float32 products of 760 rows, summed in different orders.
    assert numbers(plain, "relative difference of the heads' gradients: #")[0][0] <= 1e-5
    ((kept,),) = numbers(plain, "kept for the backward pass with logits: # MiB")
    ((kept_without,),) = numbers(plain, "kept for the backward pass without: # MiB")
    logits_size = 2 * 8 * 95 * 2048 * 4 / 2**20  # K B (T - 1) V float32
    assert kept >= logits_size
    assert kept_without < logits_size / 4  # hidden states and heads


def test_micro_batches_add_up_only_with_num_items(plain):
    assert numbers(plain, "with num_items: # off")[0][0] <= 1e-5  # float32 sums of 476 rows
    assert numbers(plain, "with a mean of means: # off")[0][0] > 0.01  # uneven micro-batches


def test_regularisers_agree_with_plain_torch(plain):
    assert numbers(plain, "difference from plain torch: #")[0][0] <= 4e-6  # as the cross-entropy


def test_the_student_learns_with_the_loss_of_a_plain_trainer(distillation):
    ((first, last),) = numbers(distillation, "student: loss # -> # nats per token")
    assert last < 0.5 * first
    # The plain form cancels: terms of up to 8 nats times probabilities, right to 1e-7 each.
    assert numbers(distillation, "difference from plain torch: #")[0][0] <= 2e-6


def test_every_beta_agrees_with_plain_torch(distillation):
    rows = numbers(distillation, "beta #: #, plain torch #, gradients # apart")
    assert [row[0] for row in rows] == [0.0, 0.1, 0.5, 0.9, 1.0]
    for _, fused, plain_torch, gradients in rows:
        assert abs(fused - plain_torch) <= 3e-6  # the plain form's rounding, and six decimals
        assert gradients <= 1e-4  # the plain form cancels in its gradient, too


def test_the_linear_form_keeps_no_logits(distillation):
    ((linear, logits),) = numbers(distillation, "without logits: #, with them #")
    assert abs(linear - logits) <= 3e-6
    kept = [
        numbers(distillation, f"{form} form keeps # MiB")[0][0]
        for form in ("plain", "fused", "linear")
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[2] < 8 * 95 * 2048 * 4 / 2**20  # less than one tensor of logits
