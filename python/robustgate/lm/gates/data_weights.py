"""The least favourable mixture of a certified prior, as weights for a data loader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustgate.lm.modular import ModularModel


@dataclass(frozen=True)
class DataWeights:
    """How often to draw each domain, and each of its documents.

    Attributes:
        mixture: ``lambda*_d`` of each domain; sums to 1.
        documents: ``n_d``, how many documents of each domain there are to draw from.
    """

    mixture: Mapping[str, float]
    documents: Mapping[str, int]

    @property
    def per_document(self) -> dict[str, float]:
        """The probability of a single document of each domain, ``lambda*_d / n_d``."""
        return {name: weight / self.documents[name] for name, weight in self.mixture.items()}

    def of(
        self,
        domains: Sequence[str],  # n
    ) -> Tensor:  # [n]
        """Return one weight per document, for ``torch.utils.data.WeightedRandomSampler``.

        Args:
            domains: the domain of each document of a data set, which may have other numbers of
                documents than ``documents`` says: those listed here count.

        Returns:
            float64 ``[n]``: ``lambda*_d / n_d`` with ``n_d`` the documents of domain d among
            ``domains``. Sums to 1 if every domain with a weight is there.

        Raises:
            ValueError: a domain that the model was not fitted on.
        """
        unknown = sorted(set(domains) - set(self.mixture))
        if unknown:
            raise ValueError(
                f"domains: expected some of {', '.join(self.mixture)}, got {', '.join(unknown)}"
            )
        counts = Counter(domains)
        weights = [self.mixture[name] / counts[name] for name in domains]
        return torch.tensor(weights, dtype=torch.float64)

    def to_json(self) -> dict[str, Any]:
        """Return weights, counts and weights per document as JSON values."""
        return {
            "weights": dict(self.mixture),
            "documents": dict(self.documents),
            "per_document": self.per_document,
        }

    def to_csv(self) -> str:
        """Return the same as CSV, one line per domain."""
        lines = ["domain,weight,documents,weight_per_document"]
        for name, weight in self.mixture.items():
            each = self.per_document[name]
            lines.append(f"{name},{weight!r},{self.documents[name]},{each!r}")
        return "\n".join(lines)


def data_weights(model: ModularModel, documents: Mapping[str, int] | None = None) -> DataWeights:
    """Return the least favourable mixture of a model's certified prior as data weights.

        lambda* = argmax_lambda min_w sum_d lambda_d l_d(w)

    Args:
        model: of any kind; the mixture is that of its prior.
        documents: how many documents of each domain there are to draw from; those of the fit
            unless given.

    Returns:
        The weights, in the order of ``model.domains``.

    Raises:
        ValueError: ``documents`` names other domains, or none, or the model is of a version that
            did not count its documents and ``documents`` is not given.

    Example:
        >>> weights = data_weights(ModularModel.load("modular/"))             # doctest: +SKIP
        >>> weights.mixture                                                   # doctest: +SKIP
        {'code': 0.52, 'wiki': 0.48}

    Source: docs/theory.md, the robust prior; docs/data_weights.md.
    """
    mixture = dict(zip(model.domains, model.mixture.tolist(), strict=True))
    if documents is None:
        if not model.documents:
            raise ValueError(
                f"{model.path}: was written before documents were counted; say how many there are, "
                "or fit again"
            )
        documents = dict(zip(model.domains, model.documents, strict=True))
    if set(documents) != set(mixture) or min(documents.values()) < 1:
        raise ValueError(
            f"documents: expected a number >= 1 for each of {', '.join(mixture)}, got "
            f"{dict(documents)}"
        )
    total = sum(mixture.values())  # 1 to rounding
    weights = {name: weight / total for name, weight in mixture.items()}
    return DataWeights(weights, {name: documents[name] for name in weights})
