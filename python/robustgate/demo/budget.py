"""How much the demo does, and the sizes of its models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Budget:
    """How much the demo does.

    Attributes:
        train_characters: Characters of training text per domain.
        held_out_characters: Characters of validation text per domain, and of test text.
        vocab_size: Tokens of the shared tokenizer.
        context: Tokens a model reads at once, in training and scoring.
        seed_tokens: Tokens the seed model reads.
        branch_tokens: Tokens each expert reads after it.
        batch_size: Rows of ``context`` tokens in a step.
        learning_rate: Of the seed model and the experts.
        monolith_learning_rate: Of the monolith.

    The learning rates are the best of 0.0015, 0.003, 0.006 and 0.012 in runs of the standard
    length, each for its own kind of model; shorter runs would have misled the monolith.
    """

    train_characters: int
    held_out_characters: int
    vocab_size: int
    context: int
    seed_tokens: int
    branch_tokens: int
    batch_size: int
    learning_rate: float
    monolith_learning_rate: float


STANDARD = Budget(
    train_characters=600_000,
    held_out_characters=80_000,
    vocab_size=1024,
    context=128,
    seed_tokens=1_000_000,
    branch_tokens=120_000,
    batch_size=8,
    learning_rate=6e-3,
    monolith_learning_rate=4e-3,
)
"""About three minutes."""

QUICK = Budget(
    train_characters=60_000,
    held_out_characters=25_000,
    vocab_size=1024,
    context=128,
    seed_tokens=60_000,
    branch_tokens=20_000,
    batch_size=8,
    learning_rate=6e-3,
    monolith_learning_rate=4e-3,
)
"""Less than a minute; the numbers are poor, the steps are the same."""

EXPERT_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 32**-0.5,
    "tie_word_embeddings": True,
}
"""An expert: a Llama small enough to train in seconds."""


def parameters(config: dict[str, Any], vocab_size: int) -> int:
    """Return the number of weights of a Llama model with tied embeddings.

    Per layer ``4 h^2`` for attention, ``3 h i`` for the feed-forward block and two norms of
    ``h``; ``V h`` embeddings and a last norm.
    """
    h, i = config["hidden_size"], config["intermediate_size"]
    return int(config["num_hidden_layers"] * (4 * h * h + 3 * h * i + 2 * h) + vocab_size * h + h)


def monolith_config(experts: int, vocab_size: int) -> dict[str, Any]:
    """Return the narrowest model of three layers with no fewer weights than all experts together.

    Its heads have the width of the experts' heads.
    """
    wanted = experts * parameters(EXPERT_CONFIG, vocab_size)
    config = {**EXPERT_CONFIG, "num_hidden_layers": 3}
    while parameters(config, vocab_size) < wanted:
        width = config["hidden_size"] + 16
        config |= {
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_attention_heads": width // 16,
            "initializer_range": width**-0.5,
        }
    return config
