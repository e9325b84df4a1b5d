"""K frozen experts and a causal gate as one ``PreTrainedModel``."""
# Ignored no-untyped-call: transformers leaves these functions and class hooks unannotated.

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)

from robustgate.lm.causal import checks, files, options
from robustgate.lm.causal.cache import GateLayer, ModularCache, expert_cache
from robustgate.lm.causal.config import ModularConfig, ModularOutput, new_expert
from robustgate.lm.causal.gate import track
from robustgate.lm.causal.reader import Reader
from robustgate.lm.causal.tokens import NewTokens, chunks
from robustgate.lm.causal.weights import Weigher
from robustgate.lm.gates.spec import Gate, GateSpec
from robustgate.lm.modular import ModularModel
from robustgate.ops.mixture_log_softmax import mixture_log_softmax
from robustgate.ops.mixture_nll import mixture_nll

_PROMPTS: Final = ("attention_mask", "input_ids")  # as long as the prompt, the cache included

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

    Attributes:
        experts, gate: may be replaced, the gate by one of the same make (``spec``); the next call
            uses them.
        loaded_experts: those the model was made of, which its checkpoints hold.

    Raises:
        ValueError: a gate that cannot generate, or an expert that cannot go on from a cache as the
            others do.

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
        self._parts: tuple[Reader, Weigher] | None = None
        self._look_up()  # refuse what cannot generate
        self.loaded_experts = tuple(experts)
        self.keep_experts(config.top_k_experts)
        self.chunk_logits = CHUNK_LOGITS
        self.post_init()  # type: ignore[no-untyped-call]
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        self.requires_grad_(False)
        self.train(False)

    def _look_up(self) -> tuple[Reader, Weigher]:
        """Return what reads the experts and what moves the gate, made anew if these are others."""
        known, experts = self._parts, list[Any](self.experts)
        if known is None or known[0].experts != experts or known[1].track.gate is not self.gate:
            features = self.spec.features
            reader = Reader(experts, self.config.names, hidden=features.hidden > 0)
            known = self._parts = reader, Weigher(self.gate, features, self.config.vocab_size)
        return known

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
        reader, weigher = self._look_up()
        ids = checks.token_ids(input_ids, inputs_embeds, kwargs)
        cache = checks.cache(past_key_values) or self.make_cache()
        keep_cache = self.config.use_cache if use_cache is None else use_cache
        past, tokens = cache.get_seq_length(), ids.shape[1]
        new = NewTokens.of(cache.gate, ids, attention_mask, position_ids)
        checks.context(self.config.max_position_embeddings, past, new)
        cache.gate.append(ids=new.ids, real=new.real, positions=new.positions)
        wanted, order = checks.wanted_rows(logits_to_keep, tokens, ids.device)
        targets = None if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        ends = chunks(cache.gate, new, past, self.chunk_logits // reader.columns)
        store = keep_cache or past > 0 or len(ends) > 1
        logits, weights, loss = [], [], ids.new_zeros((), dtype=torch.float32)
        for start, end in zip([0, *ends], ends, strict=False):
            reading = reader(cache, past + end, store=store, padded=new.padded)
            log_weights = weigher(cache, new.slice(start, end), reading)  # [B, m, K]
            experts = [values[:, start - end :] for values in reading.logits]
            active = log_weights[..., list(reading.active)]
            if targets is not None:
                part = targets[:, start:end].contiguous()
                loss = loss + mixture_nll(
                    experts, active, part, reduction="sum", vocab_size=self.config.vocab_size
                )
            kept = wanted[(wanted >= start) & (wanted < end)] - start
            if len(kept) < end - start:
                experts, active = [values[:, kept] for values in experts], active[:, kept]
                log_weights = log_weights[:, kept]
            logits.append(mixture_log_softmax(experts, active, vocab_size=self.config.vocab_size))
            weights.append(log_weights)
        if targets is not None:
            count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss / torch.as_tensor(count, device=loss.device).clamp(min=1)
        rows, row_weights = torch.cat(logits, dim=1).float(), torch.cat(weights, dim=1)
        return ModularOutput(
            loss=None if targets is None else loss,
            logits=rows if order is None else rows[:, order],
            past_key_values=cache if keep_cache else None,
            gate_log_weights=row_weights if order is None else row_weights[:, order],
        )

    def make_cache(
        self, *, top_k_experts: int | None = None, prompt_length: int = 0
    ) -> ModularCache:
        """Return an empty cache for :meth:`forward` and ``generate``.

        Args:
            top_k_experts: how many experts go on after the prompt; ``config.top_k_experts`` if
                left out.
            prompt_length: tokens of the prompt, padding included: after them the experts are
                chosen. ``generate`` says so itself; 0 leaves all in use.

        Raises:
            ValueError: ``top_k_experts`` is out of range, or the gate is no Bayes gate.
        """
        reader, weigher = self._look_up()
        count = self.config.top_k_experts if top_k_experts is None else top_k_experts
        if count is not None:
            checks.kept_experts(count, len(self.experts), weigher.track)
        caches = [expert_cache(expert.config) for expert in reader.experts]
        return ModularCache(caches, GateLayer(count, prompt_length))

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
        cache = checks.cache(kwargs.get("past_key_values"))
        if cache is None and count is not None:
            cache = kwargs["past_key_values"] = self.make_cache(top_k_experts=count)
        if cache is not None:
            checks.use_cache(cache, kwargs.get("use_cache"))
            checks.same_count(cache, top_k_experts)
            prompt = next((kwargs[n] for n in _PROMPTS if kwargs.get(n) is not None), inputs)
            length = 1 if prompt is None else prompt.shape[1]  # without a prompt, BOS alone
            cache.gate.expect_prompt(length)
        # transformers annotates the decorated method's self with a class of its own.
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def keep_experts(self, count: int | None) -> None:
        """Say how many experts ``generate`` keeps after a prompt; None leaves it as it is.

        Raises:
            ValueError: the number is out of range, or the gate is no Bayes gate.
        """
        if count is not None:
            checks.kept_experts(count, len(self.experts), self._look_up()[1].track)
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
            ValueError: an expert has no checkpoint to refer to, it has changed, or another model
                has taken its place in memory; or ``push_to_hub`` is asked for.
        """
        if kwargs.get("push_to_hub"):
            self.push_to_hub()
        files.save(self, Path(save_directory), bundle=bundle)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        """Refuse: a reference to experts on this disk is of no use elsewhere."""
        raise ValueError(
            "push_to_hub: not supported; save_pretrained(folder, bundle=True), then upload the "
            "folder with `hf upload`"
        )

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
            args, kwargs: of ``PreTrainedModel.from_pretrained``: entries of the configuration, such
                as ``top_k_experts``, and ``attn_implementation``; those about the hub have no
                effect, and others are refused.

        Raises:
            FileNotFoundError: the folder, the gate or an expert is missing.
            ValueError: an expert, its tokenizer or the gate is another one than when it was saved,
                or an argument cannot be honoured.
        """
        if args:
            raise ValueError(f"from_pretrained: expected a folder and keywords, got {args} besides")
        folder = Path(pretrained_model_name_or_path, kwargs.pop("subfolder", None) or "")
        old_name = kwargs.pop("torch_dtype", None)
        wanted = options.dtype_of(old_name if dtype is None else dtype)
        config, attention = options.overridden(folder, config, kwargs)
        model = cls(*files.load(folder, config, wanted))
        if attention is not None:
            model.set_attn_implementation(attention)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        model.name_or_path = str(pretrained_model_name_or_path)
        return _place(model, options.device_of(device_map))

    # A private method whose further arguments change between releases, and are not needed.
    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        checks.cache_implementation(generation_config.cache_implementation)
        cache = model_kwargs.get("past_key_values")
        checks.use_cache(cache, generation_config.use_cache)
        if cache is None and generation_config.use_cache is not False:
            cache = model_kwargs["past_key_values"] = self.make_cache()
        elif cache is not None:
            cache._is_user_defined = True
        if cache is not None and generation_config.is_assistant and not cache.get_seq_length():
            cache.activate_past_recording()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave everything as it is: experts and gate come with their weights."""


def _place(model: Any, device: torch.device | str | None) -> ModularForCausalLM:
    moved: ModularForCausalLM = model if device is None else model.to(device)
    return moved
