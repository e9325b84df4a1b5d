"""Generation from a modular model: every way of transformers, on the mixture."""

from __future__ import annotations

import pytest
import torch
from causal_models import (
    BOS,
    CONTEXT,
    EOS,
    PAD,
    PRIOR,
    VOCAB,
    by_hand,
    make_expert,
    make_model,
    make_prompts,
    pad_left,
)
from scipy.stats import chisquare

GREEDY = {"do_sample": False, "max_new_tokens": 16}
TOLERANCE = 1e-4  # as in test_causal.py


pytestmark = pytest.mark.usefixtures("no_grad")


def greedy_by_hand(model, ids, count=16):
    """Decode one document by recomputing everything for each token."""
    for _ in range(count):
        mixture, _ = by_hand(model, ids)
        best = mixture[-1].argmax()
        ids = torch.cat([ids, best[None]])
        if best == EOS:
            break
    return ids


@pytest.mark.parametrize("name", ["bayes", "share", "window", "mlp", "transformer"])
def test_greedy_is_recomputation(experts, name):
    model, ids = make_model(experts, name), make_prompts(2, 6)
    found = model.generate(ids, **GREEDY)
    for row in range(2):
        expected = greedy_by_hand(model, ids[row])
        assert found[row, : len(expected)].tolist() == expected.tolist()
        assert (found[row, len(expected) :] == PAD).all()
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), found)


@pytest.mark.parametrize("size", [1, 4, 64])
def test_prefill_in_chunks(experts, size):
    model, ids = make_model(experts), make_prompts(2, 10)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prefill_chunk_size=size, **GREEDY), expected)
    wide, mask = pad_left(ids, 3)
    chunked = model.generate(wide, attention_mask=mask, prefill_chunk_size=size, **GREEDY)
    assert torch.equal(chunked[:, 3:], expected)


@pytest.mark.parametrize("name", ["bayes", "mlp", "transformer"])
def test_left_padded_batches_equal_single_prompts(experts, name):
    model = make_model(experts, name)
    short, long = make_prompts(1, 4), make_prompts(1, 9, seed=1)
    wide, mask = pad_left(short, 5)
    batch = model.generate(
        torch.cat([wide, long]),
        attention_mask=torch.cat([mask, torch.ones_like(long)]),
        **GREEDY,
    )
    for row, (prompt, skip) in enumerate([(short, 5), (long, 0)]):
        alone = model.generate(prompt, **GREEDY)[0]
        assert batch[row, skip : skip + len(alone)].tolist() == alone.tolist()


def test_without_a_prompt_it_starts_with_bos(experts):
    model = make_model(experts)
    found = model.generate(**GREEDY)[0]
    assert found.tolist() == greedy_by_hand(model, torch.tensor([BOS])).tolist()
    assert found[0] == BOS


@pytest.mark.parametrize("name", ["bayes", "mlp", "transformer"])
def test_prompt_lookup_gives_the_greedy_tokens(experts, name):
    model, ids = make_model(experts, name), make_prompts(1, 4).repeat(1, 3)
    expected = model.generate(ids, do_sample=False, max_new_tokens=24)
    found = model.generate(ids, do_sample=False, max_new_tokens=24, prompt_lookup_num_tokens=4)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["bayes", "mlp"])
@pytest.mark.parametrize("assistant", [0, 2, "other", "modular"])
def test_an_assistant_gives_the_greedy_tokens(experts, name, assistant):
    model, ids = make_model(experts, name), make_prompts(1, 8)
    if assistant == "modular":
        helper = make_model([experts[0], experts[2]], prior=[0.5, 0.5])
    else:
        helper = make_expert("llama", 9) if assistant == "other" else experts[assistant]
    expected = model.generate(ids, do_sample=False, max_new_tokens=32)
    found = model.generate(ids, do_sample=False, max_new_tokens=32, assistant_model=helper)
    assert torch.equal(found, expected)


