import json
import math

import pytest

from megamod.evaluation.perplexity import DENSE, Score
from megamod.evaluation.perplexity_report import (
    average_perplexity,
    format_comparison,
    format_score_lines,
    make_comparison_record,
    make_heat_map,
    write_perplexity_report,
)


def score(perplexity: float, bytes: int = 0) -> Score:
    return Score(nll=8 * math.log(perplexity), tokens=8, bytes=bytes)


EXPERTS = {
    "law": {"law": score(4.0, 16), "code": score(64.0, 32)},
    "code": {"law": score(16.0, 16), "code": score(8.0, 32)},
}
OWN = {"law": {"law": score(4.0, 16)}, "code": {"code": score(8.0, 32)}}
BASELINE = {DENSE: {"law": score(8.0, 16), "code": score(16.0, 32)}}


@pytest.fixture
def run(tmp_path):
    record = {"step": 5, "loss": 2.0, "loss_by_domain": {"law": 1.0, "code": 3.0}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


def test_report_of_a_run_with_experts(run):
    output = write_perplexity_report(run, EXPERTS, "valid", 5)
    saved = json.loads((run / "perplexity.json").read_text())
    assert saved["step"] == 5 and saved["split"] == "valid"
    assert saved["perplexity"]["law"] == pytest.approx({"law": 4.0, "code": 64.0})
    assert saved["mean_of_own"] == pytest.approx(6.0)
    assert saved["bits_per_byte"] == pytest.approx({"law": 1.0, "code": 0.75})
    assert saved["tokens"] == {"law": 8, "code": 8}
    assert {path.name for path in run.glob("*.png")} == {"loss.png", "experts.png"}
    assert "mean over domains, each under its own expert: 6.00" in output
    assert str(run / "model") in output and str(run / "experts.png") in output


def test_report_of_a_dense_run_has_no_heat_map(run):
    output = write_perplexity_report(run, BASELINE, "test", 5)
    assert {path.name for path in run.glob("*.png")} == {"loss.png"}
    assert "mean over domains: 12.00\n" in output and "experts.png" not in output


def test_the_row_of_a_new_expert_has_its_name(run):
    output = write_perplexity_report(run, {DENSE: {"law": score(4.0)}}, "test", 5, "law")
    assert [line.split() for line in output.splitlines()[2:4]] == [
        ["expert", "\\", "text", "law"],
        ["law", "4.00"],
    ]
    assert list(json.loads((run / "perplexity.json").read_text())["perplexity"]) == [DENSE]


def test_bits_per_byte_of_unknown_text_are_null(run):
    output = write_perplexity_report(run, {DENSE: {"law": score(4.0)}}, "test", 5)
    assert "mean over domains" not in output and "*" not in output
    assert json.loads((run / "perplexity.json").read_text())["bits_per_byte"] == {"law": None}


def test_mean_weighs_domains_alike():
    scores = {"a": Score(100 * math.log(3), 100), "b": Score(math.log(5), 1)}
    assert average_perplexity(scores) == pytest.approx(4.0)


def test_models_side_by_side():
    output = format_comparison({"demix": EXPERTS, "dense": BASELINE}, ["code", "law"], "test")
    matrix, perplexity, bits = output.split("\n\n")
    assert matrix.splitlines()[0] == "test perplexity of demix, by expert"
    assert [line.split() for line in perplexity.splitlines()[1:]] == [
        ["model", "\\", "text", "code", "law", "mean"],
        ["demix", "8.00*", "4.00*", "6.00*"],
        ["dense", "16.00", "8.00", "12.00"],
    ]
    assert [line.split() for line in bits.splitlines()[2:]] == [
        ["demix", "0.750*", "1.000*", "0.875*"],
        ["dense", "1.000", "1.500", "1.250"],
    ]


def test_own_scores_alone_need_no_matrix_and_unknown_bytes_no_second_table():
    output = format_comparison({"demix": OWN}, ["law", "code"], "test")
    assert "by expert" not in output and output.count("\n\n") == 1
    output = format_comparison({"dense": {DENSE: {"law": score(4.0)}}}, ["law"], "test")
    assert "bits per byte" not in output


def test_a_model_without_expert_for_the_text_is_only_in_the_matrix():
    other = {"news": {"law": score(9.0)}, "art": {"law": score(7.0)}}
    output = format_comparison({"other": other}, ["law"], "test")
    assert "9.00" in output and "own expert" not in output
    assert make_comparison_record({"other": other})["other"]["mean_of_own"] is None
    assert "9.00" in format_comparison({"one": {"news": {"law": score(9.0)}}}, ["law"], "test")


def test_record_holds_the_same_numbers():
    record = make_comparison_record({"demix": EXPERTS, "own": {**OWN, "news": {}}})
    assert record["demix"]["perplexity"]["code"] == pytest.approx({"law": 16.0, "code": 8.0})
    assert record["demix"]["bits_per_byte"]["law"] == pytest.approx({"law": 1.0, "code": 1.5})
    assert record["demix"]["tokens"] == {"law": 8, "code": 8}
    assert record["demix"]["bytes"] == {"law": 16, "code": 32}
    assert record["own"]["own"] == pytest.approx({"law": 4.0, "code": 8.0})
    assert record["own"]["mean_of_own"] == pytest.approx(6.0)
    assert list(record["own"]["nll"]) == ["law", "code"]


def test_score_lines():
    lines = [
        json.loads(line)
        for line in format_score_lines({"a": EXPERTS, "b": BASELINE}, "test").splitlines()
    ]
    assert [(line["model"], line["expert"], line["dataset"]) for line in lines] == [
        ("a", "law", "law"),
        ("a", "law", "code"),
        ("a", "code", "law"),
        ("a", "code", "code"),
        ("b", None, "law"),
        ("b", None, "code"),
    ]
    assert lines[1]["ppl"] == pytest.approx(64.0) and lines[1]["split"] == "test"
    assert lines[1]["bits_per_byte"] == pytest.approx(8 * 6 / 32)
    assert lines[1]["nll"] == pytest.approx(8 * math.log(64)) and lines[1]["tokens"] == 8


def strict(text: str) -> object:
    """JSON as readers other than Python's take it."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_perplexity_beyond_all_numbers_is_null_in_files(run):
    endless = {DENSE: {"law": Score(1e6, 1), "code": score(4.0)}}
    assert math.isinf(endless[DENSE]["law"].perplexity)
    record = {"step": 6, "split": "valid", "perplexity": {"law": None, "code": 3.0}}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    output = write_perplexity_report(run, endless, "valid", 5)
    saved = strict((run / "perplexity.json").read_text())
    assert saved["perplexity"][DENSE] == {"law": None, "code": pytest.approx(4.0)}
    assert saved["mean_of_own"] is None and "inf" in output
    line = strict(format_score_lines({"m": endless}, "test").splitlines()[0])
    assert line["ppl"] is None and (line["nll"], line["tokens"]) == (1e6, 1)


def test_rows_of_the_heat_map():
    assert list(make_heat_map({"demix": EXPERTS})) == ["law", "code"]
    rows = make_heat_map({"demix": EXPERTS, "own": OWN, "dense": BASELINE})
    assert list(rows) == ["demix law", "demix code", "own", "dense"]
    assert rows["own"] == pytest.approx({"law": 4.0, "code": 8.0})
