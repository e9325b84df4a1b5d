"""Structural distillation of a modular model: from a gate of whole documents to a causal one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from robustgate.game import SequenceGate, TokenDocuments, TokenGate
from robustgate.game import distill as distill_gate
from robustgate.lm.gates.inputs import GateInputs, Packed
from robustgate.lm.gates.records import GateFit
from robustgate.lm.gates.samplers import ExpertSamplers, counted
from robustgate.lm.gates.spec import GateSpec, Network, standardise
from robustgate.lm.modular import ModularModel
from robustgate.lm.progress import ProgressBar
from robustgate.lm.publish import check_place, publish

_MEASURED: Final = 64  # documents of each expert that the features are standardised by


def distill(
    model: ModularModel,
    out: str | os.PathLike[str],
    *,
    network: Network | None = None,
    documents: int = 500,
    held_out: int = 500,
    steps: int = 300,
    seed: int = 0,
    progress: bool = True,
) -> ModularModel:
    """Teach a causal token gate to imitate a sequence gate, and measure what that loses.

        gap = KL( pi_g / Z_g || student )   in nats per document cut at the teacher's span

    Documents are drawn from ``pi_g / Z_g`` by rejection from the experts. The student is a token
    gate that starts as the Bayes gate of the prior and reads log-probabilities alone. The gap is
    measured on documents that it was not trained on. It holds what training left and what no causal
    gate over these experts can follow; the second is in general not 0.

    Args:
        model: With a sequence gate; its experts must lie where the model says.
        out: Folder of the new model, made or replaced.

    Other:
        network: Of the student; ``Network()`` unless given.
        documents: Documents of the teacher to train on, at least 2.
        held_out: Documents of the teacher to measure the gap on, at least 2.
        steps: Of training.
        seed: Of samples, network and batches.
        progress: Show bars for what takes longer than two seconds.

    Returns:
        The model with the token gate, as read back from ``out``; ``training`` is that of the
        teacher, with ``gap`` and its standard error. Prior and certificate stay.

    Raises:
        ValueError: The model has no sequence gate, a number is out of range, or an expert has
            changed.
        FileNotFoundError: A checkpoint is missing.
        FileExistsError: ``out`` holds other files.

    Example:
        >>> small = distill(ModularModel.load("modular-seq/"), "modular/")    # doctest: +SKIP
        >>> small.training.gap                                                # doctest: +SKIP
        (0.031, 0.004)

    Source: docs/theory.md, "Structural distillation".
    """
    teacher = model.gate()
    if not isinstance(teacher, SequenceGate) or model.spec.span is None:
        raise ValueError(
            f"{model.path}: expected a sequence gate, got a {model.kind} gate; "
            "`robustgate fit --gate sequence` makes one"
        )
    check_place(Path(out))
    samplers = ExpertSamplers(model.open_experts(), model.spec.span).samplers()
    spec = GateSpec("token", network=network or Network())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = spec.build(model.prior)
    assert isinstance(student, TokenGate)
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = [_packed(draw(_MEASURED, generator).tokens) for draw in samplers]
    standardise(student, torch.cat([GateInputs.of(student, part).features for part in drawn]))
    candidates = len(samplers) * (documents + held_out)  # for each accepted one K, where Z_g is 1
    with ProgressBar("draw documents", total=candidates, show=progress) as bar:
        found = distill_gate(
            teacher,
            student,
            counted(samplers, bar),
            documents=documents,
            held_out=held_out,
            steps=steps,
            seed=seed,
        )
    assert model.training is not None
    record = replace(model.training, gap=(found.gap, found.standard_error))
    fitted = GateFit(spec, student.eval().requires_grad_(False), record)
    return publish(replace(model.with_gate(fitted), path=Path(out)))


def _packed(tokens: TokenDocuments | None) -> Packed:
    """Return padded documents one behind the other."""
    assert tokens is not None
    assert tokens.mask is not None
    real = tokens.mask.bool()  # [n, T]
    offsets = torch.nn.functional.pad(real.sum(dim=1).cumsum(0), (1, 0))
    log_probs = tokens.log_probs[real]  # [N, K]
    return Packed(log_probs, log_probs.new_zeros(len(log_probs), 0), offsets)
