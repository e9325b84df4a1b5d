"""The report: self-contained, well-formed, and with the same numbers in both formats."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch

from robustgate.game import BayesGate
from robustgate.lm.corpus import Corpus
from robustgate.lm.evaluate import evaluate_model
from robustgate.lm.experts import ExpertSet
from robustgate.lm.figures import Bar, Line, areas, bars, lines
from robustgate.lm.fit import fit
from robustgate.lm.modular import ModularModel
from robustgate.lm.page import Cell, Page, Row, Section, Table
from robustgate.lm.report import write_report
from robustgate.lm.results import Evaluation
from robustgate.lm.score import score
from robustgate.lm.store import LogProbStore
from robustgate.lm.trace import Trace, mixed_document, trace_gate

VOID = {"meta", "br", "hr", "img"}


class Reader(HTMLParser):
    """Reads tables and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def read_html(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader.tables


def read_markdown(text):
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()]
        cells = [[cell.strip().strip("*").replace(r"\|", "|") for cell in row] for row in rows]
        tables.append([cells[0], *cells[2:]])
    return tables


@pytest.fixture(scope="module")
def model(tmp_path_factory, experts_path, corpora):
    """An evaluated model of two experts."""
    folder = tmp_path_factory.mktemp("report")
    experts = ExpertSet.open(experts_path)
    fit(score(experts, corpora, folder / "valid", progress=False), folder / "m", experts=experts)
    model = ModularModel.load(folder / "m")
    evaluate_model(model, corpora, monolith=experts_path / "code", progress=False)
    return model


