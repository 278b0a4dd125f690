import functools
import json

import pytest
from launch import run_launcher
from saved_models import DOMAINS, make_data, make_model, plain_perplexity

from megamod.models.lm.demix import DemixForCausalLM

launch = functools.partial(run_launcher, "eval_lm")


def test_two_models_side_by_side(tmp_path):
    data = make_data(tmp_path / "bin")
    folders = [make_model(tmp_path / "dense"), make_model(tmp_path / "demix", untie="feedforward")]
    output, plot, lines = (tmp_path / f"scores.{kind}" for kind in ("json", "png", "jsonl"))
    done = launch(
        *("--model", *folders, "--data", data, "--domains", "art", "law"),
        *("--output", output, "--plot", plot),
        *("--jsonl", lines, "--context_window", 0, "--experts", *DOMAINS),
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads(output.read_text())
    assert saved["split"] == "test" and list(saved["models"]) == [str(item) for item in folders]
    dense, demix = saved["models"].values()
    assert list(dense["perplexity"]) == ["dense"] and list(demix["perplexity"]) == list(DOMAINS)
    model, message = DemixForCausalLM.from_pretrained(folders[1]), done.stdout
    for expert in DOMAINS:
        expected = {d: plain_perplexity(model, data, d, expert) for d in ("art", "law")}
        assert demix["perplexity"][expert] == pytest.approx(expected, rel=1e-5)
        assert f"{expected['art']:.2f}" in message
    own_values = [demix["perplexity"][d][d] for d in ("art", "law")]
    assert demix["mean_of_own"] == pytest.approx(sum(own_values) / 2)
    assert f"megamod eval-ensemble --forest {folders[1]} --data {data} --domain art" in message
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(row["model"], row["expert"]) for row in rows[:3:2]] == [
        (str(folders[0]), None),
        (str(folders[1]), "law"),
    ]
    assert rows[2]["dataset"] == "art" and len(rows) == 2 + 2 * len(DOMAINS)
    assert rows[2]["ppl"] == demix["perplexity"]["law"]["art"]
    perplexity, bits = message.split("\n\n")[1:3]
    assert perplexity.splitlines()[1].split()[-3:] == ["art", "law", "mean"]
    assert perplexity.splitlines()[2].startswith(str(folders[0]))
    assert bits.startswith("test bits per byte")
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in tmp_path.iterdir()} == {
        *("bin", "dense", "demix", "scores.json", "scores.png", "scores.jsonl")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "D"], "--model is missing"),
        (["--model", "M", "--data", "D", "--splits", "test"], "nearest is '--split'"),
        (["--model", "M", "--data", "D", "--output", "nowhere/x.json"], "no folder nowhere"),
        (["--model", "M", "--data", "nowhere"], "--data nowhere: holds neither"),
    ],
)
def test_a_mistake_is_one_message_and_exit_2(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("UserError: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
