"""Every example in a docstring of the floor runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import robustgate.game

MODULES = [module.name for module in pkgutil.iter_modules(robustgate.game.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"robustgate.game.{name}")
    failed, _ = doctest.testmod(module)
    assert failed == 0


def test_public_functions_and_classes_have_examples():
    finder = doctest.DocTestFinder(recurse=False)
    for name in ("robust_prior", "maximum_likelihood_prior", "certificate", "capacity",
                 "bootstrap_worst_case", "BayesGate", "Simplex", "Floor", "Box", "CVaR", "KLBall",
                 "Vertices", "solve_exact", "exact_certificate", "maximum_entropy_gate", "bounds",
                 "active_set"):  # fmt: skip
        tests = finder.find(getattr(robustgate.game, name), name)
        assert any(test.examples for test in tests), name
