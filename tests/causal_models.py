"""Small modular models with random, sharp experts, and what they should say, computed plainly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustgate.game import BayesGate
from robustgate.lm.causal import ModularForCausalLM
from robustgate.lm.causal.config import ModularConfig, sizes
from robustgate.lm.gates.spec import BayesOptions, GateSpec, Network
from robustgate.lm.store.features import FeatureSpec, context_features

VOCAB, CONTEXT = 96, 64
PAD, BOS, EOS = 0, 1, 2
PRIOR = (0.5, 0.2, 0.3)


def make_expert(kind: str, seed: int, *, tied: bool = False, padding: int = 0, scale: float = 12.0):
    """Return a Llama, GPT-2 or Mistral of width 32 whose weights are large: a sharp model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": VOCAB + padding,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "tie_word_embeddings": tied,
    }
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
    else:
        shape = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": CONTEXT,
        }
    if kind == "mistral":
        shape["sliding_window"] = 8
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.eval()


def make_experts() -> list:
    """Return a tied Llama, a GPT-2 with seven padding columns and a Mistral with a window of 8."""
    return [
        make_expert("llama", 0, tied=True),
        make_expert("gpt2", 1, padding=7),
        make_expert("mistral", 2),
    ]


SPECS = {
    "bayes": GateSpec(),
    "share": GateSpec(bayes=BayesOptions(share=0.05)),
    "power": GateSpec(bayes=BayesOptions(power=0.5)),
    "window": GateSpec(bayes=BayesOptions(window=3)),
    "top": GateSpec(bayes=BayesOptions(top_k=2)),
    "linear": GateSpec("token", network=Network("linear")),
    "mlp": GateSpec(
        "token",
        BayesOptions(share=0.05),
        Network("mlp", width=8),
        FeatureSpec(entropy=True, top=True, agreement=True, jsd=True, hidden=2),
    ),
    "transformer": GateSpec(
        "token", network=Network("transformer", width=8, hidden=8), features=FeatureSpec(True)
    ),
}


def make_model(
    experts: Sequence | None = None,
    spec: GateSpec | str = "bayes",
    prior: Sequence[float] = PRIOR,
    **config: object,
) -> ModularForCausalLM:
    """Put experts and a gate with random parameters into one model."""
    experts = make_experts() if experts is None else list(experts)
    spec = SPECS[spec] if isinstance(spec, str) else spec
    gate = spec.build(torch.tensor(prior, dtype=torch.float64))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in gate.parameters():
            parameter.normal_(std=0.3)
    entries = [
        {"name": f"expert-{k}", "path": None, "sha256": None, "config": expert.config.to_dict()}
        for k, expert in enumerate(experts)
    ]
    given = ModularConfig(
        experts=entries,
        gate=spec.to_json(),
        vocab_size=VOCAB,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **sizes([expert.config for expert in experts]),
        **config,
    )
    return ModularForCausalLM(given, experts, gate)


def make_prompts(rows: int, tokens: int, seed: int = 0) -> Tensor:  # [rows, tokens]
    """Return random documents that start with BOS."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(EOS + 1, VOCAB, (rows, tokens), generator=generator)
    ids[:, 0] = BOS
    return ids


def pad_left(ids: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Return documents with padding before them, and the attention mask."""
    wide = torch.nn.functional.pad(ids, (padding, 0), value=PAD)
    mask = torch.ones_like(wide)
    mask[:, :padding] = 0
    return wide, mask


@torch.no_grad()
def by_hand(model: ModularForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:  # [T, V], [T, K]
    """Return the mixture's log-probabilities of one document and the log-weights, in float64.

    Every expert runs on its own, without cache; the gate sees the whole document at once, as it
    does in training: row t of its output is in force before token t + 1.
    """
    hidden: list[Tensor] = []
    logits = []
    for expert in model.experts:
        hook = expert.get_output_embeddings().register_forward_pre_hook(
            lambda _, arguments: hidden.append(arguments[0])
        )
        logits.append(expert(input_ids=ids[None], use_cache=False).logits[0])
        hook.remove()
    log_probs = [values[:, :VOCAB].double().log_softmax(dim=-1) for values in logits]  # K [T, V]
    gold = torch.stack(
        [values[:-1].gather(1, ids[1:, None])[:, 0] for values in log_probs], dim=-1
    )  # [T - 1, K]
    gold = torch.cat([gold, gold.new_zeros(1, gold.shape[1])])  # and one token to come
    if isinstance(model.gate, BayesGate):
        weights = model.gate(gold)
    else:
        context = None
        if model.gate.context:
            parts = [part[0] for part in hidden]
            context = context_features(model.spec.features, logits, parts, vocab_size=VOCAB)
        weights = model.gate(gold, context=context)
    mixture = torch.logsumexp(torch.stack(log_probs, -1) + weights.unsqueeze(1), dim=-1)
    return mixture, weights
