import hashlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from saved_models import DOMAINS, make_model

from megamod.errors import UserError
from megamod.folder_lock import Holder
from megamod.states.verify import check_path
from megamod.states.weights import extract_expert_weights, read_weights

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "launchers" / "merge.py"


def merge_here(monkeypatch, *arguments: object) -> str:
    """The command in this process, which saves the time to load torch; its error message."""
    spec = importlib.util.spec_from_file_location("merge_launcher", LAUNCHER)
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    monkeypatch.setattr(sys, "argv", [str(LAUNCHER), *map(str, arguments)])
    try:
        launcher.main()
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture
def elms(tmp_path):
    return [make_model(tmp_path / name) for name in ("a", "b", "c")]


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def check(folder: Path, states: list, shares: list[float]) -> None:
    """The folder holds the sum of these models with these factors."""
    result = read_weights(folder)
    assert result.keys() == states[0].keys()
    for name, tensor in result.items():
        expected = sum(share * state[name] for share, state in zip(shares, states, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


def test_flags_and_recipe_do_the_same(tmp_path, elms, monkeypatch, capsys):
    states = [read_weights(elm) for elm in elms]
    flags = ["--merge_method", "linear", "--models", *elms, "--weights", "0.5", "1", "0.5"]
    assert not merge_here(monkeypatch, *flags, "--output_dir", tmp_path / "flags")
    check(tmp_path / "flags", states, [0.25, 0.5, 0.25])
    output = capsys.readouterr().out
    assert "linear of 3 models" in output and "0.25" in output and "model.safetensors" in output

    raw = tmp_path / "raw"
    assert not merge_here(monkeypatch, *flags, "--no_normalize", "--output_dir", raw)
    check(raw, states, [0.5, 1, 0.5])

    pairs = zip(elms, (1, 2, 1), strict=True)
    models = [{"model": str(elm), "parameters": {"weight": weight}} for elm, weight in pairs]
    recipe = tmp_path / "merge.yml"
    recipe.write_text(json.dumps({"merge_method": "linear", "models": models}))
    more = ("--max_shard_size", "9K", "--output_dir", tmp_path / "recipe")
    assert not merge_here(monkeypatch, recipe, *more)
    assert len(list((tmp_path / "recipe").glob("model-*.safetensors"))) > 1
    same = read_weights(tmp_path / "recipe")
    assert all(torch.equal(same[k], t) for k, t in read_weights(tmp_path / "flags").items())


def test_an_equal_merge_is_not_written_again(tmp_path, elms, monkeypatch, capsys):
    output = tmp_path / "out"
    flags = ["--models", *elms[:2], "--weights", "1", "2", "--output_dir", output]
    assert not merge_here(monkeypatch, *flags)
    ((_, faults),) = check_path(output)
    assert faults == [] and "merge.json" in (output / "manifest.json").read_text()
    times = {file: file.stat().st_mtime_ns for file in output.iterdir()}
    capsys.readouterr()
    assert not merge_here(monkeypatch, *flags)
    assert f"done already, in {output}" in capsys.readouterr().out
    assert times == {file: file.stat().st_mtime_ns for file in output.iterdir()}

    exists = f"--output_dir {output}: exists already"
    flags[5] = "3"  # another weight
    assert merge_here(monkeypatch, *flags).startswith(exists)
    flags[5] = "2"
    assert merge_here(monkeypatch, *flags, "--copy_tokenizer", "false").startswith(exists)
    content = bytearray((elms[0] / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (elms[0] / "model.safetensors").write_bytes(content)  # another model under the same name
    assert merge_here(monkeypatch, *flags).startswith(exists)
    content[-1] ^= 1
    (elms[0] / "model.safetensors").write_bytes(content)
    assert not merge_here(monkeypatch, *flags)
    (output / "README.md").write_text("changed")
    ((_, faults),) = check_path(output)
    assert "README.md" in faults[0]
    assert merge_here(monkeypatch, *flags).startswith(exists)


def test_flags_of_the_merge_itself(tmp_path, elms, monkeypatch, capsys):
    models = [{"model": str(elm), "parameters": {"weight": 1, "density": 0.5}} for elm in elms[1:]]
    recipe = tmp_path / "merge.yml"
    content = {"merge_method": "dare_ties", "base_model": str(elms[0]), "models": models}
    recipe.write_text(json.dumps(content))
    (elms[0] / "tokenizer.json").write_text("{}")
    runs = {"x": ("-j", 1), "y": ("-j", 3), "z": ("--random_seed", 5, "--copy_tokenizer", "false")}
    for name, flags in runs.items():
        assert not merge_here(
            monkeypatch, recipe, *flags, "--quiet", "--output_dir", tmp_path / name
        )
    assert capsys.readouterr().out == ""
    a, b, c = (tmp_path / name / "model.safetensors" for name in runs)
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()
    assert (tmp_path / "x" / "tokenizer.json").exists()
    assert not (tmp_path / "z" / "tokenizer.json").exists()
    assert not merge_here(monkeypatch, recipe, "--dry_run")
    assert f"base  {elms[0]}" in capsys.readouterr().out


def test_experts_of_a_forest(tmp_path, monkeypatch, capsys):
    demix = make_model(tmp_path / "demix", untie="feedforward")
    state = read_weights(demix)
    experts = {domain: extract_expert_weights(state, domain) for domain in DOMAINS}
    prior = tmp_path / "prior.json"
    record = {"format": 1, "domains": list(reversed(DOMAINS)), "prior": [0.1, 0.3, 0.6]}
    prior.write_text(json.dumps(record | {"rule": "last_token", "text": None}))

    forest = ("--forest", demix, "--output_dir")
    assert not merge_here(monkeypatch, *forest, tmp_path / "all")
    check(tmp_path / "all", list(experts.values()), [1 / 3] * 3)
    assert not merge_here(monkeypatch, *forest, tmp_path / "prior", "--prior", prior)
    check(tmp_path / "prior", list(experts.values()), [0.6, 0.3, 0.1])
    assert not merge_here(monkeypatch, *forest, tmp_path / "top", "--prior", prior, "--topk", 2)
    check(tmp_path / "top", [experts["law"], experts["code"]], [2 / 3, 1 / 3])
    chosen = ("--experts", "art", "law", "--weights", "1", "3")
    assert not merge_here(monkeypatch, *forest, tmp_path / "two", *chosen)
    check(tmp_path / "two", [experts["art"], experts["law"]], [0.25, 0.75])
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["untie"] == "none" and config["domains"] == ["art", "law"]
    parents = json.loads((tmp_path / "two" / "merge.json").read_text())["parents"]
    assert [(p["member"], p["weight"]) for p in parents] == [("art", 0.25), ("law", 0.75)]

    before = tree(tmp_path)
    record["prior"] = [0.1, 0.3, 0.7]
    (tmp_path / "prior.json").write_text(json.dumps(record | {"rule": "last_token", "text": None}))
    assert "prior.json" in merge_here(monkeypatch, *forest, tmp_path / "x", "--prior", prior)
    assert "'lax'" in merge_here(monkeypatch, *forest, tmp_path / "x", "--experts", "lax")
    del before[str(prior)]
    assert {k: v for k, v in tree(tmp_path).items() if k != str(prior)} == before


def test_dry_run_writes_nothing(tmp_path, elms, monkeypatch, capsys):
    before = tree(tmp_path)
    assert not merge_here(monkeypatch, "--models", *elms, "--dry_run")
    output = capsys.readouterr().out
    assert (
        "linear of 3 models" in output and "nothing was written" in output and "0.333333" in output
    )
    assert tree(tmp_path) == before
    # A dry run looks at the folder that would be made, as the real one does.
    output = merge_here(monkeypatch, "--models", *elms, "--dry_run", "--output_dir", elms[0])
    assert output == f"--output_dir {elms[0]}: exists already; name a new or an empty folder"
    below = elms[0] / "config.json" / "out"
    output = merge_here(monkeypatch, "--models", *elms, "--dry_run", "--output_dir", below)
    assert "cannot be written" in output and "config.json is not a writable folder" in output
    capsys.readouterr()
    assert not merge_here(
        monkeypatch, "--models", *elms, "--dry_run", "--output_dir", tmp_path / "new" / "out"
    )
    assert "nothing was written" in capsys.readouterr().out and tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "a", "b"], "--output_dir is missing"),
        (["--models", "a", "--output_dir", "o", "--merge_method", "liner"], "nearest is 'linear'"),
        (["--models", "a", "--output_dir", "o", "--merge_method", "ties"], "ties: needs a recipe"),
        (
            ["--models", "a", "--output_dir", "o", "--weights", "x"],
            "--weights: ['x'] is not allowed",
        ),
        (
            ["--models", "a", "--output_dir", "o", "--weights", "inf"],
            "--weights: [inf] is not allowed",
        ),
        (["--models", "a", "--output_dir", "o", "--weights", "1", "2"], "gives 2 weights"),
        (
            ["--models", "a", "--output_dir", "o", "--weights", "1", "--topk", "2"],
            "--topk 2: there are only 1 models",
        ),
        (["--models", "a", "z", "--output_dir", "o"], "z: is not a folder"),
        (["--models", "a", "wide", "--output_dir", "o"], "vocab_size is 23 in the first, 24"),
        (["--models", "a", "--output_dir", "a"], "--output_dir a: exists already"),
        (["--models", "a", "--output_dir", "o", "--prior", "p"], "--prior goes with --forest"),
        (["--models", "a", "--output_dir", "o", "--topk", "1"], "--topk needs weights"),
        (["--models", "a", "--output_dir", "o", "--max_shard_size", "5X"], "'5X' is not a size"),
        (["--output_dir", "o"], "--models and --forest"),
        (["none.yml", "--output_dir", "o"], "none.yml cannot be read"),
        (["none.yml", "--output_dir", "o", "--models", "a"], "--models cannot be added"),
        (["--forest", "empty", "--output_dir", "o"], "empty"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_written(tmp_path, monkeypatch, arguments, message):
    make_model(tmp_path / "a")
    make_model(tmp_path / "wide", vocab_size=24)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert message in merge_here(monkeypatch, *arguments)
    assert tree(tmp_path) == before


def test_the_command_itself(tmp_path, elms):
    command = [sys.executable, str(LAUNCHER), "--models", *map(str, elms), "--output_dir"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0 and "written to" in done.stdout, done.stderr
    assert done.stderr == ""  # no progress bar where nobody looks
    dead = replace(
        Holder.make_for_this_process(), started=1
    )  # as if killed before it released the lock
    (tmp_path / ".out.in_use").write_text(json.dumps(asdict(dead)))
    again = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert again.returncode == 0 and "done already" in again.stdout, again.stderr
    assert not (tmp_path / ".out.in_use").exists()
    other = subprocess.run([*command, str(elms[0])], capture_output=True, text=True)
    assert other.returncode == 2 and other.stderr.startswith("UserError: --output_dir")
