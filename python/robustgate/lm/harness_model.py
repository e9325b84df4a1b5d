"""A modular model as a model of lm-evaluation-harness."""

from __future__ import annotations

from typing import Any, Final

import torch
from lm_eval.api.registry import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    register_model,
)
from lm_eval.models.huggingface import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    HFLM,
)
from torch import Tensor

from robustgate.lm.serve import encode_prompt, open_model, pad_prompts
from robustgate.lm.tokenizer import special_ids

NAME: Final = "robustgate"


@register_model(NAME)  # type: ignore[untyped-decorator,unused-ignore]
class ModularLM(HFLM):  # type: ignore[misc,no-any-unimported,unused-ignore]
    """The mixture under its gate; every request is a document of its own, and starts with BOS.

    Args:
        pretrained: folder that ``robustgate fit`` or ``save_pretrained`` wrote.
        dtype: of the experts, such as ``"bfloat16"``; as they were saved if ``"auto"``.
        device: where to put everything; CUDA if left out, and the CPU where there is none, whatever
            lm_eval asks for.
        top_k_experts: how many experts go on after a prompt, in tasks that generate.
        batch_size: requests in a batch.
        options: further arguments of lm_eval's ``HFLM``.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        device: str | None = None,
        top_k_experts: int | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        """Open the model and its tokenizer."""
        model, tokenizer = open_model(
            pretrained,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            device=(device or "cuda") if torch.cuda.is_available() else "cpu",
            top_k=None if top_k_experts is None else int(top_k_experts),
        )
        self._bos, self._eos = special_ids(tokenizer)
        self._bare = False
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            prefix_token_id=self._bos,
            **options,
        )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._eos

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Return the tokens of a text, after BOS unless ``add_special_tokens`` is false."""
        tokens = encode_prompt(self.tokenizer, string, most=left_truncate_len)
        return tokens[1:] if add_special_tokens is False or self._bare else tokens

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return prompts padded on the left, and their attention mask."""
        most = left_truncate_len
        prompts = [encode_prompt(self.tokenizer, text, most=most) for text in strings]
        return pad_prompts(prompts, self.model.config.pad_token_id)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole documents; BOS is a condition, not an outcome.

        A document that is longer than the context is read in windows, each a document of its own.
        """
        self._bare = True  # lm_eval puts BOS before the first window itself
        try:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._bare = False
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        *args: Any,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return log-likelihoods, with BOS at the start of what is read, however much is cut."""
        whole = []
        for key, context, continuation in requests:
            room = max(0, self.max_length - len(continuation))  # besides BOS
            text = context[1:]  # what is left out is BOS, or the token before a later window
            whole.append((key, [self._bos, *text[max(0, len(text) - room) :]], continuation))
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(whole, *args, **kwargs)
        return found

    def get_model_info(self) -> dict[str, Any]:
        """Return what identifies the model in a result file: its experts, by hash."""
        experts = self.model.config.experts
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": "",
            "model_sha": {expert["name"]: expert["sha256"] for expert in experts},
        }
