"""List the recipes and DeepSpeed files that come with megamod, and copy them.

    megamod recipes
    megamod recipes launchers/recipes/quickstart.yaml ds_configs/cpu_smoke.json --output_dir .
    megamod recipes launchers/recipes/mux --output_dir mine
    megamod recipes --output_dir .

Copies keep their paths, so that the commands of the documentation find them below --output_dir;
without names everything is copied. A file that is there and differs is not overwritten.
"""

import re
from pathlib import Path

from megamod.command_line import CommandParser, make_unknown_word_error, set_completions
from megamod.errors import UserError, run_main
from megamod.files import write_atomic
from megamod.shipped_files import list_shipped_files


def main() -> None:
    """Parse the command line; list files, or with --output_dir copy them.

    Raises:
        UserError: for an unknown name, or a file that is there and differs.
    """
    files = list_shipped_files()
    parser = CommandParser(__doc__)
    names = parser.add_argument(
        "names", nargs="*", metavar="NAME", help="files or folders, as listed; none: all"
    )
    set_completions(names, list(files))
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="folder to copy into")
    options = parser.parse_args()
    selected = select_files(files, options.names)
    if options.output_dir is None:
        width = max(map(len, selected))
        for name, path in selected.items():
            print(f"{name:{width}}  {read_recipe_summary(path)}".rstrip())
    else:
        copy_files(selected, options.output_dir)
        print(f"{options.output_dir}: {len(selected)} files")


def select_files(files: dict[str, Path], names: list[str]) -> dict[str, Path]:
    """Select files by their paths or folders; all without names.

    Args:
        files: paths by the names that are listed.
        names: files or folders, as listed.
    Raises:
        UserError: for a name that is neither, with the nearest one.
    """
    selected: dict[str, Path] = {}
    for name in names or [""]:
        prefix = f"{name.rstrip('/')}/".lstrip("/")
        matches = {key: path for key, path in files.items() if f"{key}/".startswith(prefix)}
        if not matches:
            raise make_unknown_word_error("unknown name", name, files)
        selected |= matches
    return selected


def read_recipe_summary(path: Path) -> str:
    """Read the first sentence of the comment at the top of a recipe; "" for a file without one.

    A command, which is indented, ends it too.
    """
    if path.suffix != ".yaml":
        return ""
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or (comment and line.startswith("#  ")):
            break
        comment.append(line.lstrip("# "))
    return re.split(r"[.:](?= [A-Z]|$)", " ".join(comment))[0]


def copy_files(files: dict[str, Path], output: Path) -> None:
    """Copy files below a folder, which is created if needed.

    Args:
        files: sources by the paths that the copies have below `output`.
    Raises:
        UserError: naming the first file that is there with other contents; nothing is written then.
    """
    contents = {output / name: path.read_text(encoding="utf-8") for name, path in files.items()}
    for target, text in contents.items():
        if target.exists() and target.read_bytes() != text.encode():
            raise UserError(f"{target} is there and differs; give another --output_dir")
    for target, text in contents.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, text)


if __name__ == "__main__":
    run_main(main)
