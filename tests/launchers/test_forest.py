import functools
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from launch import run_launcher
from saved_models import make_data, make_model
from transformers import BertConfig

from megamod.errors import UserError
from megamod.states.forest import Expert, Parent, open_forest

ROOT = Path(__file__).resolve().parents[2]


forest = functools.partial(run_launcher, "forest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("forest")
    for name in ("law", "med"):
        make_model(root / name, domains=[name])
    make_model(root / "mixed", "feedforward")
    BertConfig().save_pretrained(root / "bert")
    shutil.copytree(root / "law", root / "cut")
    (root / "cut" / "model.safetensors").unlink()
    (root / "law" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (root / "med" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "version": "1"}')
    return root


def test_experts_come_and_go(folder):
    for name in ("law", "med"):
        done = forest("add", "--forest", folder, "--path", folder / name)
        assert done.returncode == 0, done.stderr
    done = forest(
        *("add", "--forest", folder, "--path", folder / "mixed", "--member", "code"),
        *("--domain", "python"),
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["domain", "law", "med", "python"]
    assert f"{folder / 'mixed'} (code)" in lines[3]
    done = forest("remove", "--forest", folder, "--domain", "med", "python")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["domain", "law"]
    assert open_forest(folder).domains == ("law",)
    assert forest("list", "--forest", folder).stdout == done.stdout
    # The forest has the tokenizer of its experts, and takes no expert with another.
    assert (folder / "tokenizer.json").read_bytes() == (folder / "law/tokenizer.json").read_bytes()
    tokenizer = folder / "med" / "tokenizer.json"
    original = tokenizer.read_text()
    tokenizer.write_text('{"model": {"vocab": {"b": 0}}}')
    done = forest("add", "--forest", folder, "--path", folder / "med")
    assert done.returncode == 2 and "their tokenizers differ" in done.stderr
    tokenizer.write_text(original)


def test_upgrade_replaces_one_expert_in_its_position(tmp_path, monkeypatch, capsys):
    for name in ("law", "med", "law2"):
        make_model(tmp_path / name, domains=[name])

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["forest.py", *words, "--forest", str(tmp_path / "f")])
        runpy.run_path(str(ROOT / "launchers" / "forest.py"))["main"]()

    run("add", "--path", str(tmp_path / "law"))
    run("add", "--path", str(tmp_path / "med"))
    run("upgrade", "--domain", "law", "--path", str(tmp_path / "law2"))
    assert "law2" in capsys.readouterr().out.splitlines()[-2]
    experts = open_forest(tmp_path / "f").experts
    assert [(e.domain, e.path.name) for e in experts] == [("law", "law2"), ("med", "med")]
    with pytest.raises(UserError, match="no expert of domain 'x'; there are law, med"):
        run("upgrade", "--domain", "x", "--path", str(tmp_path / "law2"))
    with pytest.raises(UserError, match="--domain is missing"):
        run("upgrade", "--path", str(tmp_path / "law2"))
    for verb in ("add", "upgrade"):
        with pytest.raises(UserError, match=f"--domain law med: {verb} takes one name"):
            run(verb, "--domain", "law", "med", "--path", str(tmp_path / "law2"))


def test_a_branch_is_a_checkpoint(folder, tmp_path):
    done = forest(
        *("branch", "--parents", folder / "law", folder / "med", "--weights", 0.25, 0.75),
        *("--domain", "tax", "--output_dir", tmp_path / "tax"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tax" / "checkpoints" / "step-0" / "manifest.json").exists()
    assert "resumes from here" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a verb is missing"),
        (("plant",), "'plant' is none of list add remove upgrade branch"),
        (("list",), "--forest is missing"),
        (("list", "--forest", "nowhere"), "holds no expert"),
        (("add", "--forest", "new", "--path", "{}/mixed"), "--member must be one of"),
        (("add", "--forest", "new", "--path", "{}/bert", "--domain", "x"), "'bert'"),
        (("add", "--forest", "new", "--path", "{}/cut", "--domain", "x"), "there are no weights"),
        (("remove", "--forest", "nowhere", "--domain", "x"), "holds no expert"),
        (("remove", "--forest", "{}", "--domain", "law"), "these are all of its experts"),
        (("branch", "--domain", "x", "--output_dir", "o"), "one of --parents and --forest"),
        (("branch", "--parents", "{}/law", "--output_dir", "o"), "--domain is missing"),
        (
            ("branch", "--parents", "nowhere", "--domain", "x", "--output_dir", "o"),
            "no run, no checkpoint and no model",
        ),
        (
            (
                "branch",
                "--weights",
                "heavy",
                "--parents",
                "{}/law",
                "--domain",
                "x",
                "--output_dir=o",
            ),
            "--weights: ['heavy'] is not allowed",
        ),
    ],
)
def test_mistakes_end_with_2_and_one_message(folder, tmp_path, arguments, message):
    done = forest(*(str(argument).format(folder) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_pretraining_goes_on_from_a_branch(tmp_path):
    """A seed of 4 steps of 6 on two domains, then 2 steps of an expert on one of them alone."""
    data, seed, law = make_data(tmp_path / "bin"), tmp_path / "seed", tmp_path / "law"
    common = ("--data", data, "--max_seq_length", 8, "--max_steps", 6, "--logging_steps", 1)
    common += ("--hidden_size", 16, "--num_attention_heads", 2, "--report_to", "none")
    common += ("--per_device_train_batch_size", 2)
    seeded = run_launcher(
        *("pretrain", *common, "--domains", "law", "code", "--global_batch_size", 4),
        *("--save_steps", 1, "--stop_step", 4, "--output_dir", seed),
    )
    assert seeded.returncode == 0, seeded.stderr
    done = forest(
        *("branch", "--parents", seed, "--share", 0.5, "--domain", "law", "--output_dir", law)
    )
    assert done.returncode == 0, done.stderr
    assert [item.name for item in (law / "checkpoints").iterdir()] == ["step-2"]
    wrong = run_launcher(
        "pretrain", *common, "--learning_rate", 1, "--domains=law", "--output_dir", law
    )
    assert wrong.returncode == 2 and "learning_rate: 0.0005 then, 1.0 now" in wrong.stderr
    trained = run_launcher(
        "pretrain", *common, "--domains", "law", "--seed", 8, "--output_dir", law
    )
    assert trained.returncode == 0, trained.stderr
    rates = {}
    for run in (seed, law):
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rates[run] = {r["step"]: r["lr"] for r in records if "lr" in r}
    # The schedule is that of six steps, entered where the parent was.
    assert list(rates[law]) == [3, 4, 5, 6] and rates[law][3] == rates[seed][3]
    state = json.loads((law / "checkpoints" / "step-6" / "state.json").read_text())
    assert state["state"]["data_step"] == 4 and state["state"]["tokens"].keys() == {"law"}
    assert state["settings"]["seed"] == 8 and "branched" not in state
    done = forest("add", "--forest", tmp_path, "--path", law)
    assert done.returncode == 0, done.stderr
    (built,) = open_forest(tmp_path).experts
    assert built == Expert(
        domain="law",
        path=law / "model",
        parents=(Parent(path="seed/checkpoints/step-2", weight=1.0),),
        seed=8,
        start_update=2,
        updates=6,
        tokens=state["state"]["tokens"]["law"],
        data_digest=state["settings"]["data digest"],
        config_digest=built.config_digest,
    )
    assert len(built.config_digest) == 64
    assert run_launcher("verify", tmp_path).returncode == 0
