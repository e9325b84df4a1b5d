"""Gates: modules that turn what the experts said so far into weights for what comes next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from robustgate.game.certificate import check_distribution
from robustgate.ops.mixture_log_prob import mixture_log_prob

_CHUNK: Final = 16  # tokens summed one after the other; chunks are then joined by doubling


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

    Raises:
        TypeError: ``prior`` is not a tensor.
        ValueError: ``prior`` is not a distribution ``[K]``.

    Example:
        >>> import torch
        >>> from robustgate.game import BayesGate
        >>> gate = BayesGate(torch.tensor([0.5, 0.5]))
        >>> token_probs = torch.tensor([[0.9, 0.1], [0.8, 0.4]])  # two tokens, two experts
        >>> gate(token_probs.log()).exp()[1]
        tensor([0.9000, 0.1000], dtype=torch.float64)
        >>> round(float(gate.log_prob(token_probs.log()).sum().exp()), 4)  # (.9 * .8 + .1 * .4) / 2
        0.38

    Source: docs/theory.md, "The Bayes gate".
    """

    log_prior: Tensor

    def __init__(
        self,
        prior: Tensor,  # [K]
    ) -> None:
        """Keep ``log prior`` as a float64 buffer."""
        super().__init__()
        size = prior.numel() if isinstance(prior, Tensor) else 0
        self.register_buffer("log_prior", check_distribution("prior", prior, size).log())

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
            mask: boolean or 0/1, true for real tokens; the others, anywhere, count for nothing.

        Returns:
            ``[..., T, K]`` float64.

        Raises:
            TypeError: ``log_probs`` is not floating point.
            ValueError: shapes that do not fit, or offsets that do not run from 0 to T.
        """
        self._check(log_probs, mask)
        experts = len(self.log_prior)
        evidence = log_probs.to(torch.float64)
        if mask is not None:
            evidence = evidence.masked_fill(~mask.bool().unsqueeze(-1), 0.0)
        flat = evidence.reshape(-1, experts)  # [N, K]; N = all tokens of all rows
        starts = _document_starts(log_probs, offsets)  # [N]
        while True:
            weights = self.log_prior + _evidence_before(flat, starts)  # [N, K]
            impossible = weights.amax(dim=-1) == -torch.inf  # [N]
            if not bool(impossible.any()):
                break
            follows = torch.nn.functional.pad(impossible[:-1], (1, 0))
            starts = starts | (impossible & ~follows)  # start again from the prior
        return torch.log_softmax(weights, dim=-1).reshape(log_probs.shape)

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
            ``[..., T]`` float64. Over a document they sum to ``log sum_k w_k e^{L_k}``.
        """
        weights = self(log_probs, offsets=offsets, mask=mask)
        out = mixture_log_prob(log_probs.to(torch.float64), weights)
        return out if mask is None else out.masked_fill(~mask.bool(), 0.0)

    def step(
        self,
        log_weights: Tensor,  # [..., K]
        log_probs: Tensor,  # [..., K]
    ) -> Tensor:  # [..., K]
        """Return the log-weights after one more token: the decoding form of :meth:`forward`.

        The state is the log-weights themselves; decoding starts from ``gate.log_prior``.

        Args:
            log_weights: normalised, in force before the token, ``[..., K]``.
            log_probs: ``l_k`` of the token, ``[..., K]``; 0 for every expert leaves a row as it is.

        Returns:
            ``[..., K]`` float64, normalised.
        """
        weights = log_weights.to(torch.float64) + log_probs
        total = torch.logsumexp(weights, dim=-1, keepdim=True)
        return torch.where(total == -torch.inf, self.log_prior, weights - total)

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


