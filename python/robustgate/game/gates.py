"""Gates: modules that turn what is known of a document into weights for the experts.

A gate is any ``nn.Module`` whose ``forward`` takes one tensor ``[..., F]`` and returns normalised
log-weights ``[..., K]``, one row for each leading index. What the F numbers are is the gate's own
affair: nothing (``ConstantGate``), features or token ids of a document (``SequenceGate``), or
the experts' log-probabilities of the tokens of a document, ``[..., T, K]``, and then row t depends
on the tokens before t alone (:class:`BayesGate`, ``TokenGate``). Training, sampling and
distillation take every module of this signature.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustgate.game.certificate import check_distribution
from robustgate.game.evidence import document_starts, evidence_before, evidence_in_window
from robustgate.ops.mixture_log_prob import mixture_log_prob


class BayesGate(nn.Module):
    """The exact causal gate of a sequence mixture: the posterior over experts, token by token.

        log w_k(t) = log w_k + sum_{s<t} l_k(s) - normaliser,   l_k(s) = log pi_k(x_s | x_<s)
        log p(x_t | x_<t) = log sum_k w_k(t) e^{l_k(t)}

    The token probabilities multiply to the sequence mixture, ``prod_t p(x_t | x_<t) =
    sum_k w_k pi_k(x)``: on every document and against every expert the regret is at most
    ``-log w_k`` nats. All inputs share one signature: log-probabilities of the observed tokens in,
    normalised float64 log-weights ``[..., K]`` out, those in force *before* each token.

    An expert of prior 0 stays at 0, and so does one that gave an observed token probability 0:
    Bayes never revives. Should that rule out every expert, the document has probability 0: the
    token that did it has log-probability ``-inf`` and the gate starts again from the prior.

    The prior is a buffer and stays float64 whatever ``.to(dtype)`` does to the module around it.

    Args:
        prior: ``[K]``, non-negative, sums to 1.

    Other:
        share: ``alpha`` in [0, 1) of fixed-share: after each token the weights become
            ``(1 - alpha) posterior + alpha prior``, so that a lost expert comes back when the
            document changes its topic. 0 is Bayes, bitwise.
        power: ``eta > 0``, the power of the likelihood: ``w_k e^{eta sum l_k}``. 1 is Bayes,
            bitwise; any other carries no regret bound.
        window: only the last ``window`` tokens count. A window no shorter than the document is
            Bayes, bitwise where no log-probability is ``-inf`` and to 1e-12 there. No regret bound.
        top_k: keep the ``top_k`` largest weights and renormalise them; the posterior behind them
            goes on over all experts. K is Bayes, bitwise. No regret bound.

    Raises:
        TypeError: ``prior`` is not a tensor.
        ValueError: ``prior`` is not a distribution ``[K]``, an option out of range, or ``share``
            together with ``window``.

    Example:
        >>> import torch
        >>> from robustgate.game import BayesGate
        >>> gate = BayesGate(torch.tensor([0.5, 0.5]))
        >>> token_probs = torch.tensor([[0.9, 0.1], [0.8, 0.4]])  # two tokens, two experts
        >>> gate(token_probs.log()).exp()[1]
        tensor([0.9000, 0.1000], dtype=torch.float64)
        >>> round(float(gate.log_prob(token_probs.log()).sum().exp()), 4)  # (.9 * .8 + .1 * .4) / 2
        0.38

    Source: docs/theory.md, "The Bayes gate"; fixed-share: Herbster and Warmuth (1998).
    """

    log_prior: Tensor

    def __init__(
        self,
        prior: Tensor,  # [K]
        *,
        share: float = 0.0,
        power: float = 1.0,
        window: int | None = None,
        top_k: int | None = None,
    ) -> None:
        """Keep ``log prior`` as a float64 buffer."""
        super().__init__()
        size = prior.numel() if isinstance(prior, Tensor) else 0
        self.register_buffer("log_prior", check_distribution("prior", prior, size).log())
        if not 0.0 <= share < 1.0:
            raise ValueError(f"share: expected a number in [0, 1), got {share}")
        if not 0.0 < power < math.inf:
            raise ValueError(f"power: expected a positive number, got {power}")
        if window is not None and (window < 1 or share > 0.0):
            raise ValueError(f"window: expected at least 1 and no share, got {window}, {share=}")
        if top_k is not None and not 1 <= top_k <= size:
            raise ValueError(f"top_k: expected 1 to {size}, got {top_k}")
        self.share, self.power, self.window, self.top_k = share, power, window, top_k

    def forward(
        self,
        log_probs: Tensor,  # [..., T, K]
        *,
        offsets: Tensor | None = None,  # [n + 1]
        mask: Tensor | None = None,  # [..., T]
    ) -> Tensor:  # [..., T, K]
        """Return the normalised log-weights in force before each token.

        Args:
            log_probs: ``l_k(t)`` of the observed tokens, ``[..., T, K]`` floating point; every
                leading index is a document of its own.
            offsets: packs many documents in one ``log_probs`` of shape ``[T, K]``: document i is
                ``log_probs[offsets[i] : offsets[i + 1]]``, and each starts from the prior.
            mask: boolean or 0/1, true for real tokens; the others, anywhere, count for nothing
                (but take up places in a ``window``).

        Returns:
            ``[..., T, K]`` float64.

        Raises:
            TypeError: ``log_probs`` is not floating point.
            ValueError: shapes that do not fit, or offsets that do not run from 0 to T.
        """
        self._check(log_probs, mask)
        real = None if mask is None else mask.bool().reshape(-1, 1)  # [N, 1]; N tokens of all rows
        flat = log_probs.to(torch.float64).reshape(-1, len(self.log_prior))  # [N, K]
        if real is not None:
            flat = flat.masked_fill(~real, 0.0)
        starts = document_starts(log_probs, offsets)  # [N]
        states = self._recursion(flat, starts, real) if self.share else self._sums(flat, starts)
        return self.weights(states).reshape(log_probs.shape)

    def log_prob(
        self,
        log_probs: Tensor,  # [..., T, K]
        *,
        offsets: Tensor | None = None,  # [n + 1]
        mask: Tensor | None = None,  # [..., T]
    ) -> Tensor:  # [..., T]
        """Return the mixture's token log-probabilities ``log sum_k w_k(t) e^{l_k(t)}``.

        Args and errors as in :meth:`forward`; masked tokens get 0.

        Returns:
            ``[..., T]`` float64. Over a document they sum to ``log sum_k w_k e^{L_k}``, if no
            option was given.
        """
        weights = self(log_probs, offsets=offsets, mask=mask)
        out = mixture_log_prob(log_probs.to(torch.float64), weights)
        return out if mask is None else out.masked_fill(~mask.bool(), 0.0)

    def step(
        self,
        log_weights: Tensor,  # [..., K]
        log_probs: Tensor,  # [..., K]
    ) -> Tensor:  # [..., K]
        """Return the state after one more token: the decoding form of :meth:`forward`.

        The state is the log-weights of all experts; decoding starts from ``gate.log_prior``.
        :meth:`weights` of the state are those in force, the same unless ``top_k`` is set.

        Args:
            log_weights: normalised, in force before the token, ``[..., K]``.
            log_probs: ``l_k`` of the token, ``[..., K]``; 0 for every expert leaves a row as it is
                (unless ``share`` is set).

        Returns:
            ``[..., K]`` float64, normalised.

        Raises:
            ValueError: a gate with a ``window``, whose state is the window itself.
        """
        if self.window is not None:
            raise ValueError("step: a gate with a window has no such state; use forward")
        weights = log_weights.to(torch.float64) + self.power * log_probs
        total = torch.logsumexp(weights, dim=-1, keepdim=True)
        posterior = torch.where(total == -torch.inf, self.log_prior, weights - total)
        if self.share == 0.0:
            return posterior
        shared = self.log_prior + math.log(self.share)
        return torch.logaddexp(posterior + math.log1p(-self.share), shared)

    def weights(
        self,
        log_weights: Tensor,  # [..., K]
    ) -> Tensor:  # [..., K]
        """Return the weights in force in a state of :meth:`step`: its ``top_k``, renormalised."""
        if self.top_k is None or self.top_k == len(self.log_prior):
            return log_weights
        values, kept = log_weights.topk(self.top_k, dim=-1)
        dropped = torch.full_like(log_weights, -torch.inf)
        return dropped.scatter(-1, kept, torch.log_softmax(values, dim=-1))

    def regret_bound(self, tokens: int) -> Tensor:  # [K]
        """Return the most nats by which any document of ``tokens`` can regret each expert.

            -log w_k - (T - 1) log(1 - alpha)

        Raises:
            ValueError: ``power``, ``window`` or ``top_k`` is set, which leaves no bound.
        """
        if self.power != 1.0 or self.window is not None or self.top_k is not None:
            raise ValueError("regret_bound: holds for Bayes and fixed-share gates alone")
        return -self.log_prior - max(0, tokens - 1) * math.log1p(-self.share)

    def _sums(
        self,
        log_probs: Tensor,  # [N, K]
        starts: Tensor,  # bool [N]
    ) -> Tensor:  # [N, K]
        """Return the states before all tokens from sums of evidence, all at once."""
        while True:
            evidence = (
                evidence_before(self.power * log_probs, starts)
                if self.window is None
                else evidence_in_window(self.power * log_probs, starts, self.window)
            )
            states = self.log_prior + evidence  # [N, K]
            impossible = states.amax(dim=-1) == -torch.inf  # [N]
            if not bool(impossible.any()):
                return torch.log_softmax(states, dim=-1)
            follows = torch.nn.functional.pad(impossible[:-1], (1, 0))
            starts = starts | (impossible & ~follows)  # start again from the prior

    def _recursion(
        self,
        log_probs: Tensor,  # [N, K]
        starts: Tensor,  # bool [N]
        real: Tensor | None,  # bool [N, 1]
    ) -> Tensor:  # [N, K]
        """Return the states before all tokens by :meth:`step`, all documents abreast."""
        first = starts.nonzero().flatten()  # [n]
        lengths = torch.diff(first, append=first.new_tensor([len(starts)]))  # [n]
        order = lengths.argsort(descending=True)
        first, lengths = first[order], lengths[order]
        state = self.log_prior.expand(len(first), -1)
        rows, states = [], []
        for position in range(int(lengths[0]) if len(lengths) else 0):
            row = first[: int((lengths > position).sum())] + position  # documents still going
            state = state[: len(row)]
            rows.append(row)
            states.append(state)
            after = self.step(state, log_probs[row])
            state = after if real is None else torch.where(real[row], after, state)
        if not rows:
            return log_probs
        return torch.empty_like(log_probs).index_copy(0, torch.cat(rows), torch.cat(states))

    def _check(self, log_probs: Tensor, mask: Tensor | None) -> None:
        experts = len(self.log_prior)
        if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
            kind = log_probs.dtype if isinstance(log_probs, Tensor) else type(log_probs).__name__
            raise TypeError(f"log_probs: expected a floating point tensor, got {kind}")
        if log_probs.dim() < 2 or log_probs.shape[-1] != experts:
            raise ValueError(
                f"log_probs: expected shape [..., T, {experts}], got {tuple(log_probs.shape)}"
            )
        if mask is not None and mask.shape != log_probs.shape[:-1]:
            raise ValueError(
                f"mask: expected shape {tuple(log_probs.shape[:-1])}, got {tuple(mask.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BayesGate:
        log_prior = self.log_prior
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.log_prior = log_prior.to(self.log_prior.device)  # moved, never rounded
        return self
