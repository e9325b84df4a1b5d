"""Open a modular model for use, whatever wrote its folder, and prompt it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robustgate.lm.causal import ModularForCausalLM
from robustgate.lm.causal.cache import ModularCache
from robustgate.lm.causal.reader import one_dtype
from robustgate.lm.tokenizer import load_tokenizer, special_ids
from robustgate.ops.expert_log_prob import expert_log_prob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def open_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    top_k: int | None = None,
) -> tuple[ModularForCausalLM, PreTrainedTokenizerFast]:
    """Load a model and its tokenizer.

    Args:
        path: folder that ``robustgate fit`` or ``ModularForCausalLM.save_pretrained`` wrote.
        dtype: of the experts; as they were saved if left out.
        device: where to put everything; the CPU if left out.
        top_k: how many experts go on after a prompt; as the folder says if left out.

    Returns:
        The model and the experts' tokenizer.

    Raises:
        FileNotFoundError: the folder or a part of it is missing.
        ValueError: parts that do not belong together, or a gate that cannot generate.
    """
    folder = Path(path)
    if (folder / "manifest.json").is_file():
        model = ModularForCausalLM.from_modular(folder, dtype=dtype, device=device, top_k=top_k)
    else:
        model = ModularForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device)
        model.keep_experts(top_k)
    return model, load_tokenizer(model.config.experts[0]["path"])


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, text: str, *, most: int | None = None
) -> list[int]:
    """Return a prompt as the experts know documents: BOS, then the text.

    Args:
        tokenizer: the experts'.
        text: may begin with the tokenizer's BOS token.
        most: the most tokens to return; those at the beginning of the text are left out, BOS stays.
    """
    bos, _ = special_ids(tokenizer)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    tokens = tokens[1:] if tokens[:1] == [bos] else tokens
    if most is not None and len(tokens) >= most:
        tokens = tokens[len(tokens) - most + 1 :]
    return [bos, *tokens]


def pad_prompts(
    prompts: list[list[int]], pad_token_id: int
) -> tuple[Tensor, Tensor]:  # int64 [B, T] twice
    """Return prompts padded on the left, and their attention mask."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@dataclass(frozen=True)
class NewToken:
    """A token that was generated.

    Attributes:
        id: its number.
        text: what it added to the text; empty while a character is not complete.
        expert: the one that most of its probability came from.
        shares: of each expert in its probability, ``w_k p_k / sum_j w_j p_j``.
    """

    id: int
    text: str
    expert: str
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Generation:
    """A continuation of a prompt.

    Attributes:
        prompt: as it was given.
        text: the continuation, without the prompt.
        tokens: of the continuation; the last may be the one that ends documents.
        weights: of the experts before the last token.
    """

    prompt: str
    text: str
    tokens: tuple[NewToken, ...]
    weights: tuple[float, ...]


def complete(
    model: ModularForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k_experts: int | None = None,
    on_token: Callable[[NewToken], None] | None = None,
) -> Generation:
    """Continue a prompt, and say of each token which expert it came from.

    Args:
        model: the model.
        tokenizer: its experts'.
        prompt: the text before; may be empty.
        max_new_tokens: fewer are made where the experts' context or a document ends.
        temperature: of the mixture; the likeliest token each time if left out with ``top_p``.
        top_p: sample from the likeliest tokens of the mixture that have this probability together.
        top_k_experts: how many experts go on after the prompt.
        on_token: called with every token as it comes.

    Returns:
        The continuation.

    Raises:
        ValueError: an argument out of range, or a prompt that fills the experts' context.
    """
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    tokens = encode_prompt(tokenizer, prompt)
    room = model.config.max_position_embeddings + 1 - len(tokens)
    if room < 1 or max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens: expected 1 to {max(room, 0)} after a prompt of {len(tokens)} tokens, "
            f"got {max_new_tokens}"
        )
    keep = model.config.top_k_experts if top_k_experts is None else top_k_experts
    cache = model.make_cache(top_k_experts=keep, prompt_length=len(tokens))
    stream = _Stream(model, tokenizer, cache, on_token)
    sampling: dict[str, Any] = {
        "temperature": temperature or 1.0,
        "top_p": top_p or 1.0,
        "top_k": 0,
    }
    sample = temperature is not None or top_p is not None
    ids = torch.tensor([tokens], device=model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        streamer=stream,
        max_new_tokens=min(max_new_tokens, room),
        do_sample=sample,
        **(sampling if sample else {}),
    )
    text = "".join(token.text for token in stream.made)
    return Generation(prompt, text, tuple(stream.made), tuple(stream.weights))


class _Stream:
    """Receives the tokens of one document from ``generate``, the prompt first."""

    def __init__(
        self,
        model: ModularForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        cache: ModularCache,
        on_token: Callable[[NewToken], None] | None,
    ) -> None:
        self.model, self.tokenizer, self.cache, self.on_token = model, tokenizer, cache, on_token
        self.made: list[NewToken] = []
        self.weights: list[float] = []
        self._prompt: list[int] | None = None
        self._before = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt, or a token that is not in the cache yet."""
        if self._prompt is None:
            self._prompt = value.flatten().tolist()
            self._before = self._text([])
            return
        layer = self.cache.gate
        log_weights = layer.last("log_weights")
        assert layer.rows is not None
        assert log_weights is not None
        token = value.flatten()[-1:].to(self.model.device)  # [1]
        log_probs = expert_log_prob(
            one_dtype(layer.rows), token, vocab_size=self.model.config.vocab_size
        )
        shares = (log_weights + log_probs).softmax(dim=-1)[0]  # [K]
        self.weights = log_weights[0].exp().tolist()
        text = self._text([*(made.id for made in self.made), int(token)])
        added, self._before = text[len(self._before) :], text
        new = NewToken(
            int(token),
            added,
            self.model.config.names[int(shares.argmax())],
            tuple(shares.tolist()),
        )
        self.made.append(new)
        if self.on_token is not None:
            self.on_token(new)

    def end(self) -> None:
        """Do nothing more."""

    def _text(self, tokens: list[int]) -> str:
        """Return the text of prompt and tokens, up to the last complete character.

        The prompt belongs to it: on their own the tokens would lose the space that a tokenizer such
        as Llama's or Mistral's writes at the beginning of a word.
        """
        whole = self.tokenizer.decode(
            [*(self._prompt or []), *tokens],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return str(whole).rstrip("\ufffd")
