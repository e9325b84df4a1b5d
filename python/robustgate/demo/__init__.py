"""The demo: small experts on text that every Python installation carries, combined and measured."""

from robustgate.demo.budget import QUICK, STANDARD, Budget
from robustgate.demo.pipeline import DemoResult, run_demo

__all__ = ["QUICK", "STANDARD", "Budget", "DemoResult", "run_demo"]
