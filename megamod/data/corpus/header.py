"""databin.json: vocabulary and domains of a data-bin, counts and digests of its files."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megamod.errors import UserError
from megamod.files import format_json
from megamod.names import Domain, check_domain
from megamod.schemas import Schema, read_checked_file
from megamod.tables import format_table

HEADER = "databin.json"
FORMAT = 1
SPLITS = ("train", "valid", "test")

Count = Annotated[int, Field(ge=0)]


class SplitHeader(Schema):
    """Counts and digests of a split; headers of earlier versions lack some digests.

    Attributes:
        items: number of documents or lines.
        tokens: with the bos and eos of each item.
        bytes: number of bytes of the UTF-8 text of the items, without line ends between them.
        max_id: largest id.
        text_sha256: of the text, see `ItemCounter`.
        sha256: of the two files, by ending.
        blocks: see `compute_block_digests`.
    """

    items: Count
    tokens: Count
    bytes: Count
    max_id: Count
    text_sha256: str | None = None
    sha256: dict[Literal["bin", "idx"], str] = Field({})
    blocks: str | None = None


class TokenizerHeader(Schema):
    """Kind and digest of the tokenizer."""

    kind: str
    digest: str


class DataBinHeader(Schema):
    """Content of databin.json; headers of earlier versions lack some keys.

    Attributes:
        items: the unit that an eos ends.
        bos: True if items start with bos.
        replaced: characters that were replaced because they were not UTF-8, by domain.
        domains: by name and split, in the order of preprocessing.
        files: SHA-256 of the tokenizer's files and the dictionaries, by path in the folder.
        digest: see `compute_header_digest`.
    """

    format: Literal[1]
    tokenizer: TokenizerHeader | None = None
    vocab_size: Count
    bos_id: Count | None
    pad_id: Count
    eos_id: Count
    unk_id: Count | None
    items: Literal["document", "line"] | None = None
    bos: bool = False
    replaced: dict[str, Count] = Field({})
    domains: dict[Domain, dict[Literal["train", "valid", "test"], SplitHeader]] = Field(
        min_length=1
    )
    files: dict[str, str] | None = None
    digest: str | None = None

    @model_validator(mode="after")
    def _check_ids_and_digest(self) -> "DataBinHeader":
        """Check that the fields of a header fit each other; a validator that pydantic calls.

        Raises:
            ValueError: for ids outside the vocabulary, or only one of `files` and `digest`.
        """
        ids = {name: getattr(self, name) for name in ("bos_id", "pad_id", "eos_id", "unk_id")}
        for domain, splits in self.domains.items():
            ids |= {f"domains.{domain}.{name}: max_id": s.max_id for name, s in splits.items()}
        for name, value in ids.items():
            if value is not None and value >= self.vocab_size:
                raise ValueError(
                    f"{name} is {value}, not below the vocabulary size {self.vocab_size}"
                )
        if (self.digest is None) is not (self.files is None):
            raise ValueError("has one of the keys files and digest; copy it again")
        return self


def read_databin_header(folder: Path) -> DataBinHeader:
    """Read and check databin.json in a folder.

    Raises:
        UserError: if it is missing, malformed, or differs from its digest.
    """
    path = folder / HEADER
    header = read_checked_file(path, DataBinHeader)
    if header.digest is not None:
        text = path.read_text(encoding="utf-8")
        if compute_header_digest(text, header.digest) != header.digest:
            raise UserError(f"{path}: does not have the digest in its last line; copy it again")
    return header


def read_databin_domains(folder: Path) -> tuple[str, ...]:
    """Read the domains of a data-bin, ours or one of fairseq, without opening its token files.

    Without databin.json they are the folders with a train split, in alphabetical order.

    Raises:
        UserError: if the folder is not a data-bin, or a domain's name cannot be a folder's.
    """
    if (folder / HEADER).exists():
        return tuple(read_databin_header(folder).domains)
    domains = sorted(file.parent.name for file in folder.glob("*/train.idx"))
    if not domains:
        raise UserError(f"--data {folder}: is not a data-bin; megamod preprocess writes one")
    return tuple(check_domain(domain, f"--data {folder}") for domain in domains)


def format_databin_header(header: Mapping[str, object]) -> str:
    """Format the content of databin.json, in the order of its keys."""
    return format_json(header, indent=2) + "\n"


def format_databin_summary(header: Mapping, output: Path) -> str:
    """Format the counts of a data-bin as a table by domain, with a line of sums below it.

    Args:
        header: content of databin.json.
        output: folder of the data-bin, named in the last line.
    """
    rows = [("domain", "train tokens", "valid tokens", "test tokens", "bytes", "replaced")]
    for name, splits in header["domains"].items():
        tokens = [f"{splits[split]['tokens']:,}" for split in ("train", "valid", "test")]
        text = sum(of["bytes"] for of in splits.values())
        rows.append((name, *tokens, f"{text:,}", str(header["replaced"][name])))
    table = format_table(rows, right_aligned_columns=range(1, 6))
    total = sum(of["tokens"] for splits in header["domains"].values() for of in splits.values())
    kind, vocabulary = header["tokenizer"]["kind"], header["vocab_size"]
    return (
        f"{table}\n{output}: {len(rows) - 1} domains, {total:,} tokens, {kind} tokenizer with "
        f"{vocabulary:,} ids, one eos per {header['items']}"
    )


def compute_header_digest(text: str, digest: str) -> str:
    """Compute the SHA-256 of the text of databin.json with an empty digest in it.

    Args:
        text: whole text of databin.json.
        digest: digest in its last line, which does not count.
    """
    empty = text.replace(f'"digest": "{digest}"\n}}', '"digest": ""\n}')
    return hashlib.sha256(empty.encode()).hexdigest()