def _document_starts(log_probs: Tensor, offsets: Tensor | None) -> Tensor:  # bool [N]
    """Mark the first token of every document among all N tokens."""
    tokens = log_probs.shape[:-1].numel()
    starts = torch.zeros(tokens, dtype=torch.bool, device=log_probs.device)
    if offsets is None:
        starts[:: max(1, log_probs.shape[-2])] = True
        return starts
    offsets = offsets.to(log_probs.device)
    if log_probs.dim() != 2:
        raise ValueError(
            f"log_probs: expected shape [T, K] with offsets, got {tuple(log_probs.shape)}"
        )
    if (
        offsets.dim() != 1
        or len(offsets) == 0
        or int(offsets[0]) != 0
        or int(offsets[-1]) != tokens
        or bool((offsets[1:] < offsets[:-1]).any())
    ):
        raise ValueError(
            f"offsets: expected [n + 1] non-decreasing from 0 to {tokens}, "
            f"got {tuple(offsets.shape)} with ends {offsets[:1].tolist()} and "
            f"{offsets[-1:].tolist()}"
        )
    first = offsets[:-1]
    starts[first[first < tokens]] = True  # an empty document at the end starts nowhere
    return starts


def _centred(log_values: Tensor) -> Tensor:  # [N, K]
    """Subtract each row's largest entry; a row of -inf stays -inf."""
    top = log_values.amax(dim=1, keepdim=True)
    return log_values - top.clamp(min=torch.finfo(log_values.dtype).min)  # -inf - -inf is NaN


def _position(starts: Tensor) -> Tensor:  # bool [N] -> int64 [N]
    """Return each entry's distance from the last start at or before it."""
    index = torch.arange(len(starts), device=starts.device)
    return index - torch.where(starts, index, 0).cummax(dim=0).values


def _evidence_before(
    log_probs: Tensor,  # [N, K]
    starts: Tensor,  # bool [N]
) -> Tensor:  # [N, K]
    """Return ``sum_{s<t} l_k(s)`` within each document, up to a constant shared by the experts.

    Documents are cut in chunks. Sums run token by token inside a chunk, and the chunks' totals are
    joined by doubling. Everything is centred on the best expert, so that numbers keep the size of
    the log-odds, not of the document's log-probability: that holds the error near 1e-13 however
    long the document. The additions behind a token's sum depend on its position in its own
    document alone, so results are bitwise the same alone, in a batch or packed.
    """
    experts = log_probs.shape[1]
    position = _position(starts)  # [N]
    opens = position % _CHUNK == 0  # the first token of each of M chunks
    chunk = opens.cumsum(dim=0) - 1  # [N]
    slot = chunk * _CHUNK + position % _CHUNK  # [N], the token's row in the padded layout
    chunks = int(opens.sum())
    padded = log_probs.new_zeros(chunks * _CHUNK, experts).index_copy(0, slot, _centred(log_probs))
    sums = padded.view(chunks, _CHUNK, experts).cumsum(dim=1)  # [M, chunk, K]
    carried = _totals_before(sums[:, -1], starts[opens]).unsqueeze(1)  # [M, 1, K]
    before = torch.cat([carried, carried + sums[:, :-1]], dim=1)  # [M, chunk, K]
    return before.view(-1, experts).index_select(0, slot)


def _totals_before(
    totals: Tensor,  # [M, K]
    starts: Tensor,  # bool [M]
) -> Tensor:  # [M, K]
    """Return the sum of all earlier rows of the same document, up to a constant per row.

    By doubling: after round r a row holds the sum over the 2^r rows before it.
    """
    position = _position(starts)  # [M]
    longest = int(position.amax()) if len(starts) else 0
    before = torch.nn.functional.pad(totals[:-1], (0, 0, 1, 0))
    before = before.masked_fill(starts.unsqueeze(1), 0.0)
    shift = 1
    while shift <= longest:
        before = _centred(before)
        inside = (position[shift:] >= shift).unsqueeze(1)
        earlier = torch.where(inside, before[:-shift], 0.0)
        before = torch.cat([before[:shift], before[shift:] + earlier])
        shift *= 2
    return _centred(before)  # also where a longer neighbour asked for more rounds
