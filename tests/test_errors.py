import os
import subprocess
import sys

import pytest

from megamod import errors


def ending(monkeypatch, capsys, error: BaseException) -> tuple[int, str]:
    """Exit code and stderr of a program whose `main` raises `error`."""

    def main() -> None:
        raise error

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as left:
        errors.run_main(main)
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "output"),
    [
        (errors.UserError("--alpha 7: at most 1"), 2, "UserError: --alpha 7: at most 1\n"),
        (errors.PolicyStop("the loss is nan"), 3, "PolicyStop: the loss is nan\n"),
        (errors.DistributedFailure("rank 3"), 4, "DistributedFailure: rank 3\n"),
        (errors.Interrupted("after step 7"), 130, "Interrupted: after step 7\n"),
        (KeyboardInterrupt(), 130, "Interrupted\n"),
        (OSError(28, "No space left", "out/x"), 2, "OSError: out/x: No space left\n"),
        (OSError(28, "No space left"), 2, "OSError: No space left\n"),
        (FileNotFoundError(2, "No such file", "a"), 2, "FileNotFoundError: a: No such file\n"),
        (MemoryError("6 GB"), 2, "MemoryError: not enough memory: 6 GB\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, output):
    monkeypatch.setattr(sys, "argv", ["launcher"])
    assert ending(monkeypatch, capsys, error) == (code, output)


def test_traceback_on_demand(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launcher", "--traceback"])
    code, output = ending(monkeypatch, capsys, errors.UserError("no"))
    assert code == 2
    assert output.startswith("Traceback") and output.endswith("UserError: no\n")


@pytest.mark.parametrize(
    "message",
    [
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5",
        "Connection reset by peer",
        "NCCL error in: remote process exited",
        "Timed out waiting 1000ms for recv operation to complete",
    ],
)
def test_lost_peers_are_exit_4_and_name_rank_and_host(monkeypatch, capsys, message):
    monkeypatch.setattr(sys, "argv", ["launcher"])
    code, output = ending(monkeypatch, capsys, RuntimeError(message))
    assert code == 4
    where = f"rank 0 on {os.uname().nodename}"
    assert output == f"DistributedFailure: {where} lost its peers: {message}\n"


def test_faults_of_the_program_keep_their_traceback():
    def main() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        errors.run_main(main)


def test_a_program_that_ends_well_goes_on():
    assert errors.run_main(lambda: None) is None


def test_a_rank_leaves_without_waiting_for_others():
    """With RANK set nothing that is registered for the end of the process may hold it. A rank that
    is not 0 says who it is."""
    program = (
        "import atexit, time\n"
        "from megamod.errors import UserError, run_main\n"
        "atexit.register(time.sleep, 60)\n"
        "def main():\n"
        "    print('so far')\n"
        "    raise UserError('no such file')\n"
        "run_main(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "RANK": "1"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (2, "so far\n")
    assert done.stderr == "rank 1: UserError: no such file\n"


@pytest.mark.parametrize("lines", [2, 100_000])
def test_a_reader_that_has_read_enough(lines):
    wait = "import time; time.sleep(0.5)"
    program = f"""
from megamod.errors import run_main

def main():
    print("x", flush=True)
    {wait}
    print("x\\n" * {lines})

run_main(main)
"""
    command = [sys.executable, "-c", program]
    alone = {name: value for name, value in os.environ.items() if name != "RANK"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=alone, **pipes) as process:
        assert process.stdout.readline() == b"x\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + 13


def test_another_broken_pipe_is_a_fault(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(errors, "_is_stdout_closed", lambda: False)

    def main() -> None:
        raise BrokenPipeError("a worker is gone")

    with pytest.raises(BrokenPipeError, match="a worker"):
        errors.run_main(main)
