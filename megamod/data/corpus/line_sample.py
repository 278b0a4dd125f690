"""Random lines of many text files: a small sample of a large corpus of books."""

import random
from collections.abc import Mapping
from pathlib import Path

from megamod.data.corpus.decoding import Decoding
from megamod.data.corpus.documents import read_decoded_lines
from megamod.data.corpus.file_formats import find_format, require_format
from megamod.errors import UserError
from megamod.files import write_atomic


def write_random_lines(
    inputs: Mapping[str, str], count: int, output: Path, *, encoding_errors: str, seed: int
) -> dict[str, tuple[int, int]]:
    """Write OUTPUT/NAME.txt with `count` random lines of each file, one item per line.

    Blank lines do not count, and files with fewer lines are skipped. The lines drawn from a file
    depend on its content, the seed and its name alone. Nothing is written before all input is read.

    Args:
        inputs: a text file, or a folder that is searched for text files at any depth, by name.
        count: lines of each file.
        output: folder of the files, which is created if it is absent; files of the same names are
            replaced.
        encoding_errors: "strict" or "replace", see `Decoding`.
        seed: seed of the random draw.
    Returns:
        numbers of used and of skipped files, by name.
    Raises:
        UserError: for a name without a text file or without a file of enough lines, and for content
            that is not text.
    Source: Verma and Elbayad 2024 (Merging text transformer models from different
    initializations), appendix: 100 lines of each book with at least as many.
    """
    drawn, counts = {}, {}
    for name, where in inputs.items():
        path = Path(where)
        if not path.exists():
            raise UserError(f"--input {name}={where}: no such file or folder")
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if find_format(file) == "text")
        else:
            require_format(path, ["text"], f"--input {name}=")
            files = [path]
        if not files:
            raise UserError(f"--input {name}={where}: it holds no text file (.txt)")
        decoding, lines, used = Decoding(encoding_errors), [], 0
        for file in files:
            candidates = [line for _, line in read_decoded_lines(file, decoding) if line.strip()]
            if len(candidates) < count:
                continue
            name_inside = file.name if path.is_file() else file.relative_to(path).as_posix()
            lines += random.Random(f"{seed} {name_inside}").sample(candidates, count)
            used += 1
        if not used:
            raise UserError(
                f"--sample_lines {count}: no file of --input {name}={where} has enough lines"
            )
        drawn[name], counts[name] = lines, (used, len(files) - used)
    output.mkdir(parents=True, exist_ok=True)
    for name, lines in drawn.items():
        write_atomic(output / f"{name}.txt", "\n".join(lines) + "\n")
    return counts
