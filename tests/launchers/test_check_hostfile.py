"""launchers/check_hostfile.py as people start it."""

import functools
import re
from pathlib import Path

from launch import run_launcher

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "check_hostfile.py"


check = functools.partial(run_launcher, "check_hostfile")


def test_a_good_file_and_its_experts(tmp_path):
    (tmp_path / "hosts").write_text("a slots=4\nb slots=4\n")
    done = check(tmp_path / "hosts", "--experts", "4", "--no_ssh_check")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split() for line in done.stdout.splitlines()[1:]] == [
        ["a", "4", "not", "tried", "0-3", "0-1"],
        ["b", "4", "not", "tried", "4-7", "2-3"],
    ]


def test_all_faults_and_no_table(tmp_path):
    (tmp_path / "hosts").write_text("a slots=0\nb slots=4\nb slots=4\n")
    done = check(tmp_path / "hosts", "--no_ssh_check")
    assert done.returncode == 2
    assert done.stderr == f"UserError: hostfile {tmp_path / 'hosts'} has 2 faults\n"
    places = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert places == ["line 1", "line 3"]


def test_flags_that_cannot_be(tmp_path):
    (tmp_path / "hosts").write_text("a slots=1\n")
    for flag, value in (("--experts", "0"), ("--ssh_port", "70000")):
        done = check(tmp_path / "hosts", flag, value, "--no_ssh_check")
        assert done.returncode == 2 and f"{flag} {value}: is not from 1 to" in done.stderr


def test_the_example_is_a_hostfile():
    done = check(LAUNCHER.parent / "hostfile.example", "--no_ssh_check", "--experts", "8")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3, done.stderr


def test_the_example_of_variables_is_one_that_deepspeed_reads():
    """It splits each line at the first `=`; a blank line or a comment would break the launch."""
    lines = (LAUNCHER.parent / "deepspeed_env.example").read_text().splitlines(keepends=True)
    values = dict(line.split("=", maxsplit=1) for line in lines)
    assert len(values) == len(lines)
    for name, value in values.items():
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and re.fullmatch(r"[\w/.]+\n", value)
    output = (LAUNCHER.parents[1] / "docs" / "multinode.md").read_text()
    assert all(f"`{name}`" in output for name in values)
