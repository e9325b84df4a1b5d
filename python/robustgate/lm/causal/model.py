"""K frozen experts and a causal gate as one ``PreTrainedModel``."""
# Ignored no-untyped-call: transformers leaves these functions and class hooks unannotated.

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)

from robustgate.lm.causal import checks, files
from robustgate.lm.causal.cache import GateLayer, ModularCache, expert_cache
from robustgate.lm.causal.config import ModularConfig, ModularOutput, new_expert
from robustgate.lm.causal.gate import track
from robustgate.lm.causal.reader import Reader
from robustgate.lm.causal.tokens import NewTokens, chunks
from robustgate.lm.causal.weights import Weigher
from robustgate.lm.gates import Gate, GateSpec
from robustgate.lm.modular import ModularModel
from robustgate.ops.mixture_log_softmax import mixture_log_softmax
from robustgate.ops.mixture_nll import mixture_nll

CHUNK_LOGITS: Final = 2**26
"""How many logits of all experts ``forward`` holds at once before it cuts the tokens: 256 MiB."""


class ModularForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """K frozen experts and a causal gate: a causal language model with all that transformers does.

        logits[b, t] = log sum_k w_k(x_<=t) p_k(. | x_<=t)

    The weights are the gate's after the tokens so far. A document starts with BOS: every real
    token after the first counts for the gate, padding counts for nothing. As the logits are
    normalised, temperature, top-p and beams act on the mixture.

    Make one with :meth:`from_modular` or :meth:`from_pretrained`.

    Args:
        config: of all parts.
        experts: K causal language models; with random weights of ``config`` if left out.
        gate: the gate; with the uniform prior if left out.

    Raises:
        ValueError: a gate that cannot generate, or an expert that keeps no keys and values.

    Example:
        >>> model = ModularForCausalLM.from_modular("modular")                  # doctest: +SKIP
        >>> ids = tokenizer("def main(", return_tensors="pt").input_ids         # doctest: +SKIP
        >>> tokenizer.decode(model.generate(ids, max_new_tokens=20)[0])         # doctest: +SKIP
    """

    config_class = ModularConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: ModularConfig,
        experts: Sequence[PreTrainedModel] | None = None,
        gate: Gate | None = None,
    ) -> None:
        """Put the parts together."""
        super().__init__(config)
        self.spec = GateSpec.from_json(config.gate)
        if experts is None:
            experts = [new_expert(entry) for entry in config.experts]
        if gate is None:
            size = len(experts)
            with torch.device("cpu"):  # transformers makes models without memory to fill them later
                gate = self.spec.build(torch.full((size,), 1 / size, dtype=torch.float64))
        self.experts = nn.ModuleList(experts)
        self.gate = gate
        self._weigher = Weigher(gate, self.spec.features, config.vocab_size)
        self._reader = Reader(experts, config.names, hidden=self.spec.features.hidden > 0)
        self.keep_experts(config.top_k_experts)
        self.chunk_logits = CHUNK_LOGITS
        self._columns = sum(expert.config.get_text_config().vocab_size for expert in experts)
        self.post_init()  # type: ignore[no-untyped-call]
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def from_modular(
        cls,
        model: ModularModel | str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        top_k: int | None = None,
    ) -> ModularForCausalLM:
        """Load the experts and the gate of a modular model.

        Args:
            model: a modular model or its folder.
            dtype: of the experts; that of each checkpoint if left out.
            device: where to put everything; the CPU if left out.
            top_k: how many experts ``generate`` keeps after the prompt; all if left out.

        Returns:
            The model, frozen, in evaluation mode.

        Raises:
            FileNotFoundError: the folder or a checkpoint is missing.
            ValueError: a checkpoint has changed since the fit, or the gate cannot generate.
        """
        modular = model if isinstance(model, ModularModel) else ModularModel.load(model)
        track(modular.gate())  # refuse before the experts are loaded
        opened = modular.open_experts()
        experts = [opened.load(name, device=device, dtype=dtype) for name in modular.names]
        config = files.describe(modular, opened, experts, dtype=dtype, top_k=top_k)
        return _place(cls(config, experts, modular.gate()), device)

    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, T]
        attention_mask: Tensor | None = None,  # [B, n + T]
        position_ids: Tensor | None = None,  # [B, T]
        past_key_values: ModularCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # [B, T]
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> ModularOutput:
        """Return the mixture's next-token log-probabilities after each of T new tokens.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: 1 for real tokens, of all n + T tokens, those in the cache included;
                all are real if it is left out.
            position_ids: int64 ``[B, T]``; if left out, real tokens are counted from 0.
            past_key_values: the n tokens before, from an earlier call or :meth:`make_cache`.
            inputs_embeds: refused: every expert has embeddings of its own.
            labels: int64 ``[B, T]``, -100 to leave one out; predicted from the tokens before it.
            use_cache: return a cache; ``config.use_cache`` if left out.
            logits_to_keep: how many of the last rows to return, or which; 0 for all.
            num_items_in_batch: divide the loss by this instead of the number of labels.

        Returns:
            Loss, logits, cache and gate weights.

        Raises:
            ValueError: an argument that has no meaning here, or of a wrong shape.
        """
        ids = checks.token_ids(input_ids, inputs_embeds, kwargs)
        cache = checks.cache(past_key_values) or self.make_cache()
        keep_cache = self.config.use_cache if use_cache is None else use_cache
        past, tokens = cache.get_seq_length(), ids.shape[1]
        new = NewTokens.of(cache.gate, ids, attention_mask, position_ids)
        checks.context(self.config.max_position_embeddings, past, new)
        cache.gate.append(ids=new.ids, real=new.real, positions=new.positions)
        wanted = checks.wanted_rows(logits_to_keep, tokens, ids.device)
        targets = None if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        ends = chunks(cache.gate, new, past, self.chunk_logits // self._columns)
        store = keep_cache or past > 0 or len(ends) > 1
        logits, weights, loss = [], [], ids.new_zeros((), dtype=torch.float32)
        for start, end in zip([0, *ends], ends, strict=False):
            reading = self._reader(cache, past + end, store=store, padded=new.padded)
            log_weights = self._weigher(cache, new.slice(start, end), reading)  # [B, m, K]
            experts = [values[:, start - end :] for values in reading.logits]
            active = log_weights[..., list(reading.active)]
            if targets is not None:
                part = targets[:, start:end].contiguous()
                loss = loss + mixture_nll(
                    experts, active, part, reduction="sum", vocab_size=self.config.vocab_size
                )
            rows = wanted[(wanted >= start) & (wanted < end)] - start
            if len(rows) < end - start:
                experts, active = [values[:, rows] for values in experts], active[:, rows]
                log_weights = log_weights[:, rows]
            logits.append(mixture_log_softmax(experts, active, vocab_size=self.config.vocab_size))
            weights.append(log_weights)
        if targets is not None:
            count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss / torch.as_tensor(count, device=loss.device).clamp(min=1)
        return ModularOutput(
            loss=None if targets is None else loss,
            logits=torch.cat(logits, dim=1).float(),
            past_key_values=cache if keep_cache else None,
            gate_log_weights=torch.cat(weights, dim=1),
        )

    def make_cache(
        self, *, top_k_experts: int | None = None, prompt_length: int = 0
    ) -> ModularCache:
        """Return an empty cache for :meth:`forward` and ``generate``.

        Args:
            top_k_experts: how many experts go on after the prompt; all if left out.
            prompt_length: tokens of the prompt, padding included; needed with ``top_k_experts``.

        Raises:
            ValueError: ``top_k_experts`` is out of range, or the gate is no Bayes gate.
        """
        if top_k_experts is not None:
            checks.kept_experts(top_k_experts, len(self.experts), self._weigher.track)
        caches = [expert_cache(expert.config) for expert in self._reader.experts]
        return ModularCache(caches, GateLayer(top_k_experts, prompt_length))

    def generate(
        self,
        inputs: Tensor | None = None,  # [B, T]
        *args: Any,
        top_k_experts: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate from the mixture: ``GenerationMixin.generate`` with one argument more.

        Args:
            inputs: the prompts, int64 ``[B, T]``, starting with BOS, padded on the left.
            top_k_experts: after the prompt only the experts with the k largest posterior weights
                go on, renormalised; the others are not run any more. ``config.top_k_experts`` if
                left out.

        Raises:
            ValueError: a cache or an input that K experts cannot share.
        """
        checks.no_embeddings(kwargs.get("inputs_embeds"))
        checks.cache_implementation(kwargs.get("cache_implementation"))
        count = self.config.top_k_experts if top_k_experts is None else top_k_experts
        if count is not None and kwargs.get("past_key_values") is None:
            if kwargs.get("use_cache") is False:
                raise ValueError("top_k_experts: needs a cache; leave out use_cache=False")
            prompt = kwargs.get("input_ids") if inputs is None else inputs
            length = 1 if prompt is None else prompt.shape[1]  # without a prompt, BOS alone
            kwargs["past_key_values"] = self.make_cache(top_k_experts=count, prompt_length=length)
        # transformers annotates the decorated method's self with a class of its own.
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def keep_experts(self, count: int | None) -> None:
        """Say how many experts ``generate`` keeps after a prompt; None leaves it as it is.

        Raises:
            ValueError: the number is out of range, or the gate is no Bayes gate.
        """
        if count is not None:
            checks.kept_experts(count, len(self.experts), self._weigher.track)
            self.config.top_k_experts = count

    def train(self, mode: bool = True) -> ModularForCausalLM:
        """Set the mode of the gate; the experts are frozen and stay in evaluation mode."""
        super().train(mode)
        self.experts.eval()
        return self

    # The parents' further arguments (shards, hubs, quantisation) have no meaning for experts that
    # stay where they are: these two name their own and take the rest as keywords.
    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, bundle: bool = False, **kwargs: Any
    ) -> None:
        """Write configuration, gate and tokenizer, and refer to the experts or copy them.

        Args:
            save_directory: the folder, made if needed.
            bundle: copy the experts' checkpoints into the folder, so that it can be moved.
            kwargs: of ``PreTrainedModel.save_pretrained``; of no effect.

        Raises:
            ValueError: an expert has no checkpoint to refer to, or it has changed.
        """
        files.save(self, Path(save_directory), bundle=bundle)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        config: ModularConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> ModularForCausalLM:
        """Load a folder that :meth:`save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: the folder.
            config: its configuration, read if left out.
            dtype: of the experts; what they had when saved if left out.
            device_map: one device for everything, or ``"auto"``.
            args, kwargs: of ``PreTrainedModel.from_pretrained``; of no effect.

        Raises:
            FileNotFoundError: the folder, the gate or an expert is missing.
            ValueError: an expert or its tokenizer is another one than when it was saved.
        """
        given = kwargs.get("torch_dtype") if dtype is None else dtype
        wanted = None if given in (None, "auto") else given
        if isinstance(wanted, str):
            wanted = getattr(torch, wanted)
        parts = files.load(Path(pretrained_model_name_or_path), config, wanted)
        model = cls(*parts)
        file = Path(pretrained_model_name_or_path) / "generation_config.json"
        if file.is_file():
            model.generation_config = GenerationConfig.from_pretrained(file.parent)
        model.name_or_path = str(pretrained_model_name_or_path)
        return _place(model, files.device_of(device_map))

    # A private method whose further arguments change between releases, and are not needed.
    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        checks.cache_implementation(generation_config.cache_implementation)
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
            return
        if generation_config.use_cache is False:
            return
        model_kwargs["past_key_values"] = self.make_cache()
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave everything as it is: experts and gate come with their weights."""


def _place(model: Any, device: torch.device | str | None) -> ModularForCausalLM:
    moved: ModularForCausalLM = model if device is None else model.to(device)
    return moved
