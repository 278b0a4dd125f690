import subprocess
import sys
from pathlib import Path

import pytest
from saved_models import make_model

from megamod.states.forest import open_forest

ROOT = Path(__file__).resolve().parents[2]


def forest(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", ROOT / "launchers" / "forest.py"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("forest")
    for name in ("law", "med"):
        make_model(root / name, domains=[name])
    make_model(root / "mixed", "feedforward")
    return root


def test_experts_come_and_go(place):
    for name in ("law", "med"):
        done = forest("add", "--forest", place, "--path", place / name)
        assert done.returncode == 0, done.stderr
    done = forest(
        *("add", "--forest", place, "--path", place / "mixed", "--member", "code"),
        *("--domain", "python"),
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["domain", "law", "med", "python"]
    assert f"{place / 'mixed'} (code)" in lines[3]
    done = forest("remove", "--forest", place, "--domain", "med", "python")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["domain", "law"]
    assert open_forest(place).domains == ("law",)
    assert forest("list", "--forest", place).stdout == done.stdout


def test_a_branch_is_a_checkpoint(place, tmp_path):
    done = forest(
        *("branch", "--parents", place / "law", place / "med", "--weights", 0.25, 0.75),
        *("--domain", "tax", "--output_dir", tmp_path / "tax"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tax" / "checkpoints" / "step-0" / "manifest.json").exists()
    assert "goes on from here" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "what is to be done is missing"),
        (("plant",), "'plant' is none of list add remove branch"),
        (("list",), "--forest is missing"),
        (("list", "--forest", "nowhere"), "holds no expert"),
        (("add", "--forest", "new", "--path", "{}/mixed"), "--member must be one of"),
        (("remove", "--forest", "nowhere", "--domain", "x"), "holds no expert"),
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
            "'heavy' is not a number",
        ),
    ],
)
def test_mistakes_end_with_2_and_one_message(place, tmp_path, arguments, told):
    done = forest(*(str(argument).format(place) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2 and told in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
