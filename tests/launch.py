"""Run a command in the process of the tests."""

import importlib
import sys


def launch(name: str, *words: object) -> None:
    """Call `main` of a command with these words as its arguments."""
    module = importlib.import_module(f"megamod.commands.{name}")
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, words)]
    try:
        module.main()
    finally:
        sys.argv = before
