"""What a gate is trained on: documents with the log-probabilities of the experts.

Both kinds answer the same two questions, the loss of a gate and that of the best expert in
hindsight, so that training does not care which kind it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustgate.game.evidence import check_offsets
from robustgate.ops.mixture_log_prob import mixture_log_prob


@dataclass(frozen=True, eq=False)
class TokenDocuments:
    """Documents of one domain, for gates that weigh the experts token by token.

    Attributes:
        log_probs: ``l_k(t) = log pi_k(x_t | x_<t)``, ``[n, T, K]`` floating point.
        mask: ``[n, T]``, boolean or 0/1, true for real tokens; None if all are.
        context: the caller's features before each token, ``[n, T, F]``, for a gate that takes them.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from robustgate.game import TokenDocuments
        >>> packed = torch.zeros(5, 2)  # two documents of 2 and 3 tokens, two experts
        >>> TokenDocuments.unpack(packed, torch.tensor([0, 2, 5])).mask.tolist()
        [[True, True, False], [True, True, True]]
    """

    log_probs: Tensor
    mask: Tensor | None = None
    context: Tensor | None = None

    def __post_init__(self) -> None:
        """Compare the shapes."""
        if self.log_probs.dim() != 3:
            raise ValueError(
                f"log_probs: expected shape [n, T, K], got {tuple(self.log_probs.shape)}"
            )
        rows = self.log_probs.shape[:2]
        if self.mask is not None and self.mask.shape != rows:
            raise ValueError(f"mask: expected shape {tuple(rows)}, got {tuple(self.mask.shape)}")
        if self.context is not None and self.context.shape[:2] != rows:
            raise ValueError(
                f"context: expected shape {(*rows, 'F')}, got {tuple(self.context.shape)}"
            )

    @classmethod
    def unpack(
        cls,
        log_probs: Tensor,  # [N, K]
        offsets: Tensor,  # [n + 1]
    ) -> TokenDocuments:
        """Make a padded batch of packed documents ``log_probs[offsets[i] : offsets[i + 1]]``.

        Raises:
            ValueError: offsets that do not run from 0 to N.
        """
        check_offsets(offsets, len(log_probs))
        lengths = offsets.diff()  # [n]
        longest = int(lengths.amax()) if len(lengths) else 0
        mask = torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)
        mask = mask.to(log_probs.device)
        padded = log_probs.new_zeros(*mask.shape, log_probs.shape[1])
        padded[mask] = log_probs
        return cls(padded, mask)

    def loss(self, gate: nn.Module) -> Tensor:  # []
        """Return the mixture's mean NLL per token, differentiable in the gate."""
        options = {} if self.context is None else {"context": self.context}
        return self._mean(
            mixture_log_prob(
                self.log_probs.to(torch.float64),
                gate(self.log_probs, mask=self.mask, **options),
            )
        )

    def loss_in_hindsight(self) -> Tensor:  # []
        """Return the mean over tokens of ``-max_k l_k(t)``: no gate of any kind does better."""
        return self._mean(self.log_probs.to(torch.float64).amax(dim=-1))

    def _mean(self, log_prob: Tensor) -> Tensor:  # [n, T] -> []
        if self.mask is None:
            return -log_prob.mean()
        real = self.mask.bool()
        return -log_prob.masked_fill(~real, 0.0).sum() / real.sum()


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents of one domain, or drawn from one expert, for gates of whole documents.

    Attributes:
        inputs: what the gate reads, ``[n, ...]``: features, or token ids.
        log_probs: ``L_k(x) = log pi_k(x)``, ``[n, K]`` floating point.
        weights: None for a sample, in which every document counts alike; or probabilities ``[n]``
            of documents that enumerate a finite space, for exact expectations.
        tokens: the same documents token by token, where distillation needs them.

    Raises:
        ValueError: shapes that do not fit, or weights that are no probabilities.

    Example:
        >>> import torch
        >>> from robustgate.game import ConstantGate, Documents
        >>> documents = Documents(torch.zeros(1, 4), torch.tensor([[0.2, 0.6]]).log())
        >>> gate = ConstantGate(torch.tensor([0.5, 0.5]))
        >>> round(float(documents.loss(gate).exp()), 3)  # 1 / .4
        2.5
    """

    inputs: Tensor
    log_probs: Tensor
    weights: Tensor | None = None
    tokens: TokenDocuments | None = None

    def __post_init__(self) -> None:
        """Compare the shapes; check the weights."""
        if self.log_probs.dim() != 2:
            raise ValueError(f"log_probs: expected shape [n, K], got {tuple(self.log_probs.shape)}")
        count = len(self.log_probs)
        if self.inputs.dim() < 2 or len(self.inputs) != count:
            raise ValueError(f"inputs: expected [{count}, ...], got {tuple(self.inputs.shape)}")
        if self.weights is not None and self.weights.shape != (count,):
            raise ValueError(f"weights: expected [{count}], got {tuple(self.weights.shape)}")
        if self.weights is not None:
            total = float(self.weights.double().sum())  # of float32 weights, to about 1e-6
            if not bool((self.weights >= 0).all()) or abs(total - 1.0) > 1e-5:
                raise ValueError(
                    f"weights: expected non-negative numbers that sum to 1, got the sum {total} "
                    f"with {int((self.weights < 0).sum())} below 0"
                )
        if self.tokens is not None and len(self.tokens.log_probs) != count:
            raise ValueError(f"tokens: expected {count}, got {len(self.tokens.log_probs)}")

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.log_probs)

    def __getitem__(self, rows: Tensor) -> Documents:
        """Return the documents at an index tensor; with their tokens, without weights."""
        tokens = self.tokens
        if tokens is not None:
            tokens = TokenDocuments(
                tokens.log_probs[rows],
                None if tokens.mask is None else tokens.mask[rows],
                None if tokens.context is None else tokens.context[rows],
            )
        return Documents(self.inputs[rows], self.log_probs[rows], tokens=tokens)

    def log_prob(self, gate: nn.Module) -> Tensor:  # [n]
        """Return ``log pi_g(x) = log sum_k g(x, k) pi_k(x)``, float64, differentiable."""
        return mixture_log_prob(self.log_probs.to(torch.float64), gate(self.inputs))

    def loss(self, gate: nn.Module) -> Tensor:  # []
        """Return the mean of ``-log pi_g(x)`` per document, differentiable in the gate."""
        return -self.mean(self.log_prob(gate))

    def loss_in_hindsight(self) -> Tensor:  # []
        """Return the mean of ``-max_k L_k(x)``: no gate of whole documents does better."""
        return -self.mean(self.log_probs.to(torch.float64).amax(dim=-1))

    def ratio(self, gate: nn.Module) -> Tensor:  # [n]
        """Return ``pi_g(x) / q(x)``, ``q = mean_k pi_k``: at most K; differentiable."""
        log_probs = self.log_probs.to(torch.float64)
        log_q = mixture_log_prob(log_probs, torch.zeros_like(log_probs[0]))
        difference = self.log_prob(gate) - log_q.clamp(min=torch.finfo(torch.float64).min)
        return difference.exp()

    def mean(self, values: Tensor) -> Tensor:  # [n] -> []
        """Return the expectation of ``values``; a document of weight 0 counts for nothing."""
        if self.weights is None:
            return values.mean()
        kept = self.weights > 0  # -inf times 0 is NaN
        return self.weights.to(values.dtype) @ torch.where(kept, values, 0.0)


def concatenate(parts: list[Documents]) -> Documents:
    """Return all documents in one; their tokens too, padded to the longest, if all have them."""
    tokens = [part.tokens for part in parts if part.tokens is not None]
    return Documents(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.log_probs for part in parts]),
        tokens=_concatenate_tokens(tokens) if len(tokens) == len(parts) else None,
    )


def _concatenate_tokens(parts: list[TokenDocuments]) -> TokenDocuments:
    longest = max(part.log_probs.shape[1] for part in parts)
    log_probs, masks, contexts = [], [], []
    for part in parts:
        behind = longest - part.log_probs.shape[1]
        mask = torch.ones_like(part.log_probs[..., 0]) if part.mask is None else part.mask
        log_probs.append(nn.functional.pad(part.log_probs, (0, 0, 0, behind)))
        masks.append(nn.functional.pad(mask.bool(), (0, behind)))
        if part.context is not None:
            contexts.append(nn.functional.pad(part.context, (0, 0, 0, behind)))
    context = torch.cat(contexts) if len(contexts) == len(parts) else None
    return TokenDocuments(torch.cat(log_probs), torch.cat(masks), context)
