"""Documents: unpacking, padding, refusals."""

import pytest
import torch

from robustgate.game import BayesGate, Documents, TokenDocuments


def test_unpacked_documents_are_padded():
    log_probs = torch.randn(9, 2, dtype=torch.float64) - 3
    offsets = torch.tensor([0, 4, 4, 9])
    documents = TokenDocuments.unpack(log_probs, offsets)
    assert documents.log_probs.shape == (3, 5, 2)
    gate = BayesGate(torch.tensor([0.5, 0.5]))
    packed = -gate.log_prob(log_probs, offsets=offsets).mean()
    torch.testing.assert_close(documents.loss(gate), packed, rtol=0, atol=1e-13)
    hindsight = -log_probs.amax(dim=1).mean()
    torch.testing.assert_close(documents.loss_in_hindsight(), hindsight, rtol=0, atol=1e-13)


@pytest.mark.parametrize("offsets", [[0, 3], [0, 6], [2, 5], [0, 6, 5], []])
def test_offsets_run_from_the_first_token_to_the_last(offsets):
    with pytest.raises(ValueError, match=r"offsets: expected .* non-decreasing from 0 to 5"):
        TokenDocuments.unpack(torch.zeros(5, 2), torch.tensor(offsets, dtype=torch.int64))


def test_no_document_at_all():
    assert TokenDocuments.unpack(torch.zeros(0, 2), torch.tensor([0])).log_probs.shape == (0, 0, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Documents(torch.zeros(2, 1), torch.zeros(2)), r"log_probs: expected shape \[n, K"),
        (lambda: Documents(torch.zeros(3, 1), torch.zeros(2, 2)), r"inputs: expected \[2, ...\]"),
        (
            lambda: Documents(torch.zeros(2, 1), torch.zeros(2, 2), torch.ones(3)),
            r"weights: expected \[2\], got \(3,\)",
        ),
        (
            lambda: Documents(torch.zeros(2, 1), torch.zeros(2, 2), torch.tensor([0.5, 0.6])),
            "weights: expected non-negative numbers that sum to 1, got the sum 1.1",
        ),
        (
            lambda: Documents(torch.zeros(2, 1), torch.zeros(2, 2), torch.tensor([-0.5, 1.5])),
            "weights: .* with 1 below 0",
        ),
        (lambda: TokenDocuments(torch.zeros(2, 2)), r"log_probs: expected shape \[n, T, K\]"),
        (
            lambda: TokenDocuments(torch.zeros(2, 3, 2), torch.ones(2, 2)),
            r"mask: expected shape \(2, 3\), got \(2, 2\)",
        ),
        (
            lambda: TokenDocuments(torch.zeros(2, 3, 2), context=torch.ones(2, 4, 5)),
            r"context: expected shape \(2, 3, 'F'\), got \(2, 4, 5\)",
        ),
        (
            lambda: Documents(
                torch.zeros(1, 1), torch.zeros(1, 2), tokens=TokenDocuments(torch.zeros(2, 3, 2))
            ),
            "tokens: expected 1, got 2",
        ),
    ],
)
def test_documents_refuse_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
