"""Stochastic primal-dual training of a gate against the worst mixture of domains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from robustgate.game.averages import AveragedGate, Averages
from robustgate.game.documents import Documents, TokenDocuments
from robustgate.game.iterate import Iterate, worst_cases
from robustgate.game.mixtures import FULL_SIMPLEX, TINY, MixtureSet
from robustgate.game.normaliser import (
    Normaliser,
    check_samples,
    mean_ratio,
    normaliser,
    standard_error,
)
from robustgate.game.players import GatePlayer, MixturePlayer, MultiplierPlayer

Method = Literal["plain", "optimistic", "extragradient"]
Batch = Mapping[str, Documents] | Mapping[str, TokenDocuments]
Samples = Sequence[Documents]


class PrimalDual:
    """Three players: a mixture and a multiplier that ascend, a gate that descends.

        min_g max_{lambda in Lambda, mu >= 0}
            sum_d lambda_d ( E_d[-log pi_g(x)] - b_d ) + mu (Z_g - 1)

        lambda   <- argmax_{Lambda} step lambda . l - KL(lambda || lambda_old)
        mu       <- max(0, mu + step (Z_g - 1)),  from mu = 1
        gate     AdamW on the gradient of the above, at the new lambda and mu

    :meth:`step` makes one step on a batch, inside a training loop of your own; :meth:`fit` is the
    loop. ``Z_g`` is estimated from samples of the experts, never from training documents.
    :class:`TokenDocuments` need no samples: their mixture is normalised whatever the gate, and mu
    plays no part.

    Losses are means per domain. A domain absent from a batch contributes no gradient and keeps its
    last loss in the mixture's step; one never seen so far takes the mean loss of the others.

    Args:
        gate: any module of the gates' signature; trained in place.
        baseline: ``b_d`` for every domain, in the unit of the losses (nats per document, or per
            token for token documents); its keys name the domains.

    Other:
        mixtures: the set Lambda.
        learning_rate, betas, weight_decay: of AdamW. In a game momentum drives the players around
            each other: the first beta is lower than AdamW's own 0.9.
        mixture_step: of lambda, per nat.
        multiplier_step: of mu, per unit of ``Z_g - 1``.
        method: ``"plain"`` is the above. With ``"optimistic"`` lambda and mu move along twice the
            new losses minus the last ones; with ``"extragradient"`` all players move along the
            gradients found one trial step ahead, for twice the work. Both damp circling.
        ema: decay of the moving average of the gate's parameters.
        snapshots: how many gates of all of training are kept, at least, once there were so many
            steps; an average of outputs takes those of its latter half.

    Attributes:
        gate: the gate, after the last step.
        mixture: ``lambda``, ``[D]`` float64: usable as data weights.
        multiplier: ``mu``.
        steps: made so far.

    Raises:
        ValueError: no domain, no trainable parameter, or an option out of range.

    Example:
        >>> import torch
        >>> from robustgate.game import Documents, PrimalDual, SequenceGate
        >>> log_probs = torch.tensor([[0.9, 0.2], [0.1, 0.8]]).log()  # two documents, two experts
        >>> batch = {"a": Documents(torch.eye(2)[:1], log_probs[:1]),
        ...          "b": Documents(torch.eye(2)[1:], log_probs[1:])}
        >>> drawn = [Documents(torch.eye(2), log_probs, weights=log_probs[:, k].exp())
        ...          for k in range(2)]  # both experts live on these two documents: exact
        >>> gate = SequenceGate.linear(2, 2)
        >>> trainer = PrimalDual(gate, {"a": 0.0, "b": 0.0}, learning_rate=0.05)
        >>> found = trainer.fit(lambda step: batch, 200, samples=lambda step: drawn)
        >>> [round(record.upper_bound, 2) for record in (found[0], found[-1])]  # to log 2
        [0.8, 0.69]

    Source: docs/theory.md, "Primal-dual training"; docs/primal_dual.md.
    """

    def __init__(
        self,
        gate: nn.Module,
        baseline: Mapping[str, float],
        *,
        mixtures: MixtureSet = FULL_SIMPLEX,
        learning_rate: float = 1e-2,
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 0.0,
        mixture_step: float = 0.1,
        multiplier_step: float = 0.1,
        method: Method = "plain",
        ema: float = 0.99,
        snapshots: int = 16,
    ) -> None:
        """Start from the mixture of Lambda nearest to the uniform one, and mu = 1."""
        if not baseline:
            raise ValueError("baseline: expected at least one domain, got an empty mapping")
        if method not in ("plain", "optimistic", "extragradient"):
            raise ValueError(f"method: expected plain, optimistic or extragradient, got {method!r}")
        for name, value in (("mixture_step", mixture_step), ("multiplier_step", multiplier_step)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        if not all(math.isfinite(b) for b in baseline.values()):
            raise ValueError(f"baseline: expected finite numbers, got {dict(baseline)}")
        self.gate, self.mixtures, self.method = gate, mixtures, method
        self.domains = tuple(baseline)
        self.steps = 0
        self.averages = Averages(gate, ema, snapshots)
        self._baseline = torch.tensor([float(b) for b in baseline.values()], dtype=torch.float64)
        self._losses = torch.full_like(self._baseline, torch.nan)  # the last of each domain
        self._hindsight = torch.full_like(self._baseline, torch.nan)
        self._base: dict[str, Any] | None = None  # the gate an extragradient step moves
        optimistic = method == "optimistic"
        self._gate_player = GatePlayer(gate, learning_rate, betas, weight_decay)
        self._mixture_player = MixturePlayer(len(baseline), mixtures, mixture_step, optimistic)
        self._multiplier_player = MultiplierPlayer(multiplier_step, optimistic)

    @property
    def mixture(self) -> Tensor:  # [D]
        """``lambda``, float64."""
        return self._mixture_player.mixture

    @property
    def multiplier(self) -> float:
        """``mu``."""
        return self._multiplier_player.value

    # ------------------------------------------------------------------ the game

    def step(self, batch: Batch, samples: Samples | None = None) -> Iterate:
        """Make one step of all players.

        Args:
            batch: documents of some or all domains.
            samples: equally many documents from each expert (see :func:`normaliser`); needed for
                :class:`Documents`, refused for :class:`TokenDocuments`.

        Returns:
            The point before the step, with its losses on this batch.

        Raises:
            ValueError: unknown domains, an empty batch, missing or unwanted samples, or a loss that
                is not finite; then nothing has changed.
        """
        self._check(batch, samples)
        if self.method == "extragradient":
            found = self._extragradient_step(batch, samples)
        else:
            found, here = self._play(batch, samples)
            self._ascend(here)
            self._gate_player.move(self._gradient(here))
        self.steps += 1
        self.averages.update(self.steps, self.mixture)
        return found

    def fit(
        self,
        batches: Callable[[int], Batch],
        steps: int,
        *,
        samples: Callable[[int], Samples] | None = None,
        log: Callable[[str, float, int], object] | None = None,
    ) -> list[Iterate]:
        """Make steps until ``self.steps == steps``.

        Args:
            batches: called with the number of steps made; a resumed run then sees the batches an
                uninterrupted one would have seen.
            steps: in all, those made before included.
            samples: the same for samples of the experts.
            log: called as ``log(tag, value, step)`` for every scalar, such as
                ``SummaryWriter.add_scalar`` of TensorBoard.

        Returns:
            The record of each step made.
        """
        found = []
        while self.steps < steps:
            now = self.steps
            found.append(self.step(batches(now), None if samples is None else samples(now)))
            if log is not None:
                for tag, value in found[-1].scalars().items():
                    log(tag, value, now)
        return found

    def evaluate(
        self, batch: Batch, samples: Samples | None = None, *, gate: nn.Module | None = None
    ) -> Iterate:
        """Return the record of a gate, ``self.gate`` by default, on documents of all domains.

        Held-out losses and ``Z_g`` are what to report: training loss proves nothing, since with few
        documents ``Z_g <= 1`` does not bind.
        """
        self._check(batch, samples)
        if set(batch) != set(self.domains):
            raise ValueError(f"batch: expected the domains {list(self.domains)}, got {list(batch)}")
        judged = self.gate if gate is None else gate
        with torch.no_grad():
            losses = torch.stack([batch[d].loss(judged) for d in self.domains])
            hindsight = torch.stack([batch[d].loss_in_hindsight() for d in self.domains])
        total = None if samples is None else normaliser(judged, samples)
        return self._iterate(
            losses.to(self._baseline) - self._baseline,
            hindsight.to(self._baseline) - self._baseline,
            total,
        )

    def ema_gate(self) -> nn.Module:
        """Return a copy of the gate with the moving average of its parameters."""
        return self.averages.moving()

    def averaged_gate(self) -> AveragedGate:
        """Return the mean of the outputs of gates from the latter half of training."""
        return self.averages.averaged()

    def averaged_mixture(self) -> Tensor:  # [D]
        """Return the mean of the mixtures from the latter half of training."""
        return self.averages.mixture()

    # ------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all players: a resumed run equals an uninterrupted one, bitwise.

        It holds the trainable parameters; buffers of the gate are the caller's.
        """
        state = {
            "domains": list(self.domains),
            "steps": self.steps,
            "players": [player.state_dict() for player in self._players()],
            "base": self._base,
            "averages": self.averages.state_dict(),
            "losses": self._losses,
            "hindsight": self._hindsight,
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, into a trainer of the same arguments.

        Raises:
            ValueError: other domains, or a gate of other shapes; then nothing has changed.
        """
        if tuple(state["domains"]) != self.domains:
            expected = list(self.domains)
            raise ValueError(f"state: expected the domains {expected}, got {state['domains']}")
        for player, saved in zip(self._players(), state["players"], strict=True):
            player.load_state_dict(saved)
        self._base = copy.deepcopy(state["base"])
        self.averages.load_state_dict(state["averages"])
        self.steps = state["steps"]
        self._losses, self._hindsight = state["losses"].clone(), state["hindsight"].clone()

    # ------------------------------------------------------------------ one step, in parts

    def _players(self) -> list[GatePlayer | MixturePlayer | MultiplierPlayer]:
        return [self._gate_player, self._mixture_player, self._multiplier_player]

    def _extragradient_step(self, batch: Batch, samples: Samples | None) -> Iterate:
        """Move all players along what they find one trial step ahead.

        The gate is left at the trial point: it is what converges, and AdamW, whose steps do not
        shrink with the gradient, keeps its distance from the point it moves.
        """
        players = self._players()
        before = [player.state_dict() for player in players], self._losses, self._hindsight
        try:
            if self._base is not None:
                self._gate_player.load_state_dict(self._base)
            start = self._gate_player.state_dict()
            _, here = self._play(batch, samples)
            self._ascend(here)
            self._gate_player.move(self._gradient(here))
            found, ahead = self._play(batch, samples)
        except ValueError:
            states, self._losses, self._hindsight = before
            for player, state in zip(players, states, strict=True):
                player.load_state_dict(state)
            raise
        trial = self._gate_player.state_dict()
        for player, state in zip(players[1:], before[0][1:], strict=True):
            player.load_state_dict(state)
        self._ascend(ahead)
        gradient = self._gradient(ahead)
        self._gate_player.load_state_dict(start)
        self._gate_player.move(gradient)
        self._base = self._gate_player.state_dict()
        self._gate_player.load_state_dict(trial)
        return found

    def _play(self, batch: Batch, samples: Samples | None) -> tuple[Iterate, _Play]:
        """Return what the present gate does on the batch; change nothing."""
        losses = {name: documents.loss(self.gate) for name, documents in batch.items()}
        hindsight = {name: documents.loss_in_hindsight() for name, documents in batch.items()}
        values = self._updated(self._losses, losses)
        if not all(bool(values[d].isfinite()) for d, n in enumerate(self.domains) if n in losses):
            raise ValueError(f"batch: expected finite losses, got {values.tolist()}")
        surplus, total = None, None
        if samples is not None:
            ratios = [drawn.ratio(self.gate) for drawn in samples]
            surplus = mean_ratio(samples, ratios) - 1.0
            total = Normaliser(1.0 + float(surplus.detach()), standard_error(samples, ratios))
        found = self._iterate(values, self._updated(self._hindsight, hindsight), total)
        return found, _Play(losses, surplus, values, hindsight, total)

    def _ascend(self, here: _Play) -> None:
        """Move the mixture and the multiplier."""
        self._losses = here.values
        self._hindsight = self._updated(self._hindsight, here.hindsight)
        seen = ~here.values.isnan()
        weights = self.mixture[seen].clamp(min=TINY)  # all may be 0, where Lambda says so
        neutral = weights @ here.values[seen] / weights.sum()
        self._mixture_player.move(torch.where(seen, here.values, neutral))
        if here.normaliser is not None:
            self._multiplier_player.move(here.normaliser.value - 1.0)

    def _gradient(self, here: _Play) -> list[Tensor]:
        """Return the gate's gradient against the present mixture and multiplier."""
        weights = dict(zip(self.domains, self.mixture.tolist(), strict=True))
        terms = [weights[name] * loss for name, loss in here.losses.items()]
        if here.surplus is not None:
            terms.append(self.multiplier * here.surplus)
        return self._gate_player.gradient(torch.stack(terms).sum())

    def _updated(self, last: Tensor, losses: Mapping[str, Tensor]) -> Tensor:  # [D]
        """Return the last values with those of the domains present, baseline subtracted."""
        values = last.clone()
        for d, name in enumerate(self.domains):
            if name in losses:
                values[d] = losses[name].detach().to(values) - self._baseline[d]
        return values

    def _iterate(self, losses: Tensor, hindsight: Tensor, total: Normaliser | None) -> Iterate:
        lower, upper = worst_cases(losses, hindsight, self.mixtures, total)
        return Iterate(
            step=self.steps,
            losses=losses,
            mixture=self.mixture,
            multiplier=0.0 if total is None else self.multiplier,
            normaliser=total,
            lower_bound=lower,
            upper_bound=upper,
            domains=self.domains,
        )

    def _check(self, batch: Batch, samples: Samples | None) -> None:
        unknown = [name for name in batch if name not in self.domains]
        if unknown or not batch:
            raise ValueError(
                f"batch: expected domains among {list(self.domains)}, got {list(batch)}"
            )
        for name, documents in batch.items():
            if len(documents.log_probs) == 0:
                raise ValueError(f"batch[{name!r}]: expected at least one document, got none")
        by_token = any(isinstance(documents, TokenDocuments) for documents in batch.values())
        if by_token != (samples is None):
            wanted = "none with token documents" if by_token else "some of each expert"
            raise ValueError(f"samples: expected {wanted}, got {samples if by_token else None}")
        if samples is not None:
            check_samples(samples)


class _Play(NamedTuple):
    """What a gate does on a batch."""

    losses: dict[str, Tensor]  # of the domains present, differentiable
    surplus: Tensor | None  # Z_g - 1, differentiable
    values: Tensor  # [D], losses with baselines subtracted, the last ones of absent domains
    hindsight: dict[str, Tensor]  # of the domains present
    normaliser: Normaliser | None