@pytest.fixture(scope="module")
def pages(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    index = write_report(model.path, out)
    return index.read_text(), (out / "report.md").read_text()


def test_is_one_file_that_needs_no_other(pages):
    html, _ = pages
    for foreign in (
        "http:",
        "https:",
        "//",
        "src=",
        "href=",
        "<script",
        "<link",
        "@import",
        "url(",
    ):
        assert foreign not in re.sub(r'<div class="panel document">.*?</div>', "", html, flags=re.S)


def test_html_is_well_formed(pages):
    html, _ = pages
    assert html.startswith("<!doctype html>")
    assert len(read_html(html)) >= 7
    figures = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(figures) == 5
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        for element in root.iter():
            assert "nan" not in str(element.attrib)


def test_html_and_markdown_print_the_same_tables(pages):
    html, markdown = pages
    assert read_html(html) == read_markdown(markdown)


def test_tables_hold_the_evaluation(model, pages):
    tables = read_html(pages[0])
    evaluation = Evaluation.load(model.path)
    losses = {row[0]: row[1:] for row in tables[1][1:]}
    for system in evaluation.systems:
        assert losses[system.label] == [f"{d.nll_per_token:.3f}" for d in system.domains]
    assert model.sentence() in pages[1]


def test_emphasis_is_on_the_robust_mixture_alone(pages):
    bold = re.findall(r"^\| \*\*(.+?)\*\* \|", pages[1], re.MULTILINE)
    assert set(bold) == {"robust Bayes mixture"}


def test_a_report_without_uniform_baseline_is_written(model, corpora, tmp_path):
    copy = fit(
        LogProbStore.open(model.path.parent / "valid"),
        tmp_path / "m",
        experts=model.open_experts(),
    )
    evaluate_model(
        copy, corpora, store=model.path / "scores", baselines=("oracle",), progress=False
    )
    html = write_report(tmp_path / "m", tmp_path / "out").read_text()
    assert "uniform Bayes mixture" not in html


def test_a_model_that_was_not_evaluated_is_refused(model, tmp_path):
    fit(LogProbStore.open(model.path.parent / "valid"), tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="robustgate evaluate"):
        write_report(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_with_markup_is_shown_as_text(tmp_path):
    table = Table(("a<b", "x|y"), (Row((Cell("<script>"), Cell('&"|'))),), "caption <i>")
    page = Page("t & u", "lead", "head", (Section("s", ("1 < 2",), tables=(table,)),), "end")
    html = page.write(tmp_path).read_text()
    assert "<script>" not in html
    rows = [["a<b", "x|y"], ["<script>", '&"|']]
    assert read_html(html) == [rows]
    assert read_markdown((tmp_path / "report.md").read_text()) == [rows]


def test_mixed_document_takes_pieces_at_equal_distances():
    corpora = [Corpus.of(name, [f"{name}\n" * 400]) for name in "abcde"]
    text, starts = mixed_document(corpora, lengths=(10, 20, 40))
    assert [name for name, _ in starts] == ["a", "c", "e"]
    assert [text[at] for _, at in starts] == ["a", "c", "e"]
    assert [at for _, at in starts] == [0, 13, 36]  # each ends with a line and a blank one
    assert [name for name, _ in mixed_document(corpora[:1])[1]] == ["a"]
    assert [name for name, _ in mixed_document(corpora[:2])[1]] == ["a", "b"]


def test_trace_holds_the_posterior_before_every_token(experts_path, tmp_path):
    experts = ExpertSet.open(experts_path)
    corpora = [Corpus.of("one", ["def ä return\nyield"]), Corpus.of("two", ["the <river>\nran"])]
    prior = torch.tensor([0.7, 0.3], dtype=torch.float64)
    trace = trace_gate(BayesGate(prior), experts, corpora, progress=False)
    text, _ = mixed_document(corpora)
    store = score(experts, [Corpus.of("doc", [text])], tmp_path, progress=False)
    log_probs = store.token_log_probs("doc").double()
    evidence = torch.cat([torch.zeros(1, 2), log_probs]).cumsum(dim=0)[:-1]
    expected = torch.softmax(evidence + prior.log(), dim=-1)
    # Sums of at most 40 log-probabilities of size 10 in two orders: about 1e-13.
    assert torch.allclose(
        torch.tensor(trace.weights, dtype=torch.float64), expected, rtol=0, atol=1e-12
    )
    assert "".join(trace.tokens) == text
    assert [piece.domain for piece in trace.pieces] == ["one", "two"]
    first, second = trace.pieces
    assert (first.first, second.last) == (0, len(trace.tokens))
    assert first.last == second.first
    assert "".join(trace.tokens[second.first :]).startswith("the")
    trace.save(tmp_path)
    assert Trace.load(tmp_path) == trace


def test_bars_are_as_long_as_their_values():
    figure = bars("t", [Bar("a", 2, 1, 3, "2", "c0"), Bar("b", -1, -2, 0, "-1", "c1")], x_label="x")
    first, second = ElementTree.fromstring(figure).findall("rect")
    assert float(first.get("width")) == pytest.approx(2 * float(second.get("width")), rel=1e-2)
    end = float(second.get("x")) + float(second.get("width"))
    assert end == pytest.approx(float(first.get("x")), abs=0.11)  # both start at zero


def test_lines_leave_out_what_a_logarithm_cannot_show():
    figure = lines(
        "t", [Line("gap", [math.inf, 1.0, 0.1, 0.0], "c0")], x_label="x", y_label="y", log=True
    )
    (path,) = [
        p
        for p in ElementTree.fromstring(figure).findall("path")
        if "line" in p.get("class") and "axis" not in p.get("class")
    ]
    assert path.get("d").count("L") == 1


def test_areas_fill_the_figure():
    figure = areas("t", [(0.25, 0.75), (1.0, 0.0)], ["a", "b"], [("x", 0)], x_label="token")
    paths = [
        p.get("d")
        for p in ElementTree.fromstring(figure).findall("path")
        if p.get("class").startswith("area")
    ]
    heights = [{float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", d)} for d in paths]
    assert min(heights[0]) == min(heights[1])  # both reach 1
    assert max(heights[0]) > max(heights[1])  # only the first stands on 0


def test_says_on_how_many_domains_each_rival_loses(model, pages):
    evaluation = Evaluation.load(model.path)
    own = evaluation.system("robust Bayes mixture").domains
    counts = []
    for name in ("monolith", "static uniform mixture", "uniform Bayes mixture"):
        rival = evaluation.system(name).domains
        wins = [a.nll_per_token < b.nll_per_token for a, b in zip(own, rival, strict=True)]
        counts.append(f"the {name} on {sum(wins)}")
    assert (
        f"Of 2 domains, the robust mixture has a lower loss than {', '.join(counts)}." in pages[1]
    )


def test_says_so_when_the_solution_is_the_uniform_prior(model, pages):
    uniform = float((model.prior - 0.5).abs().max()) <= 0.005
    assert ("Here it is the uniform prior" in pages[1]) == uniform
