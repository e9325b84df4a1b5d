"""Experts read documents: windows, log-probabilities and features of their distributions."""
