"""Fixtures of the whole suite."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def domain_text() -> Path:
    """The folder of real domain text; tests that want it skip where it is absent."""
    folder = os.environ.get("ROBUSTGATE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("ROBUSTGATE_DATA does not point to a folder with the five text domains")
    return Path(folder)
