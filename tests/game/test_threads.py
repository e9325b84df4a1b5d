"""The solvers' thread setting is restored."""

import pytest
import torch

from robustgate.game import robust_prior
from robustgate.game.threads import one_thread


def test_the_setting_is_restored():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_the_setting_is_restored_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="log_probs"):
        robust_prior({"a": torch.full((2, 2), -torch.inf)})
    assert torch.get_num_threads() == before
