"""The console command: its map, its verbs, both doors to a command, completion, shipped files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megamod
from megamod import shipped_files
from megamod.commands import GROUPS, read_command_summary
from megamod.commands.recipes import read_recipe_summary

REPOSITORY = Path(__file__).resolve().parents[1]
MODULES = [name for names in GROUPS.values() for name in names]
HEAVY = ("torch", "transformers", "deepspeed", "numpy")


def megamod_command(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m megamod` with these words."""
    return subprocess.run(
        [sys.executable, "-m", "megamod", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )


def test_the_map_lists_every_command_without_importing_one():
    program = (
        "import sys\nfrom megamod.__main__ import main\nsys.argv = ['megamod', '--help']\nmain()\n"
        f"print([name for name in sys.modules if name in {HEAVY!r} "
        "or name.startswith('megamod.commands.')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr
    for name in MODULES:
        verb = name.replace("_", "-")
        assert re.search(rf"^  {verb} +{re.escape(read_command_summary(name))}$", done.stdout, re.M)


def test_commands_and_launchers_are_those_of_the_table():
    commands = {path.stem for path in (REPOSITORY / "megamod/commands").glob("[!_]*.py")}
    assert sorted(commands) == sorted(MODULES)
    for path in (REPOSITORY / "launchers").glob("*.py"):
        text = (REPOSITORY / "launchers" / "merge.py").read_text()
        assert path.stem in MODULES
        assert path.read_text() == text.replace("commands.merge", f"commands.{path.stem}").replace(
            "megamod merge", f"megamod {path.stem.replace('_', '-')}"
        )


@pytest.mark.parametrize("name", MODULES)
def test_help_without_torch(name):
    """Help comes at once, since nothing heavy is loaded, and names the command."""
    verb = name.replace("_", "-")
    program = (
        "import sys\nfrom megamod.__main__ import main\n"
        f"sys.argv = ['megamod', {verb!r}, '--help']\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("[] 0"), f"{verb}: {done.stdout}{done.stderr}"
    assert done.stdout.startswith(f"usage: megamod {verb}")
    assert re.search(rf"megamod {verb}|launchers/{name}\.py", done.stdout.partition("\n\n")[2])


def test_words_of_the_command_line():
    assert megamod_command("--version").stdout == f"megamod {megamod.__version__}\n"
    assert megamod_command().stdout == megamod_command("--help").stdout
    done = megamod_command("pertrain")
    assert done.returncode == 2
    assert done.stderr == (
        "UserError: unknown verb 'pertrain'; the nearest is 'pretrain', --help lists all\n"
    )
    # deepspeed --module inserts a word; underscores and hyphens are one.
    done = megamod_command("--local_rank=0", "check_hostfile", "absent")
    assert done.returncode == 2 and "absent" in done.stderr
    done = megamod_command("pretrain", "launchers/recipes/absent.yaml")
    assert done.returncode == 2 and "`megamod recipes` lists those that come along" in done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megamod pre", ["preprocess", "pretrain"]),
        ("megamod pretrain --learning_r", ["--learning_rate"]),
        ("megamod pretrain --objective m", ["masked_lm"]),
        ("megamod convert --format o", ["opt"]),
        ("megamod forest branch --one", ["--one_world"]),
        (
            "megamod recipes launchers/recipes/mux/mux_bert_small",
            [f"launchers/recipes/mux/mux_bert_small_{stage}.yaml" for stage in ("mlm", "warmup")],
        ),
    ],
)
def test_the_shell_completes(line, expected, tmp_path):
    completions = tmp_path / "completions"
    done = megamod_command(
        COMP_LINE=line,
        COMP_POINT=str(len(line)),
        _ARGCOMPLETE="1",
        _ARGCOMPLETE_IFS="\n",
        _ARGCOMPLETE_STDOUT_FILENAME=str(completions),
    )
    assert done.returncode == 0, done.stderr
    assert [word.strip() for word in completions.read_text().splitlines()] == expected


def test_completion_needs_a_shell():
    done = megamod_command(_ARGCOMPLETE="1")
    assert done.returncode == 2 and "no shell asks" in done.stderr


def test_recipes_are_listed_and_copied(tmp_path):
    files = shipped_files.list_shipped_files()
    assert {name: path for name, path in files.items() if path != REPOSITORY / name} == {}
    for folder in shipped_files.FOLDERS:
        assert {name for name in files if name.startswith(folder)} == {
            str(path.relative_to(REPOSITORY))
            for path in (REPOSITORY / folder).rglob("*")
            if path.is_file()
        }
    for name, path in files.items():
        summary = read_recipe_summary(path)
        assert (path.suffix == ".yaml") == bool(summary) and "megamod " not in summary, name
    listed = megamod_command("recipes").stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(files)
    names = ("launchers/recipes/mux", "ds_configs/zero0.json")
    done = megamod_command("recipes", *names, "--output_dir", str(tmp_path))
    copied = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert done.returncode == 0 and len(copied) == 15
    for path in copied:
        assert path.read_bytes() == (REPOSITORY / path.relative_to(tmp_path)).read_bytes()
    (tmp_path / "ds_configs/zero0.json").write_text("{}")
    done = megamod_command("recipes", "--output_dir", str(tmp_path))
    assert done.returncode == 2 and "zero0.json is there and differs" in done.stderr
    assert not (tmp_path / "ds_configs/zero1_bf16.json").exists()
    done = megamod_command("recipes", "ds_configs/zero9.json")
    assert done.returncode == 2 and "the nearest is 'ds_configs/zero0.json'" in done.stderr
