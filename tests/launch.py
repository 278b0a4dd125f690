"""Run a command in the process of the tests, or as its users do, without the time of imports."""

import functools
import importlib
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from drills.warm import REPOSITORY, Command, Warm, open_session

SESSIONS = ExitStack()
"""Sessions of this process with the warm process, to be closed at its end."""


def launch(name: str, *words: object) -> None:
    """Call `main` of a command with these words as its arguments."""
    module = importlib.import_module(f"megamod.commands.{name}")
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, words)]
    try:
        module.main()
    finally:
        sys.argv = before


def run_launcher(
    name: str, *words: object, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run launchers/NAME.py with these words as its arguments in a child of the warm process."""
    arguments = [name, *map(str, words)]
    outcome = open_warm_session().run(Command(arguments, str(cwd), separate=True), 300)
    return subprocess.CompletedProcess(arguments, outcome.code, outcome.text, outcome.errors)


@functools.cache
def open_warm_session() -> Warm:
    """Open this process's session with the warm process of all workers."""
    return SESSIONS.enter_context(open_session(Path(os.environ["MEGAMOD_TEST_SHARED"])))
