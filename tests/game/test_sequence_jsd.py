"""sequence_jsd against the divergence of finite distributions, computed as a sum."""

import math

import pytest
import torch

from robustgate.game import Documents, sequence_jsd

EXPERTS = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]]).double()


def drawn(expert, count, generator):
    x = torch.multinomial(expert, count, replacement=True, generator=generator)
    return Documents(x.unsqueeze(1).double(), EXPERTS.log().T[x])


def exact(w):
    mixture = w @ EXPERTS
    return float((w * (EXPERTS * (EXPERTS / mixture).log()).sum(dim=1)).sum())


@pytest.mark.parametrize("weights", [None, [0.5, 0.25, 0.25], [0.7, 0.3, 0.0]])
def test_it_estimates_the_sum_and_knows_its_error(weights):
    w = torch.full((3,), 1 / 3).double() if weights is None else torch.tensor(weights).double()
    generator = torch.Generator().manual_seed(0)
    found = [
        sequence_jsd(
            [drawn(expert, 400 * (k + 1), generator) for k, expert in enumerate(EXPERTS)],
            None if weights is None else w,
        )
        for _ in range(200)
    ]
    values = torch.tensor([estimate.value for estimate in found])
    errors = torch.tensor([estimate.standard_error for estimate in found])
    # The mean of 200 estimates, within four of its standard errors; their spread within a quarter
    # (an estimated standard deviation of 200 values is off by 5 %).
    assert float(values.mean()) == pytest.approx(exact(w), abs=float(4 * errors.mean()) / 200**0.5)
    assert float(values.std()) == pytest.approx(float(errors.mean()), rel=0.25)


def test_equal_experts_and_experts_that_exclude_each_other():
    same = [Documents(torch.zeros(2, 1), torch.full((2, 2), -3.0)) for _ in range(2)]
    assert sequence_jsd(same).value == pytest.approx(0.0, abs=1e-12)
    apart = torch.tensor([[-3.0, -math.inf]] * 2)
    sets = [Documents(torch.zeros(2, 1), apart), Documents(torch.zeros(2, 1), apart.flip(1))]
    assert sequence_jsd(sets).value == pytest.approx(math.log(2), abs=1e-12)
    w = torch.tensor([0.9, 0.1])
    entropy = -float(torch.xlogy(w.double(), w.double()).sum())
    assert sequence_jsd(sets, w).value == pytest.approx(entropy, abs=1e-6)  # float32 weights


def test_it_refuses():
    one = Documents(torch.zeros(2, 1), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"expected one set per expert.*sizes \[2\] for 2"):
        sequence_jsd([one])
    with pytest.raises(ValueError, match="at least 2 documents"):
        sequence_jsd([one, Documents(torch.zeros(1, 1), torch.zeros(1, 2))])
    with pytest.raises(ValueError, match="weights: expected non-negative"):
        sequence_jsd([one, one], torch.tensor([0.9, 0.3]))
