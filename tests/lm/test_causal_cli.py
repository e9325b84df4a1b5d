"""``robustgate generate``."""

from __future__ import annotations

import io
import json

import pytest
import torch
from causal_models import BOS, EOS, PAD, VOCAB, make_experts, make_model
from rich.console import Console
from typer.testing import CliRunner

from robustgate.cli import app
from robustgate.cli.generate import printer
from robustgate.lm import ExpertSet, LogProbStore, score
from robustgate.lm.gates.fit import fit
from robustgate.lm.serve import NewToken, complete, encode_prompt, open_model


@pytest.fixture(scope="module")
def modular_path(tmp_path_factory, experts_path, corpora):
    folder = tmp_path_factory.mktemp("generate")
    experts = ExpertSet.open(experts_path)
    score(experts, corpora, folder / "store", progress=False)
    fit(LogProbStore.open(folder / "store"), folder / "modular", experts=experts, progress=False)
    return folder / "modular"


def run(*arguments: object, status: int = 0):
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result


@torch.no_grad()
def test_greedy_text_is_that_of_the_model(modular_path):
    given = ("--model", modular_path, "--prompt", "def return", "--max-new-tokens", 8)
    found = json.loads(run(*given, "--json").stdout)
    model, tokenizer = open_model(modular_path)
    ids = torch.tensor([encode_prompt(tokenizer, "def return")])
    expected = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
    assert [token["id"] for token in found["tokens"]] == expected.tolist()
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert found["text"] == text.rstrip("\ufffd")
    assert found["experts"] == ["code", "prose"]
    assert run(*given).stdout == f"def return{found['text']}\n"


@torch.no_grad()
def test_shares_add_up_to_the_tokens_probability(modular_path):
    """Of each token: w_k p_k / sum_j w_j p_j, from the experts alone."""
    model, tokenizer = open_model(modular_path)
    made = complete(model, tokenizer, "the river", max_new_tokens=5)
    ids = torch.tensor([*encode_prompt(tokenizer, "the river"), *(t.id for t in made.tokens)])
    log_probs = torch.stack(
        [
            expert(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            for expert in model.experts
        ],
        dim=-1,
    )
    weights = model.gate(log_probs)
    shares = (weights + log_probs).softmax(dim=-1)[-len(made.tokens) :]
    for token, expected in zip(made.tokens, shares, strict=True):
        assert token.shares == pytest.approx(expected.tolist(), abs=1e-4)
        assert token.expert == model.config.names[int(expected.argmax())]
    assert made.weights == pytest.approx(weights[-1].exp().tolist(), abs=1e-4)


def test_sampling_follows_the_seed(modular_path):
    given = ("--model", modular_path, "--prompt", "a", "--max-new-tokens", 12, "--json")
    texts = [
        json.loads(run(*given, *more).stdout)["text"]
        for more in (
            ("--seed", 1),
            ("--sample", "--seed", 1),
            ("--seed", 2),
            ("--greedy",),
            ("--temperature", "1e-4", "--top-k-experts", 2),
        )
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[3] == texts[4]  # a mixture this cold is greedy


def test_show_gate_names_the_expert_of_each_token(modular_path):
    given = ("--model", modular_path, "--prompt", "def", "--max-new-tokens", 6)
    found = json.loads(run(*given, "--json").stdout)
    shown = run(*given, "--show-gate").stdout
    assert f"[{found['tokens'][0]['expert']}]" in shown
    assert "last weight" in shown
    for name in ("code", "prose"):
        count = sum(token["expert"] == name for token in found["tokens"])
        row = next(line for line in shown.splitlines() if f"│ {name}" in line)
        assert [cell.strip() for cell in row.split("│")][2] == str(count)


def test_a_terminal_gets_colours():
    out = io.StringIO()
    show = printer(
        Console(file=out, force_terminal=True, color_system="standard"),
        ("code", "prose"),
        "the ",
        coloured=True,
    )
    show(NewToken(1, "river", "prose", (0.1, 0.9)))
    show(NewToken(2, " def", "code", (0.9, 0.1)))
    assert out.getvalue() == "\x1b[2mthe \x1b[0m\x1b[33mriver\x1b[0m\x1b[36m def\x1b[0m"


def test_characters_of_several_tokens_come_whole(modular_path):
    """The tokenizer works on bytes: the snowman is three tokens."""
    from robustgate.lm.serve import _Stream

    model, tokenizer = open_model(modular_path)
    ids = tokenizer.encode("☃", add_special_tokens=False)
    assert len(ids) == 3
    cache = model.make_cache()
    with torch.no_grad():
        model(torch.tensor([[tokenizer.bos_token_id]]), past_key_values=cache)
    stream = _Stream(model, tokenizer, cache, None)
    stream.put(torch.tensor([[tokenizer.bos_token_id]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    assert [token.text for token in stream.made] == ["", "", "☃"]


@torch.no_grad()
def test_a_tokenizer_that_marks_words_keeps_the_space_after_the_prompt():
    """Llama's and Mistral's: the first word of a text is decoded without its space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    words |= {f"\u2581w{number}": number for number in range(EOS + 1, VOCAB)}
    kind = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    kind.pre_tokenizer, kind.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=kind, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    model, seen = make_model(make_experts()), []
    made = complete(model, tokenizer, "w5 w9", max_new_tokens=6, on_token=seen.append)
    whole = [*encode_prompt(tokenizer, "w5 w9"), *(token.id for token in made.tokens)]
    assert "w5 w9" + made.text == tokenizer.decode(whole, skip_special_tokens=True)
    assert made.text.startswith(" w")
    assert [token.text for token in seen] == [f" w{token.id}" for token in seen if token.id != EOS]
    alone = complete(model, tokenizer, "", max_new_tokens=2)
    assert alone.text.startswith("w")


def test_it_stops_where_the_experts_context_ends(modular_path):
    model, _ = open_model(modular_path)
    given = ("--model", modular_path, "--prompt", "def", "--max-new-tokens", 500, "--seed", 3)
    made = json.loads(run(*given, "--json").stdout)["tokens"]
    assert len(made) <= model.config.max_position_embeddings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", 0), "temperature: expected a positive number"),
        (("--top-p", 1.5), "top_p: expected a number in"),
        (("--greedy", "--temperature", 1), "are for --sample"),
        (("--top-k-experts", 3), "top_k_experts: expected 1 to 2, got 3"),
        (("--prompt", "def " * 100), "max_new_tokens: expected 1 to 0 after a prompt"),
    ],
)
def test_bad_options_end_with_one_line(modular_path, arguments, message):
    result = run("--model", modular_path, *arguments, status=2)
    assert message in result.stderr.replace("\n", " ")
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


def test_a_missing_folder_is_named(tmp_path):
    result = run("--model", tmp_path / "none", status=2)
    assert "none: no config.json" in result.stderr
