"""Check that a run, a checkpoint, a model folder, a forest or a data-bin is whole.

    python launchers/verify.py OUT                        every checkpoint of a run, and its model
    python launchers/verify.py OUT/checkpoints/step-40    sizes and SHA-256 digests
    python launchers/verify.py OUT/model                  weight files against their index
    python launchers/verify.py FOREST/forest.json         its entries, their models and checkpoints
    python launchers/verify.py DATABIN                    digests, indices and ids of every split

One line per group of files. Exit code 0 if all is whole, 2 with the list of faults if not.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from megamod.errors import UserError, run


def main() -> None:
    """Look at one group after the other; list what is wrong at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder, as above")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    path = parser.parse_args().path
    faults = []
    for title, found in groups(path):
        print(f"{'FAULT' if found else 'ok':<7}{title}", flush=True)
        faults += found
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise UserError(f"{path} is not whole, {len(faults)} faults:{listed}")


def groups(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every group of files, in words, and its faults, by what the path is."""
    from megamod.states.forest import FILE

    if not path.is_dir() and not (path.name == FILE and path.is_file()):
        raise UserError(f"{path} is not a folder, and no {FILE}")
    if (path / "databin.json").exists() or (path / "dict.txt").exists():
        from megamod.data.lm.verify import groups as of_data

        return of_data(path)
    from megamod.states.verify import groups as of_states

    return of_states(path)


if __name__ == "__main__":
    run(main)
