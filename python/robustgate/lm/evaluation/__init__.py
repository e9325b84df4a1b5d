"""Evaluation of a modular model against everything it should be compared with."""
