import functools
import json
import re
from pathlib import Path

import pytest
import torch
from launch import run_launcher
from saved_models import TOKENS, make_data, make_model

from megamod.errors import UserError
from megamod.flags import parse_args
from megamod.runs.studies.ensemble import evaluate_ensemble
from megamod.runs.studies.ensemble_args import EnsembleArgs


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    make_data(folder / "bin")
    make_model(folder / "demix", untie="feedforward")
    return folder


launch = functools.partial(run_launcher, "eval_ensemble")


def test_estimate_then_score(root, tmp_path):
    files = {name: tmp_path / name for name in ("mixed.json", "mixed.jsonl")}
    common = ("--forest", root / "demix", "--data", root / "bin")
    done = launch(
        *(*common, "--domain", "law", "code", "--rule", "history", "--removal_test"),
        *("--output", files["mixed.json"], "--jsonl", files["mixed.jsonl"]),
        *("--plot", tmp_path / "along_{domain}.png", "--cache_dir", tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads(files["mixed.json"].read_text())
    law = saved["domains"]["law"]
    assert law["tokens"] == TOKENS["law"] and f"{law['perplexity']:.2f}" in done.stdout
    assert "without art" in done.stdout and "bits per byte" in done.stdout
    lines = [json.loads(line) for line in files["mixed.jsonl"].read_text().splitlines()]
    last = [line for line in lines if line["dataset"] == "law" and line["split"] == "test"][-1]
    assert last["ppl"] == law["perplexity"] and len(last["exp_avg_posterior"]) == 3
    prior = json.loads((tmp_path / "prior_law.json").read_text())
    assert prior["domains"] == ["law", "code", "art"] and sum(prior["prior"]) == pytest.approx(1)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("mixed.json", "mixed.jsonl", "prior_law.json", "prior_code.json", "cache"),
        *("along_law.png", "along_code.png"),
    }
    # With the file in place of the estimate the numbers stay.
    output = tmp_path / "again.json"
    args = parsed(
        root, "--prior", tmp_path / "prior_{domain}.json", "--rule", "history", "--output", output
    )
    evaluate_ensemble(args, torch.device("cpu"))
    again = json.loads(output.read_text())["domains"]["law"]
    assert again["perplexity"] == pytest.approx(law["perplexity"], rel=1e-6)


def test_the_estimate_alone(root, tmp_path, capsys):
    output = tmp_path / "prior.json"
    args = parsed(root, "--estimate_only", "--prior_output", output, "--prior_sequences", 3)
    results = evaluate_ensemble(args, torch.device("cpu"))
    written = json.loads(output.read_text())
    assert written["text"] == {
        "data_digest": written["text"]["data_digest"],
        "domain": "law",
        "split": "valid",
        "sequences": 3,
    }
    assert tuple(written["prior"]) == results["law"].prior.weights
    assert f"prior on law: {output}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]


def test_a_mistake_is_told_in_one_paragraph(root):
    done = launch("--forest", root / "demix", "--data", root / "bin", "--domain", "novel")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search("--domain: .* has no text of 'novel'; its domains are law", done.stderr)


def parsed(root: Path, *flags: object) -> EnsembleArgs:
    common = ["--forest", root / "demix", "--data", root / "bin"]
    common += [] if "--domain" in flags else ["--domain", "law"]
    return parse_args(EnsembleArgs, argv=[str(item) for item in (*common, *flags)])[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--domain", "law", "law"), "--domain: 'law' is named twice"),
        (("--experts", "law", "med"), "--experts: .* has no expert 'med'"),
        (("--topk", 4), "--topk 4: there are 3 experts, give 3 or less"),
        (("--prior", "PRIOR"), "prior .*: 2 weights for 3 domains"),
        (("--prior", "nowhere.json"), r"prior nowhere\.json cannot be read"),
        (("--prior", "x", "--estimate_only"), "--estimate_only and --prior x"),
        (("--plot", "x.png", "--estimate_only"), "--plot x.png: nothing is scored"),
        (("--plot", "x.png", "--domain", "law", "art"), "several domains need {domain} in"),
        (("--prior_output", "x", "--mode", "uniform_prior"), "x: no prior is estimated"),
        (("--temperature", 2), "go with --rule history"),
        (("--first_over_all", "--rule", "history"), "goes with --rule last_token"),
        (("--cache_dir", "prior.json"), "--cache_dir prior.json: File exists"),
        (("--output", "no/such/place.json"), "--output .*: there is no folder no/such"),
        (("--mixing_batch_size", 3), "--per_device_eval_batch_size 8: must be a multiple of"),
        (("--cache_dir", "x", "--in_memory"), "--cache_dir x: --in_memory does not use a cache"),
        (("--max_seq_length", 99), "--max_seq_length 99"),
        (("--rule", "bayes"), "--rule: 'bayes' is not allowed"),
        (("--forest", "nowhere"), "nowhere"),
    ],
)
def test_what_does_not_fit_is_told(root, tmp_path, monkeypatch, flags, message):
    prior = {"format": 1, "domains": ["law", "code", "art"], "prior": [0.5, 0.5]}
    (tmp_path / "prior.json").write_text(json.dumps(prior))
    monkeypatch.chdir(tmp_path)
    flags = [tmp_path / "prior.json" if flag == "PRIOR" else flag for flag in flags]
    with pytest.raises(UserError, match=message):
        evaluate_ensemble(parsed(root, *flags), torch.device("cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["prior.json"]


def test_experts_of_different_vocabularies(root, tmp_path):
    make_model(tmp_path / "law")
    make_model(tmp_path / "code", vocab_size=40)
    with pytest.raises(UserError, match="different vocabularies"):
        evaluate_ensemble(parsed(root, "--forest", tmp_path), torch.device("cpu"))
    for folder in ("law", "code"):
        make_model(tmp_path / "other" / folder, vocab_size=40)
    with pytest.raises(UserError, match="has a vocabulary of 40"):
        evaluate_ensemble(parsed(root, "--forest", tmp_path / "other"), torch.device("cpu"))