def test_drafts_that_are_accepted_save_calls(experts):
    """The assistant is the expert that has won the document, so most of its drafts stand."""
    model, ids = make_model(experts, prior=[0.98, 0.01, 0.01]), make_prompts(1, 8)
    calls = []
    hook = model.experts[1].register_forward_hook(lambda *call: calls.append(1))
    model.generate(ids, do_sample=False, max_new_tokens=24, assistant_model=experts[0])
    hook.remove()
    assert len(calls) <= 12


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_sampled_frequencies_are_those_of_the_mixture(experts, top_p):
    """Two tokens deep: the second one's frequencies need the gate to have moved.

    With top-p it is the mixture whose nucleus is kept, not that of any expert.
    """
    model, draws = make_model(experts[:2], prior=[0.5, 0.5]), 6000
    ids = make_prompts(1, 5)
    torch.manual_seed(0)
    found = model.generate(
        ids,
        do_sample=True,
        top_k=0,
        top_p=top_p,
        max_new_tokens=2,
        num_return_sequences=draws,
        eos_token_id=None,
    )
    assert found.shape == (draws, 7)
    first = nucleus(by_hand(model, ids[0])[0][-1].exp(), top_p)
    compare(found[:, 5], first)
    common = int(found[:, 5].mode().values)
    follows = nucleus(
        by_hand(model, torch.cat([ids[0], torch.tensor([common])]))[0][-1].exp(), top_p
    )
    again = found[found[:, 5] == common, 6]
    assert len(again) > 400
    compare(again, follows)


def nucleus(probs, top_p):
    """Return the smallest set of tokens with probability ``top_p``, renormalised."""
    values, order = probs.sort(descending=True)
    kept = values.cumsum(0) - values < top_p
    return torch.zeros_like(probs).scatter(0, order[kept], values[kept] / values[kept].sum())


def compare(tokens, probs):
    """Chi-square of tokens drawn from ``probs``; rare ones together. Passes 999 times in 1000."""
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    assert (counts[probs == 0] == 0).all()
    expected = probs * len(tokens)
    common = expected >= 5
    observed = [*counts[common].tolist(), float(counts[~common].sum())]
    theory = [*expected[common].tolist(), float(expected[~common].sum())]
    if theory[-1] < 1e-6:
        observed, theory = observed[:-1], theory[:-1]
    scale = sum(observed) / sum(theory)
    assert chisquare(observed, [value * scale for value in theory]).pvalue > 1e-3


