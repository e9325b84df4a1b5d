"""The report: self-contained, well-formed, and with the same numbers in both formats."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch

from robustgate.lm.corpus import Corpus
from robustgate.lm.evaluation.evaluate import evaluate_model
from robustgate.lm.evaluation.results import Evaluation
from robustgate.lm.evaluation.trace import Trace, mixed_document, trace_gate
from robustgate.lm.experts import ExpertSet
from robustgate.lm.gates.fit import fit
from robustgate.lm.modular import ModularModel
from robustgate.lm.report import write_report
from robustgate.lm.report.page import Cell, Page, Row, Section, Stat, Table
from robustgate.lm.report.palette import Palette
from robustgate.lm.report.svg import minus
from robustgate.lm.scoring.score import score
from robustgate.lm.store.log_probs import LogProbStore

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
    evaluate_model(
        *(model, corpora),
        monolith=experts_path / "code",
        development=folder / "valid",
        divergence_tokens=16,
        gradients=True,
        progress=False,
    )
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
        "<script",
        "<link",
        "@import",
        "url(",
    ):
        assert foreign not in re.sub(r'<div class="document">.*?</div>', "", html, flags=re.S)


def test_every_link_leads_to_a_section_of_the_page(pages):
    html, _ = pages
    links = re.findall(r'href="(.*?)"', html)
    assert len(links) == len(set(links)) >= 9
    assert {link.removeprefix("#") for link in links} == set(
        re.findall(r'<section id="(.*?)">', html)
    )


def test_html_is_well_formed(pages):
    html, _ = pages
    assert html.startswith("<!doctype html>")
    assert len(read_html(html)) >= 14
    figures = re.findall(r"<svg.*?</svg>", html, re.S)
    # worst case 2, one pair, gate, switch, removal, divergence 2, gradients, solver 2
    assert len(figures) == 11
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        for element in root.iter():
            assert "nan" not in str(element.attrib)


def test_html_and_markdown_print_the_same_tables(pages):
    html, markdown = pages
    assert read_html(html) == read_markdown(markdown)


def table_of(page, *, column, rows):
    """Return the first table with a column and so many rows, by the name of the row."""
    for table in read_html(page):
        if column in table[0] and len(table) == rows + 1:
            return {row[0]: row[1:] for row in table[1:]}
    raise AssertionError(f"no table of {rows} rows with a column {column}")


def test_tables_hold_the_evaluation(model, pages):
    evaluation = Evaluation.load(model.path)
    losses = table_of(pages[0], column="mean", rows=len(evaluation.systems))
    for system in evaluation.systems:
        own = [d.nll_per_token for d in system.domains]
        assert losses[system.label] == [f"{v:.3f}" for v in (*own, sum(own) / len(own))]
    worst = table_of(pages[0], column="worst domain", rows=len(evaluation.systems))
    for system in evaluation.systems:
        assert worst[system.label][0] == minus(str(system.worst_excess_per_document))
    removed = table_of(pages[0], column="without code", rows=2)
    for d, domain in enumerate(evaluation.domains):
        values = (evaluation.forgetting.whole[d], *evaluation.forgetting.without[d])
        assert removed[domain] == [f"{value:.3f}" for value in values]
    switch = table_of(pages[0], column="second half", rows=len(evaluation.switch.systems))
    for result in evaluation.switch.systems:
        assert switch[result.system][:2] == [f"{result.before:.3f}", f"{result.after:.3f}"]
    apart = table_of(pages[0], column="code, prose", rows=2)
    for d, domain in enumerate(evaluation.domains):
        together = evaluation.divergence.together[d]
        assert apart[domain] == [
            f"{together:.3f}",
            f"{evaluation.divergence.pairwise[d][0][1]:.3f}",
        ]
    assert model.sentence() in pages[1]
    for note in evaluation.notes:
        assert note in pages[1]


def test_emphasis_is_on_the_model_alone(pages):
    bold = re.findall(r"^\| \*\*(.+?)\*\* \|", pages[1], re.MULTILINE)
    assert set(bold) == {"robust Bayes mixture"}


def test_the_best_that_is_not_told_the_domain_is_marked_in_every_column(model, pages):
    evaluation = Evaluation.load(model.path)
    start = pages[1].index("Every system on every domain")
    lines = [line for line in pages[1][start:].splitlines() if line.startswith("| ")]
    rows = [line.strip(" |").split(" | ") for line in lines[1 : len(evaluation.systems) + 1]]
    for d in range(len(evaluation.domains)):
        shown = [f"{system.domains[d].nll_per_token:.3f}" for system in evaluation.systems]
        fair = [v for v, system in zip(shown, evaluation.systems, strict=True) if system.fair]
        for value, system, row in zip(shown, evaluation.systems, rows, strict=True):
            best = system.fair and value == min(fair)
            assert row[d + 1] == (f"**{value}**" if best else value)


def test_an_expert_has_one_colour_everywhere(model, pages):
    html, evaluation = pages[0], Evaluation.load(model.path)
    palette = Palette(evaluation)
    for name in evaluation.experts:
        style = palette.expert(name)
        assert f'<i class="{style}"></i>expert {name}' in html
        assert f'<td class="chip {style}">expert {name}</td>' in html
        others = set(re.findall(rf'<td class="chip (\w+)">expert {name}</td>', html))
        assert others == {style}
    best = evaluation.best_expert[0]
    assert palette.domain(evaluation.domains[0]) == palette.expert(best)
    assert palette.system(evaluation.system(evaluation.ours)) == "chosen"


def test_pointing_at_a_token_shows_the_weights(model, pages):
    trace = Trace.load(model.path)
    notes = re.findall(r'<span class="(c\d+)" style="--w:([\d.]+)" data-w="(.*?)">', pages[0], re.S)
    assert len(notes) == len(trace.tokens)
    for (style, strength, note), weights in zip(notes, trace.weights, strict=True):
        top = max(range(len(weights)), key=weights.__getitem__)
        assert style == f"c{top}"
        assert strength == f"{weights[top]:.2f}"
        assert note.splitlines()[0] == f"{weights[top]:.3f} {trace.experts[top]}"


def test_numbers_to_see_first_are_those_of_the_evaluation(model, pages):
    evaluation = Evaluation.load(model.path)
    ours, monolith = evaluation.system(evaluation.ours), evaluation.system("monolith")
    difference = ours.mean_nll_per_token - monolith.mean_nll_per_token
    values = re.findall(r"^- .+: \*\*(.+)\*\* \(", pages[1], re.MULTILINE)
    assert values[0] == f"{model.certificate.worst_case:.3f}"
    assert values[3] == minus(f"{difference:+.3f}")


def test_a_report_without_uniform_baseline_is_written(model, corpora, tmp_path):
    copy = fit(
        LogProbStore.open(model.path.parent / "valid"),
        tmp_path / "m",
        experts=model.open_experts(),
    )
    evaluate_model(
        *(copy, corpora),
        store=model.path / "scores",
        baselines=("oracle",),
        divergence_tokens=0,
        progress=False,
    )
    html = write_report(tmp_path / "m", tmp_path / "out").read_text()
    for absent in ("uniform Bayes mixture", "How different the experts are", "expert code</td>"):
        assert absent not in html
    read_html(html)


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


def test_trace_holds_the_posterior_before_every_token(model, experts_path, tmp_path):
    experts = ExpertSet.open(experts_path)
    corpora = [Corpus.of("one", ["def ä return\nyield"]), Corpus.of("two", ["the <river>\nran"])]
    prior = model.prior
    trace = trace_gate(model, experts, corpora, progress=False)
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


def test_stats_and_groups_of_a_page(tmp_path):
    page = Page("t", "lead", "head", (), "end", stats=(Stat("name", "-1.5", "a & b"),))
    html = page.write(tmp_path).read_text()
    assert "<dd>\N{MINUS SIGN}1.5</dd>" in html
    assert "a &amp; b" in html
    markdown = (tmp_path / "report.md").read_text()
    assert "- name: **\N{MINUS SIGN}1.5** (a & b)" in markdown


def test_says_on_how_many_domains_each_rival_loses(model, pages):
    evaluation = Evaluation.load(model.path)
    own = evaluation.system("robust Bayes mixture").domains
    counts = []
    names = ("monolith", "static uniform mixture", "previous-token gate", "uniform Bayes mixture")
    for name in names:
        rival = evaluation.system(name).domains
        wins = [b.nll_per_token - a.nll_per_token > 5e-4 for a, b in zip(own, rival, strict=True)]
        counts.append(f"the {name} on {sum(wins)}")
    assert (
        "Of 2 domains, the robust Bayes mixture has a lower loss (by 0.0005 nats per token or "
        f"more) than {', '.join(counts)}."
    ) in pages[1]


def test_says_so_when_the_solution_is_the_uniform_prior(model, pages):
    uniform = float((model.prior - 0.5).abs().max()) <= 0.005
    assert ("Here it is the uniform prior" in pages[1]) == uniform
