"""How much the study does, and the sizes of its models."""

from dataclasses import dataclass
from typing import Any, Literal

from robustgate.lm import FeatureSpec, Network

DOMAINS = ("wiki", "code", "biomed", "math", "legal")

FEATURES = FeatureSpec(entropy=True, top=True, agreement=True)
"""Hidden states were tried: with this little validation text a gate learns them by heart."""

MLP = Network("mlp", width=64)
TRANSFORMER = Network("transformer", width=32, heads=2, hidden=64)


@dataclass(frozen=True)
class Gate:
    """How a gate is made: ``"distilled"`` is a causal student of the sequence gate."""

    kind: Literal["prior", "token", "sequence", "distilled"]
    network: Network | None = None
    features: FeatureSpec | None = None


GATES = {
    "prior": Gate("prior"),
    "token mlp": Gate("token", MLP, FEATURES),
    "token mlp, no features": Gate("token", MLP),
    "token transformer": Gate("token", TRANSFORMER, FEATURES),
    "sequence gate (not causal)": Gate("sequence", MLP),
    "distilled token gate": Gate("distilled", MLP),
}
"""In the order in which they are fitted: the student comes after its teacher."""


def llama(
    width: int, layers: int, head: int, inner: int | None = None, scale: float = 0.02
) -> dict[str, Any]:
    """Return the configuration of a Llama with heads of width ``head`` and tied embeddings.

    Weights begin with the standard deviation ``scale``.
    """
    return {
        "hidden_size": width,
        "intermediate_size": 3 * width if inner is None else inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head,
        "tie_word_embeddings": True,
        "initializer_range": scale,
    }


@dataclass(frozen=True)
class Preset:
    """Sizes and lengths. A step reads ``batch_size`` rows of ``context`` tokens.

    Attributes:
        expert, monolith: configurations. The monolith has no fewer weights than
            as many experts as ``DOMAINS``.
        seed_steps: of the seed model, on the union.
        branch_steps: of each expert after it, on its own domain.
        expert_rate, branch_rate, monolith_rate, brief_rate: peak learning rates.
        seed_schedule, schedule: of the learning rate in the seed model and in all others.
        scratch_seeds: seeds for which experts without a seed model are trained too.
        gate_steps: of the token gates.
        documents: of each split of each domain, at most; 0 for all.
        domains: their names; the folders of the text.
        bf16: multiply matrices in bfloat16 in training; scores are always float32.
    """

    expert: dict[str, Any]
    monolith: dict[str, Any]
    vocab_size: int
    context: int
    batch_size: int
    seed_steps: int
    branch_steps: int
    expert_rate: float
    branch_rate: float
    monolith_rate: float
    brief_rate: float
    gate_steps: int
    seed_schedule: str = "constant"
    schedule: str = "linear"
    scratch_seeds: int = 0
    documents: int = 0
    domains: tuple[str, ...] = DOMAINS
    bf16: bool = False

    @property
    def total_steps(self) -> int:
        """Return the steps of seed model and experts together, which a monolith makes too."""
        return self.seed_steps + len(self.domains) * self.branch_steps


# CPU: tuned on validation text of seed 0 (docs/evidence.md). GPU: not tuned.
CPU = Preset(
    expert=llama(96, 3, head=32, scale=0.06),
    monolith=llama(192, 6, head=32, inner=608, scale=0.06),
    vocab_size=4096,
    context=256,
    batch_size=8,
    seed_steps=900,
    branch_steps=120,
    expert_rate=6e-3,
    branch_rate=6e-3,
    monolith_rate=3e-3,
    brief_rate=6e-3,
    gate_steps=600,
    bf16=True,
)
GPU = Preset(
    expert=llama(256, 6, head=64, inner=832),
    monolith=llama(512, 10, head=64, inner=1296),
    vocab_size=4096,
    context=512,
    batch_size=32,
    seed_steps=800,
    branch_steps=160,
    expert_rate=2e-3,
    branch_rate=2e-3,
    monolith_rate=1e-3,
    brief_rate=1e-3,
    gate_steps=1500,
    scratch_seeds=1,
    bf16=True,
)
QUICK = Preset(
    expert=llama(32, 1, head=16),
    monolith=llama(64, 2, head=16),
    vocab_size=512,
    context=64,
    batch_size=4,
    seed_steps=12,
    branch_steps=6,
    expert_rate=4e-3,
    branch_rate=4e-3,
    monolith_rate=4e-3,
    brief_rate=4e-3,
    gate_steps=10,
    documents=12,
)
PRESETS = {"cpu": CPU, "gpu": GPU, "quick": QUICK}
