"""Four small domains of real text that every machine with this package has.

They are read from the Python installation; nothing is downloaded:

    python_code       modules of the standard library
    c_headers         C and C++ headers of Python, NumPy and PyTorch
    reference_prose   the reference manual of Python's `help()`
    package_texts     descriptions and licences of installed packages
"""

import ast
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from megamod.errors import UserError

# Characters of a document: longer texts are cut at line ends, shorter parts are dropped.
SHORTEST, LONGEST = 200, 4_000
FEWEST = 60  # documents of a domain
HEADERS = {".h", ".hpp", ".cuh"}


def load_builtin_documents(max_bytes: int = 1_000_000) -> dict[str, list[str]]:
    """Load the documents of the four built-in domains, deterministic for one installation.

    Args:
        max_bytes: most UTF-8 bytes of a domain; its documents are spread evenly over the source.
    Returns:
        documents by domain.
    Raises:
        UserError: if a domain has too few documents, naming the files that were searched.
    """
    standard = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
    # Twice as much as is needed, because `_sample_documents` drops repeated and short parts.
    sources = {
        "python_code": (
            _read_sample_of_files([standard], {".py"}, skipped, 2 * max_bytes),
            f"*.py in {standard}",
        ),
        "c_headers": (
            _read_sample_of_files(_find_header_folders(), HEADERS, set(), 2 * max_bytes),
            "headers of Python, numpy and torch",
        ),
        "reference_prose": (_read_help_topics(standard), f"{standard}/pydoc_data/topics.py"),
        "package_texts": (
            _read_package_texts(),
            "descriptions and licences in *.dist-info folders",
        ),
    }
    domains = {}
    for name, (texts, files) in sources.items():
        documents = _sample_documents(texts, max_bytes)
        if len(documents) < FEWEST:
            raise UserError(
                f"--builtin: the domain {name} needs {FEWEST} documents, but {files} give "
                f"{len(documents)}. Pass --input NAME=PATH instead"
            )
        domains[name] = documents
    return domains


def _sample_documents(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Cut texts into documents and select distinct ones, evenly spaced, up to a size.

    Documents below `SHORTEST` characters are dropped.

    Args:
        texts: whole texts, see `_cut_at_line_ends`.
        max_bytes: most UTF-8 bytes of all selected documents together.
    """
    pieces = dict.fromkeys(piece for text in texts for piece in _cut_at_line_ends(text))
    documents = [piece for piece in pieces if len(piece) >= SHORTEST]
    share = min(1.0, max_bytes / max(1, sum(len(document.encode()) for document in documents)))
    selected, used = [], 0
    for number, document in enumerate(documents):
        size = len(document.encode())
        if int((number + 1) * share) > int(number * share) and used + size <= max_bytes:
            selected.append(document)
            used += size
    return selected


def _cut_at_line_ends(text: str) -> Iterator[str]:
    """Yield parts of at most `LONGEST` characters, cut at line ends where there are any.

    CRLF becomes LF; line ends at both ends of the text, and those at cuts, are dropped.
    """
    text = text.replace("\r\n", "\n").strip("\n")
    begin = 0
    while len(text) - begin > LONGEST:
        end = text.rfind("\n", begin, begin + LONGEST)
        end = end if end > begin else begin + LONGEST
        yield text[begin:end]
        begin = end + 1
    yield text[begin:]


def _read_sample_of_files(
    roots: list[Path], endings: set[str], skipped: set[str], max_bytes: int
) -> Iterator[str]:
    """Yield the texts of evenly spaced files below `roots`, about `max_bytes` in all.

    Only these are read, because reading all files would take seconds.

    Args:
        roots: folders that are searched at any depth.
        endings: endings of the files, with the dot.
        skipped: names of folders that are not searched.
        max_bytes: about as many bytes are read.
    """
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
            yield _read_utf8_text(path)


def _read_utf8_text(path: Path) -> str:
    """Read a file; return an empty text if it cannot be read, is not UTF-8 or has NUL bytes."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if "\0" in text else text


def _find_header_folders() -> list[Path]:
    """Find the folders of C headers of Python and of installed numpy and torch."""
    folders = [Path(sysconfig.get_path("include"))]
    for package, folder in (("numpy", "_core/include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            folders.append(Path(spec.origin).parent / folder)
    return folders


def _read_help_topics(standard_library: Path) -> Iterator[str]:
    """Yield sections of Python's help texts, the strings in `pydoc_data.topics`.

    The module is parsed and not imported.

    Args:
        standard_library: folder of the standard library.
    """
    source = _read_utf8_text(standard_library / "pydoc_data" / "topics.py")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            values = [ast.literal_eval(value) for value in node.values]
            yield from (part for value in values for part in _group_paragraphs(value))


def _group_paragraphs(topic: str, size: int = 2000) -> Iterator[str]:
    """Yield the paragraphs of a text in groups of at least `size` characters; the last may have
    fewer.

    Args:
        topic: the text; blank lines separate its paragraphs.
        size: characters of a group.
    """
    paragraphs: list[str] = []
    for paragraph in topic.split("\n\n"):
        paragraphs.append(paragraph)
        if sum(map(len, paragraphs)) >= size:
            yield "\n\n".join(paragraphs)
            paragraphs = []
    yield "\n\n".join(paragraphs)


def _read_package_texts() -> Iterator[str]:
    """Yield descriptions and licences of installed packages, in the order of their names."""
    packages = {package.metadata["Name"]: package for package in importlib.metadata.distributions()}
    for name in sorted(filter(None, packages)):
        package = packages[name]
        description = package.metadata.get_payload() or package.metadata["Description"] or ""
        yield from _group_paragraphs(str(description))
        for file in sorted(package.files or (), key=str):
            if ".dist-info" in str(file) and file.stem.upper() in ("LICENSE", "NOTICE", "COPYING"):
                yield from _group_paragraphs(_read_utf8_text(Path(str(file.locate()))))
