"""What is wrong with a data-bin on disk, if anything."""

import json
from collections.abc import Iterator
from pathlib import Path

from megamod.data.corpus.documents import SPLITS
from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.data.lm.databin import DataBin
from megamod.errors import UserError
from megamod.files import sha256


def groups(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Header, tokenizer and every split: what was looked at, in words, and its faults.

    Of a split the index is read, digests are compared, and each id is looked at once.
    """
    try:
        data = DataBin(path)
    except UserError as error:
        yield f"{path}: data-bin", [str(error)]
        return
    header = path / "databin.json"
    told = json.loads(header.read_text(encoding="utf-8")) if header.exists() else {}
    yield f"{path}: data-bin, {len(data.domains)} domains, {data.vocab_size:,} ids", []
    if "tokenizer" in told:
        folder = path / "tokenizer"
        yield f"{folder}: tokenizer", _tokenizer_faults(folder, told["tokenizer"]["digest"])
    for domain in data.domains:
        for split in told["domains"][domain] if told else SPLITS:
            prefix = data.prefix(domain, split)
            if not told and not prefix.with_name(f"{prefix.name}.idx").exists():
                continue  # in a data-bin of fairseq any split may be absent
            title, faults = f"{prefix}", []
            try:
                dataset = data.split(domain, split)
                dataset.check_ids(data.vocab_size)
                title = f"{prefix}: {len(dataset):,} items, {len(dataset.tokens):,} tokens"
            except UserError as error:
                faults.append(str(error))
            expected = told["domains"][domain][split].get("sha256", {}) if told else {}
            for ending, digest in expected.items():
                file = prefix.with_name(f"{prefix.name}.{ending}")
                if file.exists() and sha256(file) != digest:
                    faults.append(f"{file} does not have the SHA-256 digest of databin.json")
            yield title, faults


def _tokenizer_faults(folder: Path, digest: str) -> list[str]:
    """The tokenizer beside the ids must be the one that made them."""
    try:
        found = load_tokenizer(folder).digest
    except (UserError, OSError, ValueError) as error:
        return [f"{folder} cannot be loaded: {error}"]
    return [] if found == digest else [f"{folder} is not that of the header"]
