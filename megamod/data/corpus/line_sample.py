"""Random lines of many text files: a small sample of a large corpus, such as of books."""

import random
from collections.abc import Mapping
from pathlib import Path

from megamod.data.corpus.documents import Decoding, text_lines
from megamod.data.corpus.file_formats import format_of, known_format
from megamod.errors import UserError
from megamod.files import write_atomic


def sample_lines(
    inputs: Mapping[str, str], count: int, output: Path, *, encoding_errors: str, seed: int
) -> dict[str, tuple[int, int]]:
    """Write OUTPUT/NAME.txt with `count` random lines of every file of a folder, a line an item.

    Blank lines do not count; a file with fewer lines is passed over. What is drawn from a file
    depends on the seed and its name alone.

    Args:
        inputs: name -> a text file, or a folder whose text files are taken, however deep.
    Returns:
        by name the numbers of files that were drawn from and of those passed over.
    Raises:
        UserError: if there is no file, or none with so many lines.
    Source: Verma and Elbayad 2024 (Merging text transformer models from different
    initializations), appendix: 100 lines of each book with at least as many.
    """
    drawn, told = {}, {}
    for name, place in inputs.items():
        path = Path(place)
        if not path.exists():
            raise UserError(f"--input {name}={place}: no such file or folder")
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if known_format(file) == "text")
        else:
            format_of(path, ["text"], f"--input {name}=")
            files = [path]
        if not files:
            raise UserError(f"--input {name}={place}: it holds no text file (.txt)")
        decoding, lines, taken = Decoding(encoding_errors), [], 0
        for file in files:
            whole = [line for _, line in text_lines(file, decoding) if line.strip()]
            if len(whole) < count:
                continue
            inside = file.name if path.is_file() else file.relative_to(path).as_posix()
            lines += random.Random(f"{seed} {inside}").sample(whole, count)
            taken += 1
        if not taken:
            raise UserError(
                f"--sample_lines {count}: no file of --input {name}={place} has so many lines"
            )
        drawn[name], told[name] = lines, (taken, len(files) - taken)
    output.mkdir(parents=True, exist_ok=True)
    for name, lines in drawn.items():
        write_atomic(output / f"{name}.txt", "\n".join(lines) + "\n")
    return told
