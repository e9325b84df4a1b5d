"""One resumable run of the Hugging Face Trainer (imported only where one is started)."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from robustgate.lm.files import fsync, write_atomic
from robustgate.lm.progress import ProgressBar
from robustgate.lm.training.packing import PackedRows
from robustgate.lm.training.recipe import SCHEDULES, Recipe

_COMPLETE = "complete"  # the last file of a checkpoint: without it the writer was killed
_REFRESH = 0.2  # seconds between updates of the bar


class _RowTrainer(Trainer):
    """A Trainer that reads rows in their order and remembers the last loss."""

    loss: Tensor | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Make one step."""
        self.loss = super().training_step(*args, **kwargs)
        return self.loss


class _Run(TrainerCallback):
    """Draw the bar, ask for checkpoints by the clock, and keep only the last whole one."""

    def __init__(self, trainer: _RowTrainer, bar: ProgressBar, checkpoint_seconds: float) -> None:
        """Start the clock."""
        self._trainer = trainer
        self._bar = bar
        self._seconds = checkpoint_seconds
        self._saved = self._drawn = time.monotonic()
        self._step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where the run starts."""
        self._step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw, and ask for a checkpoint when the last one is old."""
        now = time.monotonic()
        last = state.global_step == state.max_steps
        save = now - self._saved >= self._seconds and not last
        if save or last or now - self._drawn >= _REFRESH:
            loss = finite_loss(self._trainer, state.global_step)
            self._bar.advance(state.global_step - self._step, note=f"loss {loss:.3f}")
            self._drawn, self._step = now, state.global_step
        control.should_save = save

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the checkpoint as whole, then delete the older ones."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for file in folder.iterdir():
            fsync(file)
        write_atomic(folder / _COMPLETE, b"")
        for other in folder.parent.glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other)
        self._saved = time.monotonic()


def _as_is(batch: Any) -> dict[str, Tensor]:
    """Return the batch that ``PackedRows`` has already put together."""
    return batch  # type: ignore[no-any-return]


def finite_loss(trainer: _RowTrainer, step: int) -> float:
    """Return the last loss, or raise ``ValueError`` if training has diverged."""
    loss = math.nan if trainer.loss is None else float(trainer.loss)
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step}: lower learning_rate")
    return loss


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, after deleting those that are not whole."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / _COMPLETE).is_file():
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch, and restore them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def run_trainer(
    model: PreTrainedModel,
    rows: PackedRows,
    folder: Path,
    recipe: Recipe,
    checkpoint_seconds: float,
    progress: bool,
) -> tuple[float, int]:
    """Train a model in place on all rows, from the newest checkpoint in ``folder`` if there is one.

    Args:
        model: trained in place.
        rows: served in sequence, ``recipe.batch_size`` at a step.
        folder: holds the Trainer's checkpoints.
        recipe: the settings.
        checkpoint_seconds: time between checkpoints.
        progress: show a bar when it takes longer than two seconds.

    Returns:
        The last loss, and the step at which this call began.

    Raises:
        ValueError: the loss is not finite.
    """
    steps = len(rows) // recipe.batch_size
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.95,
        warmup_steps=math.ceil(recipe.warmup * steps),
        lr_scheduler_type=SCHEDULES[recipe.schedule],
        optim="adamw_torch_fused",
        bf16=recipe.bf16,
        use_cpu=recipe.bf16 and not torch.accelerator.is_available(),  # asked for by bf16 on a CPU
        seed=recipe.seed,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = _RowTrainer(model, arguments, _as_is, rows)
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(folder)
    done = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    with ProgressBar("train", steps, done=done, show=progress) as bar:
        trainer.add_callback(_Run(trainer, bar, checkpoint_seconds))
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            last_checkpoint(folder)  # deletes one that an error cut short
    return finite_loss(trainer, steps), done
