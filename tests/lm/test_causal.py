"""The logits of a modular model: the mixture of its experts under its gate, however it is asked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from causal_models import (
    CONTEXT,
    PAD,
    PRIOR,
    SPECS,
    VOCAB,
    by_hand,
    make_expert,
    make_model,
    make_prompts,
    pad_left,
)

import robustgate.lm
from robustgate.lm.causal import ModularForCausalLM

# Between two float32 computations of the same logits, of size up to 100: rounding of the experts'
# own matrix products, which depends on the number of rows in a call.
TOLERANCE = 1e-4


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("name", SPECS)
def test_the_logits_are_the_mixture_under_the_gate(experts, name):
    model = make_model(experts, name)
    ids = make_prompts(2, 24)
    out = model(ids)
    assert out.logits.shape == (2, 24, VOCAB)
    assert out.logits.dtype == torch.float32
    assert out.gate_log_weights.dtype == torch.float64
    for row in range(2):
        mixture, weights = by_hand(model, ids[row])
        torch.testing.assert_close(out.logits[row].double(), mixture, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(out.gate_log_weights[row], weights, atol=TOLERANCE, rtol=1e-4)
    normaliser = out.logits.double().logsumexp(dim=-1)
    torch.testing.assert_close(normaliser, torch.zeros_like(normaliser), atol=1e-5, rtol=0)


def test_the_gate_moves(experts):
    """The documents above say something: the weights go far from the prior, and differ."""
    weights = make_model(experts)(make_prompts(2, 24)).gate_log_weights.exp()
    assert (weights[:, 0] - torch.tensor(PRIOR)).abs().max() < 1e-6  # after BOS, the prior
    assert weights[:, 8:].amax(dim=-1).max() > 0.99
    assert (weights[0] - weights[1]).abs().max() > 0.5


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("step", [1, 5])
def test_cached_decoding_is_recomputation(experts, name, step):
    model = make_model(experts, name)
    ids = make_prompts(2, 20)
    cache, logits = None, []
    for start in range(0, 20, step):
        out = model(ids[:, start : start + step], past_key_values=cache)
        cache = out.past_key_values
        logits.append(out.logits)
        assert cache.get_seq_length() == min(20, start + step)
    expected = model(ids, use_cache=False)
    assert expected.past_key_values is None
    torch.testing.assert_close(torch.cat(logits, 1), expected.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["bayes", "mlp", "transformer"])
def test_chunks_bound_the_logits_and_change_nothing(experts, name):
    model = make_model(experts, name)
    ids = make_prompts(2, 20)
    expected = model(ids)
    most = []
    hooks = [
        expert.register_forward_hook(lambda *call: most.append(call[2].logits[..., 0].numel()))
        for expert in model.experts
    ]
    model.chunk_logits = 2 * 3 * (3 * VOCAB + 7)  # three tokens of two documents
    out = model(ids, logits_to_keep=2)
    for hook in hooks:
        hook.remove()
    assert max(most) == 2 * 3
    torch.testing.assert_close(out.logits, expected.logits[:, -2:], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model(ids).logits, expected.logits, atol=TOLERANCE, rtol=0)


def test_logits_to_keep_takes_rows(experts):
    model, ids = make_model(experts), make_prompts(2, 9)
    every = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=1).logits, every[:, -1:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, every[:, [1, 4]])


def test_one_expert_is_that_expert(experts):
    for expert in experts:
        model, ids = make_model([expert], prior=[1.0]), make_prompts(2, 16)
        own = expert(ids).logits[..., :VOCAB].log_softmax(dim=-1)
        # the same logits; two float32 softmaxes of them
        torch.testing.assert_close(model(ids).logits, own, atol=2e-5, rtol=0)


def test_a_one_hot_prior_is_that_expert(experts):
    model, ids = make_model(experts, prior=[0.0, 1.0, 0.0]), make_prompts(2, 16)
    own = experts[1](ids).logits[..., :VOCAB].log_softmax(dim=-1)
    torch.testing.assert_close(model(ids).logits, own, atol=2e-5, rtol=0)


def test_the_order_of_the_experts_does_not_matter(experts):
    ids, order = make_prompts(2, 16), [2, 0, 1]
    one = make_model(experts)(ids)
    other = make_model([experts[k] for k in order], prior=[PRIOR[k] for k in order])(ids)
    torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=0)
    weights = other.gate_log_weights
    torch.testing.assert_close(one.gate_log_weights[..., order], weights, atol=1e-6, rtol=1e-6)


def test_a_split_expert_changes_nothing(experts):
    ids = make_prompts(2, 16)
    one = make_model(experts)(ids).logits
    twice = make_model([*experts, experts[0]], prior=[0.2, 0.2, 0.3, 0.3])(ids).logits
    torch.testing.assert_close(one, twice, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bayes", "mlp", "transformer"])
def test_nothing_depends_on_the_future(experts, name):
    model, ids = make_model(experts, name), make_prompts(1, 16)
    changed = ids.clone()
    changed[:, 9:] = make_prompts(1, 16, seed=7)[:, 9:]
    one, other = model(ids), model(changed)
    assert torch.equal(one.logits[:, :9], other.logits[:, :9])
    assert torch.equal(one.gate_log_weights[:, :9], other.gate_log_weights[:, :9])
    assert (one.logits[:, 9:] - other.logits[:, 9:]).abs().max() > 1


@pytest.mark.parametrize("name", SPECS)
def test_padding_counts_for_nothing(experts, name):
    """Left, right, or in the middle; in one call or with a cache.

    The document with a hole is not longer than the Mistral's window, which counts places, as a
    gate with a window does.
    """
    model = make_model(experts, name)
    short, long = make_prompts(1, 6), make_prompts(1, 14, seed=1)
    wide, mask = pad_left(short, 8)
    ids, mask = torch.cat([wide, long]), torch.cat([mask, torch.ones_like(long)])
    expected = model(short).logits[0], model(long).logits[0]
    out = model(ids, attention_mask=mask)
    torch.testing.assert_close(out.logits[0, 8:], expected[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(out.logits[1], expected[1], atol=TOLERANCE, rtol=0)
    first = model(ids[:, :10], attention_mask=mask[:, :10])
    second = model(ids[:, 10:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits[0], expected[0][2:], atol=TOLERANCE, rtol=0)
    if name == "window":
        return
    holes = torch.tensor([[PAD, PAD, *short[0, :4], PAD, *short[0, 4:], PAD, PAD]])
    real = holes != PAD
    out = model(holes, attention_mask=real.long())
    torch.testing.assert_close(out.logits[real], expected[0], atol=TOLERANCE, rtol=0)


def test_a_hole_between_two_calls(experts):
    """The token after the hole is scored by the logits before it."""
    model, ids = make_model(experts), make_prompts(1, 7)
    expected = model(ids)
    first = model(torch.tensor([[*ids[0, :3], PAD]]), attention_mask=torch.tensor([[1, 1, 1, 0]]))
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]])
    second = model(ids[:, 3:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, expected.logits[:, 3:], atol=TOLERANCE, rtol=0)


def test_the_loss_is_the_nll_of_the_mixture(experts):
    model, ids = make_model(experts), make_prompts(2, 16)
    out = model(ids, labels=ids)
    expected = -out.logits[:, :-1].double().gather(2, ids[:, 1:, None]).mean()
    torch.testing.assert_close(out.loss.double(), expected, atol=1e-5, rtol=1e-6)
    model.chunk_logits = 1
    torch.testing.assert_close(model(ids, labels=ids).loss, out.loss, atol=1e-5, rtol=1e-5)
    labels = ids.clone()
    labels[0], labels[1, :10] = -100, -100
    expected = -out.logits[1, 9:-1].double().gather(1, ids[1, 10:, None])
    one = model(ids, labels=labels)
    torch.testing.assert_close(one.loss.double(), expected.mean(), atol=1e-4, rtol=1e-5)
    total = model(ids, labels=labels, num_items_in_batch=2).loss
    torch.testing.assert_close(total.double(), expected.sum() / 2, atol=1e-4, rtol=1e-5)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0


def test_gradients_reach_the_gate_and_no_expert(experts):
    model, ids = make_model(experts, "linear"), make_prompts(2, 12)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.gate.requires_grad_(True)
    model.train()
    assert model.gate.training
    assert not any(expert.training for expert in model.experts)
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    assert model.gate.head.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.experts.parameters())


def test_experts_of_two_dtypes(experts):
    one = make_expert("llama", 5, scale=2.0).bfloat16()
    model, ids = make_model([one, experts[1]], prior=[0.5, 0.5]), make_prompts(1, 12)
    mixture, _ = by_hand(model, ids[0])
    torch.testing.assert_close(model(ids).logits[0].double(), mixture, atol=TOLERANCE, rtol=0)


def test_the_configuration_speaks_for_all_experts(experts):
    config = make_model(experts).config
    assert config.vocab_size == VOCAB  # without the padding columns of the GPT-2
    assert config.num_hidden_layers == 6
    assert config.max_position_embeddings == CONTEXT
    longer = make_expert("llama", 3)
    longer.config.max_position_embeddings = 2 * CONTEXT
    assert make_model([longer, experts[1]], prior=[0.5, 0.5]).config.max_position_embeddings == 64


def test_the_weights_of_the_experts_stay(experts):
    before = [parameter.clone() for expert in experts for parameter in expert.parameters()]
    after = make_model(experts).experts.parameters()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_what_cannot_be_shared_is_refused_by_name(experts):
    from transformers import DynamicCache, StaticCache

    model, ids = make_model(experts), make_prompts(1, 4)
    with pytest.raises(ValueError, match="inputs_embeds: every expert has its own"):
        model(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match="inputs_embeds: every expert has its own"):
        model.generate(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match=r"input_ids: expected shape \[B, T\]"):
        model(input_ids=ids[0])
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="got StaticCache"):
        model(ids, past_key_values=StaticCache(model.experts[0].config, max_cache_len=8))
    for name in ("static", "quantized", "offloaded", "offloaded_static", "paged"):
        with pytest.raises(ValueError, match=f"cache_implementation: '{name}'"):
            model.generate(ids, cache_implementation=name, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(1, 4\)"):
        model(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="position_ids: expected shape"):
        model(ids, position_ids=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="65 tokens, but not every expert reads more than 64"):
        model(make_prompts(1, CONTEXT + 1))
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="expected a batch of 1, got 2"):
        model(make_prompts(2, 1), past_key_values=cache)


def test_a_sequence_gate_is_sent_to_distill(experts):
    from robustgate.lm.gates.spec import GateSpec, Network

    with pytest.raises(ValueError, match="`robustgate distill` makes a token gate of it"):
        make_model(experts, GateSpec("sequence", network=Network("linear"), span=8))


def test_an_expert_without_a_cache_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mamba", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    config.max_position_embeddings = CONTEXT
    with pytest.raises(ValueError, match="expert 'expert-0': keeps no past_key_values"):
        make_model([AutoModelForCausalLM.from_config(config)], prior=[1.0])


def test_the_package_exports_it_and_needs_transformers_for_nothing_else():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import robustgate as rg\n"
        "try: rg.lm.ModularForCausalLM\n"
        "except ImportError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'install it with: pip install "robustgate[lm]"' in result.stdout
    assert robustgate.lm.ModularForCausalLM is ModularForCausalLM
    with pytest.raises(AttributeError, match="has no attribute 'ModularForCausal'"):
        robustgate.lm.ModularForCausal  # noqa: B018
