"""Exit codes and errors of the benchmark commands."""

import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with what main returns; with 2 for a mistake, because 1 is a floor that was missed."""
    try:
        code = main()
    except SystemExit as mistake:
        if not isinstance(mistake.code, str):
            raise
        print(mistake.code, file=sys.stderr)
        code = 2
    sys.exit(code)
