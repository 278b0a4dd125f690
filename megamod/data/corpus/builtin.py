"""Real text that stands on every machine with this package installed, as four small domains.

It is read from the installation when asked for, so nothing is downloaded and nothing is shipped:

    python_code       modules of the standard library
    c_headers         C and C++ headers of Python, NumPy and PyTorch
    reference_prose   the reference manual behind Python's `help()`
    package_texts     descriptions and licences of installed packages
"""

import ast
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from megamod.errors import UserError

SHORTEST, LONGEST = 200, 4_000  # characters of a document; longer files are cut at line ends
FEWEST = 60  # documents of a domain
HEADERS = {".h", ".hpp", ".cuh"}


def builtin_documents(max_bytes: int = 1_000_000) -> dict[str, list[str]]:
    """Documents of the four built-in domains, the same ones in the same order on one installation.

    Args:
        max_bytes: UTF-8 bytes taken of a domain, at most; documents are spread over all there is.

    Raises:
        UserError: if an installation lacks a source, naming what was looked for.
    """
    standard = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
    sources = {
        "python_code": (
            _files([standard], {".py"}, skipped, 2 * max_bytes),
            f"*.py in {standard}",
        ),
        "c_headers": (
            _files(_header_folders(), HEADERS, set(), 2 * max_bytes),
            "headers of Python, numpy and torch",
        ),
        "reference_prose": (_topics(standard), f"{standard}/pydoc_data/topics.py"),
        "package_texts": (_package_texts(), "descriptions and licences in *.dist-info folders"),
    }
    domains = {}
    for name, (texts, looked_for) in sources.items():
        documents = _chosen(texts, max_bytes)
        if len(documents) < FEWEST:
            raise UserError(
                f"--builtin: the domain {name} needs {FEWEST} documents and {len(documents)} were "
                f"found; looked for {looked_for}. Pass --input NAME=PATH instead"
            )
        domains[name] = documents
    return domains


def _chosen(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Distinct documents, evenly thinned to `max_bytes`."""
    pieces = dict.fromkeys(piece for text in texts for piece in _pieces(text))
    documents = [piece for piece in pieces if len(piece) >= SHORTEST]
    share = min(1.0, max_bytes / max(1, sum(len(one.encode()) for one in documents)))
    kept, used = [], 0
    for number, document in enumerate(documents):
        size = len(document.encode())
        if int((number + 1) * share) > int(number * share) and used + size <= max_bytes:
            kept.append(document)
            used += size
    return kept


def _pieces(text: str) -> Iterator[str]:
    text = text.replace("\r\n", "\n").strip("\n")
    begin = 0
    while len(text) - begin > LONGEST:
        end = text.rfind("\n", begin, begin + LONGEST)
        end = end if end > begin else begin + LONGEST
        yield text[begin:end]
        begin = end + 1
    yield text[begin:]


def _files(
    roots: list[Path], endings: set[str], skipped: set[str], max_bytes: int
) -> Iterator[str]:
    """Evenly spaced files below `roots`, about `max_bytes` of them: reading all takes seconds."""
    paths = [
        path
        for root in roots
        for path in sorted(root.rglob("*"))
        if path.suffix in endings
        and not skipped & set(path.relative_to(root).parts[:-1])
        and path.is_file()
    ]
    share = min(1.0, max_bytes / max(1, sum(path.stat().st_size for path in paths)))
    for number, path in enumerate(paths):
        if int((number + 1) * share) > int(number * share):
            yield _read(path)


def _read(path: Path) -> str:
    """Content of a file, or nothing if it is not UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if "\0" in text else text


def _header_folders() -> list[Path]:
    folders = [Path(sysconfig.get_path("include"))]
    for package, folder in (("numpy", "_core/include"), ("torch", "include")):
        found = importlib.util.find_spec(package)
        if found and found.origin:
            folders.append(Path(found.origin).parent / folder)
    return folders


def _topics(standard: Path) -> Iterator[str]:
    """The strings of `pydoc_data.topics`, by parsing: importing it would run it."""
    source = _read(standard / "pydoc_data" / "topics.py")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            values = [ast.literal_eval(value) for value in node.values]
            yield from (part for value in values for part in _sections(value))


def _sections(topic: str, size: int = 2000) -> Iterator[str]:
    """A topic in documents of about `size` characters, cut between paragraphs."""
    kept: list[str] = []
    for paragraph in topic.split("\n\n"):
        kept.append(paragraph)
        if sum(map(len, kept)) >= size:
            yield "\n\n".join(kept)
            kept = []
    yield "\n\n".join(kept)


def _package_texts() -> Iterator[str]:
    found = {one.metadata["Name"]: one for one in importlib.metadata.distributions()}
    for name in sorted(filter(None, found)):
        package = found[name]
        description = package.metadata.get_payload() or package.metadata["Description"] or ""
        yield from _sections(str(description))
        for file in sorted(package.files or (), key=str):
            if ".dist-info" in str(file) and file.stem.upper() in ("LICENSE", "NOTICE", "COPYING"):
                yield from _sections(_read(Path(str(file.locate()))))
