"""Top-k experts: the prompt chooses them, and only they go on."""

from __future__ import annotations

import pytest
import torch
from causal_models import EOS, PAD, VOCAB, by_hand, make_model, make_prompts, pad_left

TOLERANCE = 1e-4  # as in test_causal.py
GREEDY = {"do_sample": False, "max_new_tokens": 16}


pytestmark = pytest.mark.usefixtures("no_grad")


def calls_per_expert(model, run):
    counts = [0] * len(model.experts)

    def count(place):
        return lambda *call: counts.__setitem__(place, counts[place] + 1)

    hooks = [expert.register_forward_hook(count(k)) for k, expert in enumerate(model.experts)]
    found = run()
    for hook in hooks:
        hook.remove()
    return found, counts


@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 3}])
def test_the_best_experts_of_the_prompt_go_on_alone(experts, more):
    """As a model of the kept experts with the posterior after the prompt as its prior."""
    model, ids = make_model(experts), make_prompts(1, 8)
    found, counts = calls_per_expert(
        model, lambda: model.generate(ids, top_k_experts=2, **GREEDY, **more)
    )
    posterior = by_hand(model, ids[0])[1][-1]
    kept = posterior.topk(2).indices.sort().values.tolist()
    (dropped,) = {0, 1, 2} - set(kept)
    assert counts[dropped] < counts[kept[0]]
    assert counts[dropped] <= (3 if "prefill_chunk_size" in more else 1)
    expected = ids[0]
    state = posterior[kept].log_softmax(dim=-1)
    while len(expected) < 24 and expected[-1] != EOS:
        rows = [
            experts[k](expected[None]).logits[0, :, :VOCAB].double().log_softmax(-1) for k in kept
        ]
        gold = [row[7:-1].gather(1, expected[8:, None]).sum() for row in rows]
        weights = (state + torch.stack(gold)).log_softmax(dim=-1)
        mixture = torch.logsumexp(torch.stack([row[-1] for row in rows]) + weights[:, None], dim=0)
        expected = torch.cat([expected, mixture.argmax()[None]])
    assert found[0].tolist() == expected.tolist()


def test_all_experts_kept_is_the_model_and_one_is_that_expert(experts):
    model, ids = make_model(experts), make_prompts(1, 8)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, top_k_experts=3, **GREEDY), expected)
    best = int(by_hand(model, ids[0])[1][-1].argmax())
    alone = make_model([experts[best]], prior=[1.0]).generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, top_k_experts=1, **GREEDY), alone)
    assert torch.equal(make_model(experts, top_k_experts=1).generate(ids, **GREEDY), alone)


@pytest.mark.parametrize("name", ["bayes", "share"])
def test_documents_of_a_batch_keep_their_own_experts(experts, name):
    model, ids = make_model(experts, name), make_prompts(4, 8)
    assert len(set(model(ids).gate_log_weights[:, -1].argmax(-1).tolist())) > 1
    batch = model.generate(ids, top_k_experts=1, **GREEDY)
    for row in range(4):
        alone = model.generate(ids[row : row + 1], top_k_experts=1, **GREEDY)[0]
        assert batch[row, : len(alone)].tolist() == alone.tolist()


def test_kept_experts_of_padded_prompts_and_of_beams(experts):
    """What is kept belongs to a document: padding does not change it, beams take it along."""
    model = make_model(experts)
    short, long = make_prompts(1, 5, seed=2), make_prompts(1, 9, seed=1)
    wide, mask = pad_left(short, 4)
    batch = {
        "inputs": torch.cat([wide, long]),
        "attention_mask": torch.cat([mask, torch.ones_like(long)]),
    }
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD}
    for how in (GREEDY, beams):
        found = model.generate(**batch, top_k_experts=1, **how)
        for row, (prompt, skip) in enumerate([(short, 4), (long, 0)]):
            best = int(by_hand(model, prompt[0])[1][-1].argmax())
            alone = make_model([experts[best]], prior=[1.0]).generate(prompt, **how)[0]
            assert found[row, skip : skip + len(alone)].tolist() == alone.tolist()


def test_dropped_experts_come_back_when_the_prompt_is_cropped(experts):
    model, ids = make_model(experts), make_prompts(1, 8)
    cache = model.make_cache(top_k_experts=1, prompt_length=8)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    model(make_prompts(1, 3, seed=4), past_key_values=cache)
    assert cache.gate.kept.sum() == 1
    assert sorted(cache.seen) == [8, 8, 11]
    cache.crop(-6)
    assert cache.gate.kept is None
    out = model(ids[:, 5:7], past_key_values=cache)
    torch.testing.assert_close(out.logits, model(ids).logits[:, 5:7], atol=TOLERANCE, rtol=0)


def test_top_k_experts_is_refused_where_it_means_nothing(experts):
    ids = make_prompts(1, 4)
    with pytest.raises(ValueError, match="top_k_experts: expected 1 to 3, got 4"):
        make_model(experts).generate(ids, top_k_experts=4)
    with pytest.raises(ValueError, match="top_k_experts: needs a cache"):
        make_model(experts).generate(ids, top_k_experts=1, use_cache=False)
    with pytest.raises(ValueError, match="top_k_experts: needs a Bayes gate"):
        make_model(experts, "mlp", top_k_experts=1)
