"""Exit codes and errors of the benchmark commands."""

import sys
from collections.abc import Callable
from typing import NoReturn


def run_benchmark_main(main: Callable[[], int]) -> NoReturn:
    """Exit with the code that `main` returns, or with 2 for a mistake, as 1 is a missed floor.

    A mistake is a SystemExit with a message, which is printed to stderr.
    """
    try:
        code = main()
    except SystemExit as mistake:
        if not isinstance(mistake.code, str):
            raise
        print(mistake.code, file=sys.stderr)
        code = 2
    sys.exit(code)
