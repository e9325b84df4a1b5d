"""What a modular model refuses before it says something wrong, and parts that are exchanged."""

from __future__ import annotations

import re

import pytest
import torch
from causal_models import (
    BOS,
    CONTEXT,
    EOS,
    PAD,
    VOCAB,
    by_hand,
    make_expert,
    make_model,
    make_prompts,
)
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from robustgate.game import BayesGate

GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": PAD}
TOLERANCE = 1e-4  # as in test_causal.py


pytestmark = pytest.mark.usefixtures("no_grad")


def make_other(kind: str, **shape: object):
    """Return an expert of another family."""
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    config = AutoConfig.for_model(kind, **{**common, **shape})
    return AutoModelForCausalLM.from_config(config)


LINEAR = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}


@pytest.mark.parametrize(
    ("kind", "shape", "why"),
    [
        (
            "qwen3_5_text",
            {
                **LINEAR,
                **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2),
                **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
            },
            "keeps a recurrent state",
        ),
        (
            "jamba",
            {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4},
            "keeps a recurrent state",
        ),
        ("minimax", {**LINEAR, "num_local_experts": 2}, "keeps a recurrent state"),
        ("roberta", {"is_decoder": True}, "counts positions from behind its padding token"),
    ],
)
def test_experts_that_cannot_be_read_on_like_the_others_are_refused(kind, shape, why):
    with pytest.raises(ValueError, match=f"expert 'expert-0': .*{why}"):
        make_model([make_other(kind, **shape)], prior=[1.0])


def test_an_expert_with_short_convolutions_is_none_of_them():
    """LFM2 keeps the last columns of a convolution, which can be cropped."""
    one = make_other("lfm2", layer_types=["conv", "full_attention"]).eval()
    model, ids = make_model([one], prior=[1.0]), make_prompts(1, 8)
    found = model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(found, model.generate(ids, use_cache=False, **GREEDY))


def test_a_document_that_is_read_again_is_noticed(experts):
    model, ids = make_model(experts), make_prompts(2, 8)
    cache = model(ids).past_key_values
    again = torch.arange(8)[None]
    with pytest.raises(ValueError, match=r"document 0 goes on at position 0, .* up to position 7"):
        model(ids, position_ids=again, past_key_values=cache)
    assert cache.get_seq_length() == 8  # as it was
    news = make_prompts(2, 3, seed=4)
    out = model(news, position_ids=again[:, :3] + 8, past_key_values=cache)
    expected = model(torch.cat([ids, news], dim=1)).logits[:, 8:]
    torch.testing.assert_close(out.logits, expected, atol=TOLERANCE, rtol=0)


def test_drafts_on_a_cache_of_an_earlier_turn_are_right_or_refused(experts):
    """Some versions of transformers then read the whole text again."""
    model, ids = make_model(experts), make_prompts(1, 4).repeat(1, 3)
    cache = model.make_cache()
    first = model.generate(ids, past_key_values=cache, **GREEDY)
    more = torch.cat([first, make_prompts(1, 4, seed=3)[:, 1:]], dim=1)
    expected = model.generate(more, **GREEDY)
    try:
        found = model.generate(more, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
    except ValueError as error:  # the one or the other version
        assert re.search(r"goes on at position 0|mask: expected shape \(1, \d+\)", str(error))  # noqa: PT017
    else:
        assert torch.equal(found, expected)


def test_a_cache_that_is_not_to_be_used_is_refused(experts):
    model, ids = make_model(experts), make_prompts(1, 4)
    with pytest.raises(ValueError, match="past_key_values: given, but use_cache is False"):
        model.generate(ids, past_key_values=model.make_cache(), use_cache=False, **GREEDY)
    without = GenerationConfig(use_cache=False, **GREEDY)
    with pytest.raises(ValueError, match="top_k_experts: needs a cache"):
        model.generate(ids, top_k_experts=1, generation_config=without)


def test_top_k_experts_with_a_cache_of_ones_own(experts):
    model, ids = make_model(experts), make_prompts(1, 8)
    expected = model.generate(ids, top_k_experts=1, **GREEDY)
    cache = model.make_cache(top_k_experts=1)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
    assert cache.gate.kept.sum() == 1
    configured = make_model(experts, top_k_experts=1)
    cache = configured.make_cache()
    assert torch.equal(configured.generate(ids, past_key_values=cache, **GREEDY), expected)
    assert cache.gate.kept.sum() == 1
    assert configured(ids).past_key_values.gate.kept is None  # forward alone knows no prompt
    with pytest.raises(ValueError, match="top_k_experts: 1, but the cache keeps all"):
        model.generate(ids, top_k_experts=1, past_key_values=model.make_cache(), **GREEDY)


@pytest.mark.parametrize("main", [0, "modular"])
def test_an_assistant_with_top_k_experts(experts, main):
    model = make_model(experts) if main == "modular" else experts[main]
    helper, ids = make_model(experts, top_k_experts=1), make_prompts(1, 4).repeat(1, 3)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=helper, **GREEDY), expected)


def test_rows_come_in_the_order_that_is_asked_for(experts):
    model, ids = make_model(experts), make_prompts(2, 9)
    every = model(ids)
    for rows in ([5, 2], [0, 0, 1, 8], [-1], [8, -9, 8]):
        for logits in (2**26, 1):  # in one piece, and cut after every token
            model.chunk_logits = logits
            out = model(ids, logits_to_keep=torch.tensor(rows))
            expected = every.logits[:, rows]
            torch.testing.assert_close(out.logits, expected, atol=TOLERANCE, rtol=0)
            expected = every.gate_log_weights[:, rows]
            torch.testing.assert_close(out.gate_log_weights, expected, atol=TOLERANCE, rtol=1e-4)


def test_another_gate_or_expert_counts_from_the_next_call(experts):
    model, ids = make_model(experts), make_prompts(1, 8)
    model(ids)
    model.gate = BayesGate(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    mixture, _ = by_hand(model, ids[0])
    torch.testing.assert_close(model(ids).logits[0].double(), mixture, atol=TOLERANCE, rtol=0)
    model.experts[1] = make_expert("llama", 7)
    mixture, _ = by_hand(model, ids[0])
    torch.testing.assert_close(model(ids).logits[0].double(), mixture, atol=TOLERANCE, rtol=0)
    alone = make_model([model.experts[1]], prior=[1.0])
    assert torch.equal(model.generate(ids, **GREEDY), alone.generate(ids, **GREEDY))
