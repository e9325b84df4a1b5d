"""The gate of maximum entropy that realises a model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from robustgate.game import maximum_entropy_gate


def rows(*entries):
    return torch.tensor(entries, dtype=torch.float64)


def entropy(gate):
    return -torch.xlogy(gate, gate).sum(dim=-2)


def test_two_experts_have_one_gate():
    experts = torch.rand(2, 50, dtype=torch.float64)
    share = torch.rand(50, dtype=torch.float64)
    gate = maximum_entropy_gate(share * experts[0] + (1 - share) * experts[1], experts)
    torch.testing.assert_close(gate[0], share, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_gate_of_the_same_model_has_more_entropy(seed):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(4, 1, generator=generator, dtype=torch.float64)
    share = torch.rand(4, 1, generator=generator, dtype=torch.float64).pow(3)
    model = (share / share.sum() * experts).sum(dim=0)
    gate = maximum_entropy_gate(model, experts)
    answer = minimize(
        lambda g: float((g * torch.tensor(g).clamp(min=1e-12).log().numpy()).sum()),
        (share / share.sum()).squeeze(1).numpy(),
        bounds=[(0, 1)] * 4,
        constraints=[
            {"type": "eq", "fun": lambda g: g.sum() - 1},
            {"type": "eq", "fun": lambda g: g @ experts.squeeze(1).numpy() - float(model)},
        ],
        method="SLSQP",
        options={"ftol": 1e-12},
    )
    # SLSQP's optimum to its ftol; entropy is flat there, so 1e-6 is ample.
    assert float(entropy(gate)) == pytest.approx(-answer.fun, abs=1e-6)


def test_it_is_an_exponential_tilt():
    experts = torch.rand(5, 20, dtype=torch.float64)
    gate = maximum_entropy_gate(experts.mean(dim=0) ** 1.01, experts)
    # log g_k is linear in pi_k: all slopes between pairs of experts agree.
    slope = (gate.log()[1:] - gate.log()[0]) / (experts[1:] - experts[0])
    torch.testing.assert_close(slope, slope[0].expand(4, 20), rtol=1e-6, atol=1e-9)


def test_uniform_where_the_model_is_the_mean():
    experts = torch.rand(6, 30, dtype=torch.float64)
    gate = maximum_entropy_gate(experts.mean(dim=0), experts)
    torch.testing.assert_close(gate, torch.full_like(gate, 1 / 6), rtol=0, atol=1e-12)


def test_ends_and_ties():
    experts = rows([0.5, 0.5, 0.2, 0.3], [0.1, 0.5, 0.2, 0.3], [0.5, 0.1, 0.2, 0.3])
    gate = maximum_entropy_gate(rows(0.5, 0.1, 0.2, 0.3), experts)
    assert gate[:, 0].tolist() == [0.5, 0.0, 0.5]  # the two at the maximum
    assert gate[:, 1].tolist() == [0.0, 0.0, 1.0]  # the one at the minimum
    torch.testing.assert_close(gate[:, 2:], torch.full((3, 2), 1 / 3).double())


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(0, 2**31),
    st.sampled_from([1.0, 5.0, 40.0, 300.0]),
    st.sampled_from([0.0, 1e-300, 1e-12, 1e-3, 0.5, 1 - 1e-9, 1.0]),
)
def test_realises_any_model_between_the_extremes(count, seed, spread, share):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 8, generator=generator, dtype=torch.float64)
    experts = torch.exp(-spread * noise)  # from 1 down to e^-300
    low, high = experts.amin(dim=0), experts.amax(dim=0)
    model = low + share * (high - low)
    gate = maximum_entropy_gate(model, experts)
    assert bool((gate >= 0).all())
    torch.testing.assert_close(gate.sum(dim=0), torch.ones(8).double(), rtol=1e-14, atol=0)
    torch.testing.assert_close((gate * experts).sum(dim=0), model, rtol=1e-10, atol=0)


def test_near_ties_and_huge_tilts():
    experts = rows([0.0], [1e-10], [1.0])
    gate = maximum_entropy_gate(rows(1e-11), experts)
    assert float((gate * experts).sum()) == pytest.approx(1e-11, rel=1e-12)


def test_blocks_join():
    # Two blocks of 2^15 points and a rest.
    experts = torch.rand(3, 70_000, dtype=torch.float64)
    model = 0.5 * experts.amin(dim=0) + 0.5 * experts.amax(dim=0)
    gate = maximum_entropy_gate(model, experts)
    torch.testing.assert_close((gate * experts).sum(dim=0), model, rtol=1e-11, atol=0)
    part = maximum_entropy_gate(model[40_000:50_000], experts[:, 40_000:50_000])
    torch.testing.assert_close(gate[:, 40_000:50_000], part, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "experts", "message"),
    [
        (rows(0.5), rows(0.5), r"expected shapes \[..., X\] and \[..., K, X\]"),
        (rows(0.5, 0.5), rows([0.5], [0.5]), r"got \(2,\) and \(2, 1\)"),
        (rows(0.9), rows([0.5], [0.4]), "between the experts' smallest and largest"),
        (rows(math.nan), rows([0.5], [0.4]), "between the experts' smallest and largest"),
    ],
)
def test_bad_arguments_are_refused(model, experts, message):
    with pytest.raises(ValueError, match=message):
        maximum_entropy_gate(model, experts)
