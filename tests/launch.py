"""Run a launcher in the process of the tests."""

import importlib.util
import sys
from pathlib import Path

LAUNCHERS = Path(__file__).resolve().parents[1] / "launchers"


def launch(name: str, *words: object) -> None:
    """Call `main` of a launcher with these words as its arguments."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", LAUNCHERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, words)]
    try:
        module.main()
    finally:
        sys.argv = before
