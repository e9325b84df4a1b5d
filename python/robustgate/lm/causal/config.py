"""The configuration and the output of a modular model as transformers sees them."""
# Ignored no-untyped-call: transformers leaves these functions and class hooks unannotated.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from robustgate.lm.checkpoint import context_length

MODEL_TYPE = "robustgate_modular"


class ModularConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """K experts, their tokenizer, and what the gate is made of.

    Attributes:
        experts: for each expert ``name``, ``config`` (its own ``config.json``), ``path`` (of its
            checkpoint, relative to the folder of this configuration; None while it has none),
            ``sha256`` (of the checkpoint) and, once saved, ``dtype`` (that it had in memory).
        gate: of ``robustgate.lm.gates.spec.GateSpec``, as JSON.
        gate_sha256: hash of the gate's file, so that no other gate is taken for this one; None
            before it is saved.
        top_k_experts: how many experts ``generate`` keeps after the prompt; None for all.
        tokenizer_sha256: hash of the tokenizer; None if it is not known.
        vocab_size: V, the number of tokens; the experts' padding columns do not count.
        num_hidden_layers: of all experts together.
        max_position_embeddings: of the expert that reads the fewest tokens.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "gate_log_weights"]

    experts: list[dict[str, Any]] = field(default_factory=list)
    gate: dict[str, Any] = field(default_factory=dict)
    gate_sha256: str | None = None
    top_k_experts: int | None = None
    tokenizer_sha256: str | None = None
    vocab_size: int = 0
    num_hidden_layers: int = 0
    max_position_embeddings: int = 0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names."""
        return tuple(expert["name"] for expert in self.experts)


@dataclass
class ModularOutput(CausalLMOutputWithPast):
    """What the model returns.

    Attributes:
        loss: mean NLL of the labels under the mixture.
        logits: log-probabilities of the mixture, float32 ``[B, T, V]``: they are normalised.
        past_key_values: a :class:`ModularCache`.
        gate_log_weights: with which the experts were mixed in each row, float64 ``[B, T, K]``.
    """

    gate_log_weights: Tensor | None = None


def new_expert(entry: dict[str, Any]) -> PreTrainedModel:
    """Return an expert with random weights.

    Args:
        entry: of ``ModularConfig.experts``.
    """
    content = dict(entry["config"])
    config = transformers.AutoConfig.for_model(content.pop("model_type"), **content)
    expert: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return expert


def sizes(configs: list[PreTrainedConfig]) -> dict[str, Any]:
    """Return what the experts' configurations say about the whole.

    Args:
        configs: of the experts.
    """
    texts = [config.get_text_config(decoder=True) for config in configs]
    return {
        "num_hidden_layers": sum(text.num_hidden_layers for text in texts),
        "max_position_embeddings": min(context_length(config) for config in configs),
    }
