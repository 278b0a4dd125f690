"""The page about runs: its sections, numbers and figures; nothing comes from elsewhere."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from launch import launch

from megamod.errors import UserError
from megamod.evaluation.run_report import write_run_report

DOMAINS = ("law", "med & bio")
EMPTY = {"meta", "link", "img", "br", "path", "use", "rect"}


def make_run(folder, *, rate: float, loads: bool = False):
    """The files of a pretraining run of three steps."""
    folder.mkdir(parents=True)
    records = []
    for step in (1, 2, 3):
        record = {
            "step": step,
            "tokens": 100 * step,
            "loss": 4.0 / step,
            "loss_by_domain": {domain: 4.0 / step for domain in DOMAINS},
            "tokens_per_second": 1000.0 * step,
            "memory_bytes": 2_000_000_000,
            "skipped": 0,
        }
        if loads:
            record |= {f"load/{d}/{e}": 0.5 for d in DOMAINS for e in ("a", "b")}
        records.append(record)
    records.append({"step": 3, "perplexity": dict.fromkeys(DOMAINS, 7.5), "split": "valid"})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    matrix = {a: {b: 7.0 + (a != b) for b in DOMAINS} for a in DOMAINS}
    scores = {"step": 3, "split": "valid", "perplexity": matrix, "mean_of_own": 7.0}
    (folder / "perplexity.json").write_text(json.dumps(scores))
    (folder / "run.yaml").write_text(f"seed: 1\nlearning_rate: {rate}\nmodel: <b>tiny</b>\n")
    environment = {"cpus": 2, "versions": {"torch": "2.13.0"}}
    (folder / "env.json").write_text(json.dumps(environment))
    return folder


def make_studies(root):
    """A campaign's mixture, a finetuning run, a sweep and a study of barriers."""
    campaign = root / "campaign"
    (campaign / "evaluation").mkdir(parents=True)
    prior = {"law": 0.75, "med": 0.25}
    mixture = {"split": "test", "domains": {"law": {"prior": prior, "perplexity": 6.125}}}
    (campaign / "evaluation" / "mixture.json").write_text(json.dumps(mixture))
    finetuned = {"task": {"name": "sst-2"}, "num_instances": 2, "task_score": 0.875}
    finetuned |= {"instances_per_second": 321.5}
    row = {"task": "rte", "model": "mux", "num_instances": 5, "seeds": 1, "deviation": {}}
    row |= {"mean": {"task_score": 0.5, "instances_per_second": 90.0}}
    barrier = {"mlm": {"vanilla": {"barrier": [1.5, 0.1]}, "aligned": {"barrier": [0.5, 0.1]}}}
    for name, file, content in (
        ("sst2", "results.json", finetuned),
        ("sweep", "summary.json", [row]),
        ("barrier", "results.json", barrier),
    ):
        (root / name).mkdir()
        (root / name / file).write_text(json.dumps(content))
    return [campaign, root / "sst2", root / "sweep", root / "barrier"]


class Page(HTMLParser):
    """Elements and text of a page; all elements that are opened are closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.rows, self.words, self.ids, self.links = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given_attributes = dict(attributes)
        self.ids += [given_attributes["id"]] if "id" in given_attributes else []
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append(([], given_attributes.get("class")))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][0].append(text)
        self.words.append(text.strip())

    def find_row(self, name: str):
        """Cells and class of the row with this first cell."""
        return next((cells[1:], mark) for cells, mark in self.rows if cells[:1] == [name])


def test_the_page_shows_every_kind_of_run(tmp_path):
    runs = [
        make_run(tmp_path / "one", rate=0.1),
        make_run(tmp_path / "two", rate=0.2, loads=True),
        *make_studies(tmp_path),
    ]
    output = tmp_path / "page.html"
    sections = write_run_report(runs, output)
    text = output.read_text()
    page = Page(text)
    assert sections == [
        "Scores",
        "Training loss",
        "Loss and perplexity by domain",
        "Perplexity by expert and domain",
        "Posterior of the experts",
        "Load of the experts",
        "Score and throughput",
        "Loss barriers",
        "Settings",
        "Environment",
    ]
    assert re.findall(r"<h2>(.*?)</h2>", text) == sections
    # Nothing is loaded: links point into the page, and ids are unique.
    inside = {link[1:] for link in page.links if link.startswith("#")}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert len(page.ids) == len(set(page.ids)) and inside and inside <= set(page.ids)
    assert not re.search(r"<script|@import|url\((?!#)", text)
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) == 9
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    words = " ".join(page.words)
    for word in ("med & bio", "vanilla", "N = 5", "sst-2", "rte", "7.0", "aligned"):
        assert word in words, word
    columns = 6
    missing = ["–"] * (columns - 2)
    assert page.find_row("training loss") == (["1.3333", "1.3333", *missing], None)
    assert page.find_row("tokens per second, median")[0][:2] == ["2000", "2000"]
    assert page.find_row("perplexity of the mixture, law")[0][2] == "6.125"
    assert page.find_row("instances per second")[0][3] == "321.5"
    assert page.find_row("model")[0][0] == "<b>tiny</b>" and "<b>" not in text
    assert page.find_row("versions.torch")[0][:2] == ["2.13.0", "2.13.0"]


def test_differences_are_marked_and_a_page_can_be_repeated(tmp_path):
    runs = [make_run(tmp_path / n / "run", rate=r) for n, r in (("a", 0.1), ("b", 0.2))]
    write_run_report(runs, tmp_path / "page.html")
    first = (tmp_path / "page.html").read_text()
    page = Page(first)
    assert page.find_row("learning_rate") == (["0.1", "0.2"], "differs")
    assert page.find_row("seed") == (["1", "1"], None)
    assert "<title>a/run, b/run</title>" in first
    write_run_report(runs, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == first


def test_one_expert_on_one_domain_has_no_matrix(tmp_path):
    run = make_run(tmp_path / "run", rate=0.1)
    scores = json.loads((run / "perplexity.json").read_text())
    for cells, count in ({"a": 7.0, "b": 8.0}, 1), ({"a": 7.0, "b": None}, 0):
        scores["perplexity"] = {"dense": cells}
        (run / "perplexity.json").write_text(json.dumps(scores))
        sections = write_run_report([run], tmp_path / "page.html")
        assert sections.count("Perplexity by expert and domain") == count


def test_the_command_and_its_refusals(tmp_path, capsys):
    run, other = (make_run(tmp_path / name, rate=0.1) for name in ("run", "other/run"))
    launch("report", run, "--output", tmp_path / "r.html")
    assert "r.html: Scores, Loss and perplexity by domain" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    (tmp_path / "prior.json").write_text("{}")
    for words, message in (
        ((tmp_path / "absent",), "there is no such run"),
        ((tmp_path / "empty",), "has no metrics.jsonl, perplexity.json"),
        ((tmp_path / "prior.json",), "is no result of megamod eval-ensemble"),
        ((other, run, run), f"{run}: is named twice"),
        ((run, "--output", tmp_path / "no" / "r.html"), "there is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            launch("report", *words)
