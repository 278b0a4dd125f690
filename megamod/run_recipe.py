"""run.yaml, the recipe in the folder of every run that repeats the run."""

import math
from dataclasses import fields
from pathlib import Path

import yaml

from megamod.files import write_atomic
from megamod.flags import Arguments, find_origin
from megamod.schemas import Setting, read_checked_file


def write_run_recipe(path: Path, *parsed: Arguments) -> None:
    """Write a recipe of all flags that repeats the run, with the origin of each as a comment.

    It replaces an existing file. `parse_args` reads it as a recipe.

    Args:
        path: the file, run.yaml in the folder of a run.
        parsed: instances of all dataclasses of flags of the command.
    Raises:
        OSError: if the file cannot be written.
    """
    lines = []
    for args in parsed:
        lines.append(f"# {type(args).__doc__.splitlines()[0]}")
        for f in fields(args):
            # As the only item of a list in brackets, any value is written in a single line.
            yaml_list = yaml.safe_dump(
                [getattr(args, f.name)], default_flow_style=True, width=math.inf
            )
            origin = " ".join(find_origin(args, f.name).split())
            lines.append(f"{f.name}: {yaml_list.strip()[1:-1]}  # {origin}")
        lines.append("")
    write_atomic(path, "\n".join(lines))


def read_run_recipe(folder: Path) -> dict[str, object]:
    """Read the flags in run.yaml of a run's folder: name -> value; empty if there is no such file.

    Names are not checked, because any version may have written the file.

    Raises:
        UserError: if the file is malformed.
    """
    file = folder / "run.yaml"
    return read_checked_file(file, dict[str, Setting]) if file.is_file() else {}
