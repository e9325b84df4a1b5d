"""The demo: its text, its budget, and one quick run from end to end."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from robustgate.demo import QUICK, run_demo, text
from robustgate.demo.budget import EXPERT_CONFIG, STANDARD, monolith_config, parameters
from robustgate.demo.corpora import LARGEST_SOURCE, SHARES, cut, read_domains
from robustgate.demo.pipeline import balanced
from robustgate.lm.corpus import Corpus

SIZES = {"train": 30_000, "valid": 15_000, "test": 15_000}


@pytest.fixture(scope="module")
def domains():
    return read_domains(SIZES)


def paragraphs(domain, *splits):
    documents = [document for s in splits for document in domain.documents[s]]
    return [" ".join(p.split()) for d in documents for p in d.split("\n\n") if p.strip()]


def test_python_source_falls_apart_into_code_and_docstrings():
    source = '''\
#!/usr/bin/env python
"""Module prose."""
import os  # operating system

NAMES = [
    "a string in a list",  # stays
]


class A:
    """Class prose,

    in two paragraphs.
    """

    x = "not a # comment"

    def f(self):
        r"""Raw prose."""
        b"bytes are no prose"
        return """a value"""
'''
    code, docstrings = text.split_python(source)
    assert docstrings == ("Module prose.", "Class prose,\n\nin two paragraphs.", "Raw prose.")
    assert code == (
        'import os\n\nNAMES = [\n    "a string in a list",\n]\n\nclass A:\n\n'
        '    x = "not a # comment"\n\n    def f(self):\n\n        return """a value"""\n'
    )


def test_there_are_at_least_three_domains_of_the_size_asked_for(domains):
    assert len(domains) >= 3
    for domain in domains:
        for split, size in SIZES.items():
            length = sum(map(len, domain.documents[split]))
            # A split stops with the document that fills it.
            assert size <= length < size + max(map(len, domain.documents[split]))


def test_no_source_is_in_two_splits_of_any_domain(domains):
    where: dict[str, str] = {}
    for domain in domains:
        for split, sources in domain.sources.items():
            assert sources
            for source in sources:
                assert where.setdefault(source, split) == split


def test_no_source_fills_a_split():
    sizes = {"train": 4 * LARGEST_SOURCE, "valid": 2 * LARGEST_SOURCE, "test": LARGEST_SOURCE}
    for domain in read_domains(sizes):
        for split, size in sizes.items():
            assert len(domain.sources[split]) >= size / LARGEST_SOURCE


def test_held_out_splits_come_first_where_text_is_scarce():
    lines = (f"line {i} of a text that is soon over\n\n" * 3 for i in range(1_000))
    scarce = {"few": lambda rng: ((f"s{i}", line) for i, line in enumerate(lines))}
    rest = {name: text.DOMAINS[name] for name in ("unicode", "manual")}
    sizes = {"train": 60_000, "valid": 8_000, "test": 8_000}
    few = read_domains(sizes, readers=scarce | rest, document_size=60)[0]
    length = {split: sum(map(len, few.documents[split])) for split in sizes}
    assert length["valid"] >= 8_000
    assert length["test"] >= 8_000
    assert length["train"] < 60_000


def test_no_paragraph_occurs_twice(domains):
    found = [paragraph for domain in domains for paragraph in paragraphs(domain, *SHARES)]
    # Cutting a long paragraph between lines can leave two equal halves; whole ones are unique.
    whole = [paragraph for paragraph in found if len(paragraph) > 1200]
    assert len(set(whole)) == len(whole)
    assert len(set(found)) > 0.97 * len(found)


def test_no_paragraph_of_test_is_in_train(domains):
    train = {p for domain in domains for p in paragraphs(domain, "train")}
    for domain in domains:
        test = paragraphs(domain, "test")
        assert sum(len(p) for p in test if p in train) < 0.01 * sum(map(len, test))


def test_domains_differ_in_their_words(domains):
    words = {d.name: set(" ".join(d.documents["train"]).split()) for d in domains}
    for domain in domains:
        held_out = " ".join(domain.documents["test"]).split()
        known = {name: sum(w in vocabulary for w in held_out) for name, vocabulary in words.items()}
        assert max(known, key=known.__getitem__) == domain.name


def test_reading_is_a_function_of_the_seed():
    sizes = dict.fromkeys(SHARES, 6_000)
    first, again, other = (read_domains(sizes, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_documents_have_the_size_asked_for(domains):
    for domain in domains:
        for documents in domain.documents.values():
            lengths = sorted(map(len, documents))
            assert lengths[len(lengths) // 2] == pytest.approx(1300, rel=0.3)
            assert lengths[0] >= 1200 / 4
            assert "\f" not in "".join(documents)


def test_cut_ends_at_blank_lines_or_at_any_line_when_those_are_far():
    assert list(cut("aaaa\n\nbbbb\n\ncccc", 8)) == ["aaaa\n\nbbbb", "cccc"]
    assert list(cut("aaaa\n\nbbbb\n", 8)) == ["aaaa\n\nbbbb"]
    assert list(cut("11\n22\n33\n44", 4)) == ["11\n22", "33\n44"]
    assert list(cut("x" * 20, 6)) == ["x" * 20]
    assert list(cut("", 6)) == []


def without(monkeypatch, *modules):
    """Let the import of some modules fail, as in a slim installation."""
    real = importlib.import_module

    def slim(name, *args):
        if name in modules:
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", slim)


def test_without_the_manual_docstrings_of_compiled_modules_serve(monkeypatch):
    without(monkeypatch, "pydoc_data.topics")
    found = dict(text.language_manual(random.Random(0)))
    assert sum(map(len, found.values())) > 100_000
    assert not any(name.startswith("manual/python") for name in found)


def test_without_torch_headers_those_of_numpy_and_python_serve(monkeypatch):
    monkeypatch.setattr(text, "_package_folder", lambda package: Path("nowhere"))
    found = [name for name, _ in text.cpp_headers(random.Random(0))]
    assert any(name.endswith("ndarraytypes.h") for name in found)


def test_without_a_standard_library_on_disk_torch_serves(monkeypatch, tmp_path):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    name, code = next(text.python_code(random.Random(0)))
    assert name.startswith("lib/")
    assert code


def test_too_few_domains_are_refused_by_name():
    readers = {name: text.DOMAINS[name] for name in ("unicode", "manual")}
    readers["empty"] = lambda rng: iter(())
    with pytest.raises(RuntimeError, match=r"three domains.*carries unicode, manual"):
        read_domains(SIZES, readers=readers)


@pytest.mark.parametrize("experts", [3, 4, 5])
def test_monolith_is_the_narrowest_that_is_no_smaller_than_all_experts(experts):
    config = monolith_config(experts, STANDARD.vocab_size)
    width = config["hidden_size"] - 16
    narrower = {**config, "hidden_size": width, "intermediate_size": 3 * width}
    wanted = experts * parameters(EXPERT_CONFIG, STANDARD.vocab_size)
    assert parameters(narrower, STANDARD.vocab_size) < wanted
    assert parameters(config, STANDARD.vocab_size) >= wanted


def test_parameters_are_those_of_the_model():
    transformers = pytest.importorskip("transformers")
    for config in (EXPERT_CONFIG, monolith_config(5, 512)):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=512, **config))
        assert sum(p.numel() for p in model.parameters()) == parameters(config, 512)


def test_balanced_union_gives_every_corpus_the_same_length():
    union = balanced([Corpus.of("a", ["x" * 10] * 8), Corpus.of("b", ["y" * 10, "z" * 10])])
    text_of_union = "".join(union.documents)
    assert text_of_union.count("x") == text_of_union.count("y") + text_of_union.count("z") == 80
    assert text_of_union.count("y") == text_of_union.count("z")


TINY = replace(
    QUICK,
    train_characters=12_000,
    held_out_characters=6_000,
    vocab_size=400,
    seed_tokens=2_048,
    branch_tokens=1_024,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, budget=TINY, progress=False)


def test_result_has_every_system_on_every_domain(tiny):
    _, result = tiny
    kinds = [system.kind for system in result.evaluation.systems]
    domains = len(result.evaluation.domains)
    others = ["monolith", "soup", *["baseline"] * 6, "robust", "oracle", "bound", "bound"]
    assert kinds == ["expert"] * domains + others
    assert result.model.certificate.lower_bound <= result.model.certificate.upper_bound
    assert result.report.read_text().startswith("<!doctype html>")
    assert "How the models were trained" in result.report.with_name("report.md").read_text()
    assert json.loads(json.dumps(result.to_json()))["evaluation"]["systems"]


def test_monolith_reads_as_many_tokens_as_seed_and_experts_together(tiny):
    folder, result = tiny
    manifests = {
        name: json.loads((folder / name / "robustgate.json").read_text())
        for name in ("seed", "monolith", *(f"experts/{d}" for d in result.evaluation.domains))
    }
    together = sum(m["tokens"] for name, m in manifests.items() if name != "monolith")
    step = TINY.batch_size * TINY.context
    assert together - step < manifests["monolith"]["tokens"] <= together


def test_a_finished_demo_is_read_again(tiny):
    folder, first = tiny
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    again = run_demo(folder, budget=TINY, progress=False)
    assert again.evaluation == first.evaluation
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")} == times


def test_a_folder_with_another_demo_or_other_files_is_refused(tiny, tmp_path):
    folder, _ = tiny
    with pytest.raises(ValueError, match="another seed or budget"):
        run_demo(folder, budget=TINY, seed=1, progress=False)
    (tmp_path / "letter.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds other files"):
        run_demo(tmp_path, budget=TINY, progress=False)


def test_a_killed_demo_continues_and_every_number_is_the_same(tiny, tmp_path):
    _, first = tiny
    code = (
        "import os, sys\n"
        "from robustgate.demo import pipeline, run_demo\n"
        "from test_demo import TINY\n"
        "pipeline.fit = lambda *args, **keywords: os._exit(9)\n"
        f"run_demo({str(tmp_path / 'demo')!r}, budget=TINY, progress=False)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert killed.returncode == 9, killed.stderr
    assert (tmp_path / "demo" / "monolith").is_dir()
    again = run_demo(tmp_path / "demo", budget=TINY, progress=False)
    assert again.evaluation == first.evaluation
    assert again.report.read_text() == first.report.read_text()
