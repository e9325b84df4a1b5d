"""One system's numbers on every domain, with intervals, from the losses of its documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from robustgate.game import bootstrap_worst_case
from robustgate.lm.evaluation.results import DomainResult, Estimate, SystemResult
from robustgate.lm.evaluation.systems import CACHED, ORACLE, UPDATING, DomainLosses


def summarise(
    name: str,
    kind: str,
    losses: Sequence[DomainLosses],
    text_bytes: Mapping[str, int] | None,
    confidence: float,
    resamples: int,
    seed: int,
) -> SystemResult:
    """Summarise one system.

    Args:
        name: Its name.
        kind: Its kind, see ``SystemResult``.
        losses: Of every domain.
        text_bytes: Bytes of every domain's text, for bits per byte.
        confidence: Coverage of the intervals.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Raises:
        ValueError: It gives a document probability 0, or a domain has fewer than two documents.
    """
    results, per_document, per_token = [], {}, {}
    for part in losses:
        own, length = part.nll[name], part.lengths  # [n_d]
        excess = own - part.nll[ORACLE]  # [n_d]
        if not bool(excess.isfinite().all()):
            document = int((~excess.isfinite()).nonzero()[0])
            raise ValueError(
                f"{name}: expected a finite loss, but it gives document {document} of "
                f"{part.domain!r} probability 0; leave it out of what is compared (baselines)"
            )
        rate = excess.sum() / length.sum()
        per_document[part.domain] = excess
        # A mean with the value of the ratio and, to first order, its sampling error.
        per_token[part.domain] = rate + (excess - rate * length) / length.mean()
        size = None if text_bytes is None else text_bytes[part.domain]
        results.append(
            DomainResult(
                domain=part.domain,
                documents=len(length),
                tokens=int(length.sum()),
                nll_per_token=float(own.sum() / length.sum()),
                nll_document_weighted=float((own / length).mean()),
                nll_per_document=float(own.mean()),
                perplexity=float((own.sum() / length.sum()).exp()),
                bits_per_byte=None if size is None else float(own.sum()) / math.log(2) / size,
                excess_per_token=float(rate),
                excess_per_document=float(excess.mean()),
            )
        )
    worst = max(results, key=lambda result: result.excess_per_document)
    intervals = [
        bootstrap_worst_case(sample, level=confidence, samples=resamples, seed=seed)
        for sample in (per_document, per_token)
    ]
    return SystemResult(
        name,
        kind,
        kind not in ("oracle", "bound") and name not in (CACHED, UPDATING),
        tuple(results),
        worst.domain,
        Estimate(worst.excess_per_document, *intervals[0]),
        Estimate(max(result.excess_per_token for result in results), *intervals[1]),
    )
