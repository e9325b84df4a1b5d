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


# What functions return, the state of a decoder, and the protocol of mixture sets.
NOT_MADE_BY_CALLERS = {
    "ActiveSet", "Bounds", "Capacity", "Certificate", "Distillation", "ExactCertificate",
    "ExactSolution", "FlooredPrior", "GradientConflict", "Interference", "Iterate", "MixtureSet",
    "Normaliser", "RobustPrior", "Sample", "SequenceDivergence", "TokenState", "TokenTraining",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(robustgate.game.__all__) - NOT_MADE_BY_CALLERS))
def test_public_functions_and_classes_have_examples(name):
    tests = doctest.DocTestFinder(recurse=False).find(getattr(robustgate.game, name), name)
    assert any(test.examples for test in tests)
