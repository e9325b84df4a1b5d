"""lm-evaluation-harness on a modular model: the numbers are those of the model itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from robustgate.lm import ExpertSet, LogProbStore, score
from robustgate.lm.gates.fit import fit
from robustgate.lm.serve import encode_prompt, open_model, pad_prompts

REASON = 'lm_eval is not installed; install it with: pip install "robustgate[harness]"'

CHOICES = [
    {"text": "def return", "choices": [" for", " river town"], "answer": 0},
    {"text": "the river", "choices": [" import self", " ran", " quiet"], "answer": 1},
]
COMMON = "dataset_path: json\ntest_split: test\nnum_fewshot: 0\n"
TASKS = {
    "choose": """output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "likely": """output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "write": """output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "roll": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def modular_path(tmp_path_factory, experts_path, corpora):
    folder = tmp_path_factory.mktemp("harness")
    experts = ExpertSet.open(experts_path)
    score(experts, corpora, folder / "store", progress=False)
    fit(LogProbStore.open(folder / "store"), folder / "modular", experts=experts, progress=False)
    return folder / "modular"


def test_prompts_start_with_bos_once(modular_path):
    _, tokenizer = open_model(modular_path)
    bos = tokenizer.bos_token_id
    tokens = encode_prompt(tokenizer, "def return")
    assert tokens[0] == bos
    assert bos not in tokens[1:]
    assert encode_prompt(tokenizer, tokenizer.bos_token + "def return") == tokens
    assert encode_prompt(tokenizer, "") == [bos]
    short = encode_prompt(tokenizer, "def return for in range", most=4)
    assert short == [bos, *encode_prompt(tokenizer, "def return for in range")[-3:]]
    ids, mask = pad_prompts([[bos], tokens], 7)
    assert ids[0].tolist() == [7] * (len(tokens) - 1) + [bos]
    assert mask.sum(1).tolist() == [1, len(tokens)]


def test_both_kinds_of_folder_open(modular_path, tmp_path):
    model, tokenizer = open_model(modular_path, top_k=1)
    model.save_pretrained(tmp_path)
    again, other = open_model(tmp_path)
    assert again.config.top_k_experts == 1
    assert open_model(tmp_path, top_k=2)[0].config.top_k_experts == 2
    assert other.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="top_k_experts: expected 1 to 2, got 3"):
        open_model(tmp_path, top_k=3)


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    from robustgate.lm import harness

    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'pip install "robustgate\[harness\]"'):
        harness.main([])


def log_likelihood(model, tokenizer, context, continuation):
    """Return the log-probability of a continuation, and whether it is what greedy would say."""
    whole = torch.tensor([encode_prompt(tokenizer, context + continuation)])
    start = len(encode_prompt(tokenizer, context))
    rows = model(whole).logits[0, start - 1 : -1]
    gold = whole[0, start:]
    value = float(rows.gather(1, gold[:, None]).sum())
    return value, bool((rows.argmax(-1) == gold).all())


@torch.no_grad()
def test_its_numbers_are_those_of_the_model(modular_path, tmp_path):
    """One run in a process of its own: lm_eval sets up logging and warnings as it likes."""
    pytest.importorskip("lm_eval", reason=REASON)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    for name, text in TASKS.items():
        where = f"task: own_{name}\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(where + COMMON + text)
    command = [
        *(sys.executable, "-m", "robustgate.lm.harness"),
        *("--model_args", f"pretrained={modular_path}", "--include_path", str(tmp_path)),
        *("--tasks", ",".join(f"own_{name}" for name in TASKS), "--batch_size", "2"),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    offline = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    import os

    done = subprocess.run(
        command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]

    model, tokenizer = open_model(modular_path)
    samples = {name: read_samples(tmp_path / "out", f"own_{name}") for name in TASKS}
    for place, row in enumerate(CHOICES):
        expected = [log_likelihood(model, tokenizer, row["text"], one) for one in row["choices"]]
        answers = samples["choose"][place]["filtered_resps"]
        # float32, other batches; lm_eval takes one more log_softmax
        for (value, greedy), answer in zip(expected, answers, strict=True):
            assert number(answer[0]) == pytest.approx(value, abs=1e-3)
            assert str(answer[1]) == str(greedy)
        best = max(range(len(expected)), key=lambda k: expected[k][0])
        assert samples["choose"][place]["acc"] == float(best == row["answer"])
        likely = samples["likely"][place]["filtered_resps"][0]
        assert number(likely[0]) == pytest.approx(expected[0][0], abs=1e-3)

        ids = torch.tensor([encode_prompt(tokenizer, row["text"])])
        made = model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
        text = tokenizer.decode(made, skip_special_tokens=True).split("\n")[0]
        assert samples["write"][place]["filtered_resps"] == [text]

        whole = log_likelihood(model, tokenizer, "", row["text"])[0]
        assert number(samples["roll"][place]["filtered_resps"][0]) == pytest.approx(whole, abs=1e-3)
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert set(results["config"]["model_sha"]) == {"code", "prose"}
    assert results["config"]["model"] == "robustgate"


@torch.no_grad()
def test_bos_is_kept_where_a_text_is_longer_than_the_context(modular_path):
    """A request loses the beginning of its text; a document is read in windows behind BOS each."""
    pytest.importorskip("lm_eval", reason=REASON)
    from lm_eval.api.instance import Instance

    from robustgate.lm.harness_model import ModularLM

    lm = ModularLM(str(modular_path), batch_size=2)
    assert lm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    bos, text, more = lm.prefix_token_id, ("def return the river ran " * 30).strip(), " quiet"
    size, tokens = lm.max_length, lm.tok_encode(text)[1:]
    assert len(tokens) > 2 * size

    def expected(ids, count):
        ids = torch.tensor([ids], device=lm.device)
        rows = lm.model(ids[:, :-1]).logits[0, -count:]
        return float(rows.gather(1, ids[0, -count:, None]).sum())

    def ask(kind, *arguments):
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    whole = lm.tok_encode(text + more)[1:]
    count = len(whole) - len(tokens)
    found = lm.loglikelihood([ask("loglikelihood", text, more)], disable_tqdm=True)[0][0]
    assert found == pytest.approx(expected([bos, *whole[-size:]], count), abs=1e-3)
    found = lm.loglikelihood_rolling([ask("loglikelihood_rolling", text)], disable_tqdm=True)[0]
    total, last = 0.0, len(tokens) % size
    for start in range(0, len(tokens) - last, size):
        total += expected([bos, *tokens[start : start + size]], size)
    total += expected([bos, *tokens[-size:]], last) if last else 0.0
    assert found == pytest.approx(total, abs=1e-2)  # float32 sums of hundreds of terms


def read_samples(folder, task):
    lines = next(folder.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])


def number(value):
    while isinstance(value, list):
        value = value[0]
    return float(value)
