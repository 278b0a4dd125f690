"""Check the files of a run, checkpoint, model folder, forest or data-bin against their digests.

    megamod verify OUT                        every checkpoint of a run, and its model
    megamod verify OUT/checkpoints/step-40    sizes and SHA-256 digests
    megamod verify OUT/model                  weight files against their index
    megamod verify FOREST/forest.json         its entries, their models and checkpoints
    megamod verify DATABIN                    digests, indices and ids of every split

Prints one line per group of files. Exit code 0 if all are intact, 2 with a list of faults if not.
"""

from collections.abc import Iterator
from pathlib import Path

from megamod.command_line import CommandParser
from megamod.errors import UserError, run_main


def main() -> None:
    """Check each group of files of the path on the command line, and print a line for it.

    Raises:
        UserError: listing the faults, after all groups are checked; or as `iterate_file_groups`.
    """
    parser = CommandParser(__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder, as above")
    path = parser.parse_args().path
    faults = []
    for title, group_faults in iterate_file_groups(path):
        print(f"{'FAULT' if group_faults else 'ok':<7}{title}", flush=True)
        faults += group_faults
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise UserError(f"{path} is damaged, {len(faults)} faults:{listed}")


def iterate_file_groups(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Return an iterator of (title, faults) over the groups of files of a path; it only reads.

    A group is one checkpoint, model or split, for example; an intact one has no faults.

    Args:
        path: folder of a run, checkpoint, model, forest or data-bin, or a forest.json.
    Raises:
        UserError: if it is neither a folder nor a forest.json.
    """
    from megamod.states.forest import FILE

    if not path.is_dir() and not (path.name == FILE and path.is_file()):
        raise UserError(f"{path} is not a folder, and no {FILE}")
    if (path / "databin.json").exists() or (path / "dict.txt").exists():
        from megamod.data.lm.verify import check_databin

        return check_databin(path)
    from megamod.states.verify import check_path

    return check_path(path)


if __name__ == "__main__":
    run_main(main)
