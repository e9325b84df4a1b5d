"""The simplex: support function, mirror step, membership."""

import pytest
import torch

from robustgate.game import Simplex


def test_support_is_the_largest_loss_and_a_vertex_attains_it():
    losses = torch.tensor([-1.0, 3.0, 2.0], dtype=torch.float64)
    value, mixture = Simplex().support(losses)
    assert value == 3.0
    assert mixture.tolist() == [0.0, 1.0, 0.0]
    assert mixture.dtype == torch.float64


def test_support_bounds_every_mixture():
    losses = torch.randn(6, dtype=torch.float64)
    value, _ = Simplex().support(losses)
    mixtures = torch.distributions.Dirichlet(torch.ones(6, dtype=torch.float64)).sample((100,))
    assert bool((mixtures @ losses <= value).all())


def test_support_of_an_infinite_loss_is_infinite():
    value, mixture = Simplex().support(torch.tensor([0.0, torch.inf]))
    assert value == torch.inf
    assert mixture.tolist() == [0.0, 1.0]


def test_support_breaks_ties_by_the_first_domain():
    _, mixture = Simplex().support(torch.zeros(3))
    assert mixture.tolist() == [1.0, 0.0, 0.0]


def test_mirror_step_by_hand():
    mixture = torch.tensor([0.2, 0.8], dtype=torch.float64)
    stepped = Simplex().mirror_step(mixture, torch.tensor([3.0, 1.0], dtype=torch.float64), 0.5)
    weights = [0.2 * 2.718281828459045**1.5, 0.8 * 2.718281828459045**0.5]
    expected = [weight / sum(weights) for weight in weights]
    assert stepped.tolist() == pytest.approx(expected, abs=1e-15)


def test_mirror_step_maximises_gain_minus_divergence():
    mixture = torch.distributions.Dirichlet(torch.ones(5, dtype=torch.float64)).sample()
    losses = torch.randn(5, dtype=torch.float64)
    stepped = Simplex().mirror_step(mixture, losses, 2.0)

    def objective(candidate):
        divergence = (candidate * (candidate / mixture).log()).sum(dim=-1)
        return 2.0 * candidate @ losses - divergence

    others = torch.distributions.Dirichlet(torch.ones(5, dtype=torch.float64)).sample((200,))
    assert float(objective(others).amax()) <= float(objective(stepped))


def test_mirror_step_keeps_a_weight_of_zero():
    stepped = Simplex().mirror_step(torch.tensor([0.0, 1.0]), torch.tensor([9.0, 0.0]), 1.0)
    assert stepped.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("mixture", "inside"),
    [([0.25, 0.75], True), ([1.0, 0.0], True), ([0.5, 0.6], False), ([1.1, -0.1], False)],
)
def test_contains(mixture, inside):
    assert Simplex().contains(torch.tensor(mixture, dtype=torch.float64)) is inside
