"""Check of a data-bin on disk against its header."""

from collections.abc import Iterator
from pathlib import Path

from megamod.data.corpus.header import HEADER, SPLITS, read_databin_header
from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.data.lm.databin import DataBin
from megamod.errors import UserError
from megamod.files import hash_file


def check_databin(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Check header, tokenizer and every split of a data-bin; used by `megamod verify`.

    Index and size of a split are read, its digests are compared, and all ids are checked. If the
    header cannot be read, nothing else is checked.

    Args:
        path: folder of the data-bin.
    Yields:
        for each part that is checked a title, and the list of its faults, empty without any.
    """
    try:
        data = DataBin(path, verify="size")
    except UserError as error:
        yield f"{path}: data-bin", [str(error)]
        return
    header = read_databin_header(path) if (path / HEADER).exists() else None
    yield f"{path}: data-bin, {len(data.domains)} domains, {data.vocab_size:,} ids", []
    if header and header.files is not None:
        faults = [
            f"{path / name} is missing or does not have the SHA-256 digest of databin.json"
            for name, digest in header.files.items()
            if not (path / name).is_file() or hash_file(path / name) != digest
        ]
        yield f"{path}: tokenizer and dictionaries, {len(header.files)} files", faults
    elif header and header.tokenizer:  # of an earlier version, which recorded no digests of files
        folder = path / "tokenizer"
        yield f"{folder}: tokenizer", _find_tokenizer_faults(folder, header.tokenizer.digest)
    for domain in data.domains:
        for split in header.domains[domain] if header else SPLITS:
            prefix = data.find_split_prefix(domain, split)
            if not header and not prefix.with_name(f"{prefix.name}.idx").exists():
                continue  # in a data-bin of fairseq any split may be absent
            title, faults = f"{prefix}", []
            try:
                dataset = data.open_split(domain, split)
                dataset.check_all_ids(data.vocab_size)
                title = f"{prefix}: {len(dataset):,} items, {len(dataset.tokens):,} tokens"
            except UserError as error:
                faults.append(str(error))
            expected = header.domains[domain][split].sha256 if header else {}
            for ending, digest in expected.items():
                file = prefix.with_name(f"{prefix.name}.{ending}")
                if file.exists() and hash_file(file) != digest:
                    faults.append(f"{file} does not have the SHA-256 digest of databin.json")
            yield title, faults


def _find_tokenizer_faults(folder: Path, digest: str) -> list[str]:
    """Return a list of one fault if the tokenizer cannot be loaded or has another digest, else [].

    Args:
        folder: folder of the tokenizer.
        digest: digest in the header, see `Tokenizer.digest`.
    """
    try:
        actual = load_tokenizer(folder).digest
    except (UserError, OSError, ValueError) as error:
        return [f"{folder} cannot be loaded: {error}"]
    return [] if actual == digest else [f"{folder} is not the tokenizer of the header"]