def test_beams_are_scored_by_the_mixture(experts):
    """The scores of the beams are sums of the mixture's log-probabilities, recomputed by hand."""
    model, ids = make_model(experts), make_prompts(2, 6)
    out = model.generate(
        ids,
        num_beams=4,
        num_return_sequences=3,
        do_sample=False,
        max_new_tokens=8,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    assert out.sequences.shape == (6, 14)
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        mixture, _ = by_hand(model, sequence)
        total = mixture[5:-1].gather(1, sequence[6:, None]).sum()
        assert abs(float(total - score)) < 1e-3
    plain = model.generate(
        ids, num_beams=4, num_return_sequences=3, do_sample=False, max_new_tokens=8,
        length_penalty=0.0, use_cache=False, eos_token_id=None, pad_token_id=PAD,
    )  # fmt: skip
    assert torch.equal(out.sequences, plain)


@pytest.mark.parametrize("name", ["bayes", "mlp", "transformer"])
def test_reordering_moves_the_state_of_the_gate(experts, name):
    model, ids = make_model(experts, name), make_prompts(3, 9)
    order, news = torch.tensor([2, 0, 0]), make_prompts(3, 4, seed=5)
    cache = model(ids).past_key_values
    cache.reorder_cache(order)
    out = model(news, past_key_values=cache)
    expected = model(torch.cat([ids[order], news], dim=1))
    torch.testing.assert_close(out.logits, expected.logits[:, 9:], atol=TOLERANCE, rtol=0)
    before = model(ids).gate_log_weights[:, -1].exp()
    assert (before - before[order]).abs().max() > 0.1  # so that it could have gone wrong


def test_repeating_and_selecting_documents(experts):
    model, ids, news = make_model(experts), make_prompts(2, 7), make_prompts(4, 3, seed=5)
    cache = model(ids).past_key_values
    cache.batch_repeat_interleave(2)
    out = model(news, past_key_values=cache).logits
    expected = model(torch.cat([ids.repeat_interleave(2, 0), news], 1)).logits
    torch.testing.assert_close(out, expected[:, 7:], atol=TOLERANCE, rtol=0)
    cache.batch_select_indices(torch.tensor([3]))
    last = model(news[:1], past_key_values=cache).logits
    whole = torch.cat([ids[1:], news[3:], news[:1]], 1)
    torch.testing.assert_close(last, model(whole).logits[:, 10:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["bayes", "share", "mlp", "transformer", "window"])
@pytest.mark.parametrize("removed", [0, 1, 3, 8, 9])
def test_crop_goes_back(experts, name, removed):
    """By a few tokens, to BOS alone, to nothing; and again before the next token."""
    model, ids, news = make_model(experts, name), make_prompts(2, 9), make_prompts(2, 4, seed=5)
    if removed == 9:
        news = make_prompts(2, 4, seed=6)  # starts with BOS
    cache = model.make_cache()
    cache.activate_past_recording()  # for the Mistral's window
    model(ids, past_key_values=cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == 9 - removed
    out = model(news, past_key_values=cache)
    expected = model(torch.cat([ids[:, : 9 - removed], news], dim=1))
    torch.testing.assert_close(
        out.logits, expected.logits[:, 9 - removed :], atol=TOLERANCE, rtol=0
    )
    cache.crop(-1)
    cache.crop(-1)
    again = model(news[:, 2:], past_key_values=cache)
    torch.testing.assert_close(again.logits, out.logits[:, 2:], atol=TOLERANCE, rtol=0)


def test_crop_takes_negative_counts_alone(experts):
    cache = make_model(experts)(make_prompts(1, 5)).past_key_values
    with pytest.raises(ValueError, match="tokens_to_remove: expected at most 0, got 2"):
        cache.crop(2)


def test_crop_in_a_padded_batch(experts):
    model = make_model(experts)
    short, long = make_prompts(1, 5), make_prompts(1, 9, seed=1)
    wide, mask = pad_left(short, 4)
    ids, mask = torch.cat([wide, long]), torch.cat([mask, torch.ones_like(long)])
    cache = model.make_cache()
    cache.activate_past_recording()
    out = model(ids, attention_mask=mask, past_key_values=cache)
    cache.crop(-6)  # behind the short document's BOS
    again = model(ids[:, 3:], attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(again.logits[1], out.logits[1, 3:], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(again.logits[0, 1:], out.logits[0, 4:], atol=TOLERANCE, rtol=0)


def test_a_window_reads_on_while_it_keeps_its_past(experts):
    """Drafts of several tokens, long prompts in chunks: no crop between the calls."""
    model, ids = make_model(experts), make_prompts(2, 24)
    expected = model(ids).logits
    cache = model.make_cache()
    cache.activate_past_recording()
    for start, end in [(0, 10), (10, 11), (11, 12), (12, 20), (20, 24)]:
        out = model(ids[:, start:end], past_key_values=cache)
        torch.testing.assert_close(out.logits, expected[:, start:end], atol=TOLERANCE, rtol=0)
    cache.crop(-14)
    out = model(ids[:, 10:], past_key_values=cache)
    torch.testing.assert_close(out.logits, expected[:, 10:], atol=TOLERANCE, rtol=0)


def test_a_reset_cache_is_a_new_one(experts):
    model, ids = make_model(experts), make_prompts(2, 7)
    cache = model(ids).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(
        model(ids, past_key_values=cache).logits, model(ids).logits, atol=TOLERANCE, rtol=0
    )


def test_a_conversation_goes_on_from_its_cache(experts):
    model, ids = make_model(experts), make_prompts(1, 6)
    cache = model.make_cache()
    first = model.generate(ids, past_key_values=cache, **GREEDY)
    more = torch.cat([first, make_prompts(1, 4, seed=3)], dim=1)
    found = model.generate(more, past_key_values=cache, **GREEDY)
    assert torch.equal(found, model.generate(more, **GREEDY))


def test_the_history_is_in_the_cache(experts):
    model, ids = make_model(experts), make_prompts(1, 8)
    layer = model(ids).past_key_values.gate
    mixture, weights = by_hand(model, ids[0])
    torch.testing.assert_close(layer.history["log_weights"][0], weights, atol=1e-5, rtol=1e-5)
    scored = layer.history["scored"][0].tolist()
    assert scored == [False] + [True] * 7
    own = torch.logsumexp(
        layer.history["log_weights"][0, :-1] + layer.history["log_probs"][0, 1:], dim=-1
    )
    gold = mixture[:-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(own, gold, atol=1e-4, rtol=0)


def test_too_many_tokens_end_with_a_sentence(experts):
    model = make_model(experts)
    with pytest.raises(ValueError, match="not every expert reads more than 64"):
        model.generate(make_prompts(1, CONTEXT - 2), min_new_tokens=9, max_new_tokens=9)


def test_the_prior_decides_the_first_token(experts):
    """sum_k w_k p_k, not the mean of the experts."""
    model = make_model(experts)
    bos = torch.tensor([[BOS]])
    own = [expert(bos).logits[0, 0, :VOCAB].double().softmax(-1) for expert in experts]
    expected = sum(weight * probs for weight, probs in zip(PRIOR, own, strict=True))
    torch.testing.assert_close(
        model(bos).logits[0, 0].double().exp(), expected, atol=1e-6, rtol=1e-4
    )
