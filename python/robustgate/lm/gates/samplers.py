"""Documents drawn from experts, and scored by all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from robustgate.game import Documents, TokenDocuments
from robustgate.game.sample import Sampler
from robustgate.lm.experts import ExpertSet
from robustgate.lm.gates.spec import document_features
from robustgate.lm.progress import ProgressBar
from robustgate.lm.tokenizer import special_ids
from robustgate.ops.expert_log_prob import expert_log_prob

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DOCUMENTS: Final = 256  # drawn together
_LOGITS: Final = 1 << 25  # in memory at once, in scoring


class ExpertSamplers:
    """Samplers of all experts of a set, over documents cut at ``span`` tokens.

    A document is drawn token by token, starts behind the BOS and ends with the EOS or, without one,
    after ``span`` tokens. What expert k says of it, ``L_k(x) = sum_t l_k(t)``, is a distribution
    over such documents, and so is every normalised mixture.

    All experts are in memory, on one device.

    Args:
        experts: the experts.
        span: tokens of a document at most, the EOS among them.

    Raises:
        ValueError: ``span`` below 1 or beyond what some expert can read.
    """

    def __init__(self, experts: ExpertSet, span: int) -> None:
        """Load the experts."""
        if not 1 <= span <= experts.context:
            raise ValueError(
                f"span: expected 1 to {experts.context}, the experts' context, got {span}"
            )
        self.span = span
        self._bos, self._eos = special_ids(experts.tokenizer)
        self._vocab_size = experts.vocab_size
        self._models = [experts.load(name) for name in experts.names]

    def samplers(self) -> list[Sampler]:  # K
        """Return one sampler for each expert, as ``robustgate.game.sample`` takes them.

        The documents they draw have ``document_features`` as inputs, ``[n, F]``, and ``tokens``.
        """
        return [self._sampler(k) for k in range(len(self._models))]

    def _sampler(self, expert: int) -> Sampler:
        def draw(count: int, generator: torch.Generator) -> Documents:
            sizes = [min(_DOCUMENTS, count - first) for first in range(0, count, _DOCUMENTS)]
            ids = [self._draw(self._models[expert], size, generator) for size in sizes]
            return self.documents(torch.cat(ids))

        return draw

    def documents(
        self,
        ids: Tensor,  # int64 [n, T]
    ) -> Documents:
        """Score documents with every expert.

        Args:
            ids: tokens behind the BOS, EOS included, and -1 behind the end, ``[n, T]``.
        """
        real = ids >= 0  # [n, T]
        inputs = torch.cat([torch.full_like(ids[:, :1], self._bos), ids[:, :-1].clamp(min=0)], 1)
        size = max(1, _LOGITS // (ids.shape[1] * self._vocab_size))
        parts = [
            torch.cat([self._score(model, *pair) for pair in self._split(inputs, ids, size)])
            for model in self._models
        ]
        log_probs = torch.stack(parts, dim=-1)  # [n, T, K]; 0 where not real
        features = document_features(log_probs, real, self.span)
        tokens = TokenDocuments(log_probs, real)
        return Documents(features, log_probs.double().sum(dim=1), tokens=tokens)

    @staticmethod
    def _split(inputs: Tensor, ids: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(inputs.split(size), ids.split(size), strict=True))

    @torch.no_grad()
    def _score(
        self,
        model: PreTrainedModel,
        inputs: Tensor,  # int64 [n, T]
        ids: Tensor,  # int64 [n, T]
    ) -> Tensor:  # [n, T]
        logits = model(input_ids=inputs.to(model.device), use_cache=False).logits  # [n, T, >= V]
        target = ids.masked_fill(ids < 0, -100).to(model.device)
        value = expert_log_prob([logits], target, vocab_size=self._vocab_size)  # [n, T, 1]
        return value[..., 0].float().cpu()

    @torch.no_grad()
    def _draw(
        self, model: PreTrainedModel, count: int, generator: torch.Generator
    ) -> Tensor:  # int64 [count, span]
        """Draw documents token by token; -1 behind the end."""
        out = torch.full((count, self.span), -1)
        last = torch.full((count, 1), self._bos)
        going = torch.ones(count, dtype=torch.bool)
        cache = None
        for place in range(self.span):
            found = model(input_ids=last.to(model.device), past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            probs = found.logits[:, -1, : self._vocab_size].float().softmax(dim=-1).cpu()
            last = _choose(probs, generator)
            out[going, place] = last[going, 0]
            going = going & (last[:, 0] != self._eos)
            if not bool(going.any()):
                break
        return out


def _choose(
    probs: Tensor,  # [n, V]
    generator: torch.Generator,
) -> Tensor:  # int64 [n, 1]
    """Draw one column of each row by inversion: one random number a row, not one a column."""
    sums = probs.cumsum(dim=-1, dtype=torch.float64)  # [n, V]
    place = torch.rand(len(probs), 1, generator=generator, dtype=torch.float64) * sums[:, -1:]
    return torch.searchsorted(sums, place, right=True).clamp(max=probs.shape[-1] - 1)


def counted(samplers: Sequence[Sampler], bar: ProgressBar) -> list[Sampler]:
    """Return samplers that advance a bar by the documents they draw."""

    def count(sampler: Sampler) -> Sampler:
        def draw(documents: int, generator: torch.Generator) -> Documents:
            drawn = sampler(documents, generator)
            bar.advance(documents)
            return drawn

        return draw

    return [count(sampler) for sampler in samplers]
