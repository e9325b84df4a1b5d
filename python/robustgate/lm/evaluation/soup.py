"""The weight-averaged soup: one model whose parameters are the mean of the experts'."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustgate.lm.checkpoint import no_bars
from robustgate.lm.experts import ExpertSet
from robustgate.lm.files import new_folder, read_json, remove_folder

_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def average_weights(
    experts: ExpertSet,
    out: str | os.PathLike[str],
    *,
    weights: Tensor | None = None,  # [K]
) -> Path:
    """Average the parameters of experts of one architecture and write the checkpoint.

        theta = sum_k w_k theta_k

    One model comes out, at the cost of one model. It has no opt-out guarantee: every expert's
    data is in every parameter, and taking an expert out means averaging anew. It works, if at all,
    for experts that are branches of one seed model.

    Args:
        experts: The experts; two of them are in memory at a time.
        out: Folder of the checkpoint; must not exist.

    Other:
        weights: ``w``, float ``[K]``, sums to 1; uniform if left out.

    Returns:
        ``out``.

    Raises:
        ValueError: Architectures differ, or ``weights`` is not a distribution over the experts.
        FileExistsError: ``out`` exists.

    Example:
        >>> average_weights(ExpertSet.open("experts/"), "soup/")              # doctest: +SKIP
        PosixPath('soup')

    Source: Li et al., "Branch-Train-Merge" (2022), parameter averages.
    """
    difference = architectures_differ(experts)
    if difference is not None:
        raise ValueError(f"experts: cannot be averaged, {difference}")
    shares = torch.full((len(experts),), 1 / len(experts)) if weights is None else weights.double()
    if shares.shape != (len(experts),) or abs(float(shares.sum()) - 1) > 1e-6:
        raise ValueError(
            f"weights: expected {len(experts)} numbers that sum to 1, got {shares.tolist()}"
        )
    total: dict[str, Tensor] = {}
    for name, share in zip(experts.names, shares.tolist(), strict=True):
        for key, tensor in experts.load(name).state_dict().items():
            part = share * tensor.double() if tensor.is_floating_point() else tensor
            total[key] = total[key] + part if key in total and part.is_floating_point() else part
    model = experts.load(experts.names[0])
    model.load_state_dict(total)  # rounds to the model's dtype
    with new_folder(Path(out)) as folder, no_bars():
        model.save_pretrained(folder)
        experts.tokenizer.save_pretrained(folder)
    return Path(out)


def remove_averages(folder: Path) -> None:
    """Delete averages of experts' weights that evaluations, killed or at work, hold for a while.

    An evaluation at work fails then.

    Args:
        folder: A modular model's.
    """
    for pattern in (".soup~*~.tmp", ".soup-*"):  # the second is that of earlier versions
        for path in folder.glob(pattern):
            remove_folder(path)


def architectures_differ(experts: ExpertSet) -> str | None:
    """Return in which settings two experts differ, or ``None`` if all can be averaged."""
    first, *others = experts.names
    own = _architecture(experts, first)
    for other in others:
        theirs = _architecture(experts, other)
        for key in sorted(own.keys() | theirs.keys()):
            if own.get(key) != theirs.get(key):
                return (
                    f"{key} is {own.get(key)!r} for {first!r} and {theirs.get(key)!r} for {other!r}"
                )
    return None


def _architecture(experts: ExpertSet, name: str) -> dict[str, Any]:
    config = read_json(experts.path(name) / "config.json")
    return {key: value for key, value in config.items() if key not in _VOLATILE}
