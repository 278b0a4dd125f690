"""A data-bin on disk: domains, vocabulary, and the token files of each split."""

import hashlib
import json
import os
import random
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from megamod.data.corpus.header import (
    HEADER,
    SPLITS,
    DataBinHeader,
    SplitHeader,
    read_databin_header,
)
from megamod.data.corpus.indexed import (
    BLOCK_BYTES,
    Dictionary,
    IndexedDataset,
    check_blocks,
    format_split_prefix,
)
from megamod.errors import UserError
from megamod.files import hash_file

if TYPE_CHECKING:
    from megamod.data.lm.blocks import TokenBlocks


SAMPLE_BLOCKS = 16  # of a split, whose digests are compared when it is opened


class DataBin:
    """A folder of token files: ours, with databin.json, or fairseq's, with dict.txt.

    Files of fairseq lie in a folder per domain, where held-out splits are named valid_NAME or
    valid; or directly in the folder, which is then one domain named after it.

    Attributes:
        domains: names, in the order of preprocessing (fairseq: sorted).
        vocab_size, bos_id, pad_id, eos_id, unk_id: size and ids of the tokenizer (fairseq: ids 0 to
            3); bos_id and unk_id are None if the header names none.
        digest: SHA-256 of the header (fairseq: of the dictionary and the indices).

    Args:
        path: the folder.
        verify: check of the tokens of a split when it is opened: "size" compares the length of
            their file, "sample" also the digests of random blocks, "full" the digest of the whole
            file; "sample" and "full" check the files of the tokenizer, too. Indices are always
            compared. Data-bins of fairseq, and older ones of ours, have fewer digests or none.
        share: number of a part, from 0, and number of parts, such as rank and ranks; only this part
            of the comparisons of tokens is done.

    Raises:
        UserError: if the folder is not a data-bin, its header is malformed or a digest differs.
    """

    def __init__(self, path: str | Path, verify: str = "sample", share: tuple[int, int] = (0, 1)):
        """Read the header, or the folder of fairseq; see the class for arguments and errors."""
        self.path, self.verify, self.share = Path(path), verify, share
        self._header: DataBinHeader | None = None
        self._flat = False
        if os.path.lexists(self.path / HEADER):
            self._set_attributes_from_header()
        else:
            self._set_attributes_from_fairseq()

    @property
    def special_ids(self) -> dict[str, int | None]:
        """Ids of bos, pad and eos by their names in a model's configuration: bos_token_id etc.

        bos is None if the header names none.
        """
        return {f"{name}_token_id": getattr(self, f"{name}_id") for name in ("bos", "pad", "eos")}

    @property
    def tokenizer_digest(self) -> str | None:
        """Digest of the tokenizer of the data; None if the header does not record it."""
        tokenizer = self._header and self._header.tokenizer
        return tokenizer and tokenizer.digest

    def find_split_prefix(self, domain: str, split: str) -> Path:
        """Find the path of a split's files without ending; the files need not exist.

        Raises:
            UserError: for an unknown domain or split.
        """
        self._check_domain_and_split(domain, split)
        if self._flat:
            return self.path / split
        prefix = self.path / format_split_prefix(domain, split)
        undecorated = prefix.with_name(split)  # fairseq-preprocess itself calls every split so
        if (
            self._header is None
            and not _build_index_path(prefix).exists()
            and _build_index_path(undecorated).exists()
        ):
            return undecorated
        return prefix

    def open_split(self, domain: str, split: str) -> IndexedDataset:
        """Open the tokens of the "train", "valid" or "test" split of a domain.

        Ids are checked against the vocabulary as they are read; without a header all of them now.

        Args:
            domain: one of `domains`.
            split: "train", "valid" or "test".
        Raises:
            UserError: for an unknown domain, a missing, malformed or empty split, or counts or
                digests that differ from those of the header.
        """
        prefix = self.find_split_prefix(domain, split)
        if self._header is None:
            return IndexedDataset(prefix, self.vocab_size)
        expected = self._header.domains[domain][split]
        dataset = IndexedDataset(prefix, self.vocab_size, scan=False)
        for name, actual, count in (
            ("items", len(dataset), expected.items),
            ("tokens", len(dataset.tokens), expected.tokens),
        ):
            if actual != count:
                raise UserError(
                    f"{prefix}: holds {actual} {name}, but {HEADER} says {count} for the split "
                    f"{split} of domain {domain}; they are from different runs"
                )
        self._check_digests(dataset, expected)
        return dataset

    def _check_digests(self, dataset: IndexedDataset, expected: SplitHeader) -> None:
        """Compare digests of a split with those in the header; raise UserError for one that
        differs.

        That of the index is always compared, those of the tokens as `verify` says, and only the
        part of the work that `share` assigns to this process.

        Args:
            dataset: the opened split.
            expected: the header's entry of the split.
        """
        digests, (part, parts) = expected.sha256, self.share
        if "idx" in digests and hash_file(dataset.idx_path) != digests["idx"]:
            raise UserError(f"{dataset.idx_path}: does not have the digest that {HEADER} says")
        if self.verify == "full" and part == zlib.crc32(str(dataset.prefix).encode()) % parts:
            if "bin" in digests and hash_file(dataset.bin_path) != digests["bin"]:
                raise UserError(f"{dataset.bin_path}: does not have the digest that {HEADER} says")
        elif self.verify == "sample" and expected.blocks is not None:
            mine = range(-(-dataset.tokens.nbytes // BLOCK_BYTES))[part::parts]
            count = min(len(mine), -(-SAMPLE_BLOCKS // parts))
            # Other blocks in every run, so that none stays unread for ever.
            numbers = random.SystemRandom().sample(mine, count)
            check_blocks(dataset.bin_path, expected.blocks, numbers)

    def open_blocks(
        self, domain: str, split: str, block_size: int, domain_token: int | None = None
    ) -> "TokenBlocks":
        """Open a split as sequences of `block_size` tokens.

        Args:
            domain, split: see `open_split`.
            block_size: tokens of a sequence, the domain token included.
            domain_token: see `TokenBlocks`.
        Raises:
            UserError: as `open_split`; and if the train split is shorter than one sequence.
        """
        from megamod.data.lm.blocks import TokenBlocks  # with torch, which campaigns do without

        dataset = self.open_split(domain, split)
        if split == "train" and len(dataset.tokens) < block_size:
            raise UserError(
                f"--max_seq_length {block_size}: domain {domain} has {len(dataset.tokens)} train "
                f"tokens, less than one sequence; the domains of {self.path} are "
                f"{', '.join(self.domains)}"
            )
        return TokenBlocks(dataset, block_size, self.eos_id, self.pad_id, domain_token)

    def get_text_bytes(self, domain: str, split: str) -> int:
        """Return the number of UTF-8 bytes of the text of a split, from the header; 0 without one.

        Raises:
            UserError: for an unknown domain or split.
        """
        self._check_domain_and_split(domain, split)
        return self._header.domains[domain][split].bytes if self._header else 0

    def _check_domain_and_split(self, domain: str, split: str) -> None:
        """Raise UserError if the data-bin has no such domain, or the domain no such split."""
        if domain not in self.domains:
            raise UserError(
                f"domain {domain!r} is not in the data-bin {self.path}; it holds "
                f"{', '.join(self.domains)}"
            )
        if split not in SPLITS:
            raise UserError(f"split {split!r}: allowed are {', '.join(SPLITS)}")
        if self._header is not None and split not in self._header.domains[domain]:
            raise UserError(f"{self.path / HEADER}: domain {domain} has no split {split}")

    def _set_attributes_from_header(self) -> None:
        """Set the attributes from databin.json; raise UserError if it or its files are damaged."""
        header = read_databin_header(self.path)
        for name, expected in (header.files or {}).items() if self.verify != "size" else ():
            file = self.path / name
            if not file.is_file() or hash_file(file) != expected:
                raise UserError(
                    f"{file}: is missing or does not have the digest that {HEADER} says; copy it "
                    "again"
                )
        self._header = header
        self.domains: tuple[str, ...] = tuple(header.domains)
        self.vocab_size = header.vocab_size
        self.bos_id, self.pad_id = header.bos_id, header.pad_id
        self.eos_id, self.unk_id = header.eos_id, header.unk_id
        self.digest = hash_file(self.path / HEADER)

    def _set_attributes_from_fairseq(self) -> None:
        """Set the attributes from the files of fairseq.

        Raise UserError if there are none, in the folder or below it, if both have some, or if the
        dictionary is missing or differs between domains.
        """
        if (self.path / "tokenizer").is_dir():
            raise UserError(
                f"--data {self.path}: was written by megamod preprocess, but its {HEADER} is "
                "missing; copy it again or preprocess the text again"
            )
        flat = [file for split in SPLITS if (file := self.path / f"{split}.idx").exists()]
        files = sorted(self.path.glob("*/*.idx"))
        if flat and files:
            raise UserError(
                f"--data {self.path}: holds token files both in the folder ({flat[0].name}) and in "
                f"folders of domains ({files[0].relative_to(self.path)}); move one kind away"
            )
        if not flat and not files:
            raise UserError(
                f"--data {self.path}: holds neither {HEADER} nor token files (train.idx or "
                "NAME/train.idx), so it is not a data-bin; megamod preprocess writes one"
            )
        self._flat = bool(flat)
        if flat:
            name = re.sub("[^A-Za-z0-9_-]", "_", self.path.resolve().name)
            self.domains = (name,)
        else:
            self.domains = tuple(dict.fromkeys(file.parent.name for file in files))
        dictionary = self._find_fairseq_dictionary()
        self.vocab_size = len(Dictionary.load(dictionary))
        self.bos_id, self.pad_id, self.eos_id, self.unk_id = range(4)
        parts = [dictionary, *(flat or files)]
        digests = [(str(file.relative_to(self.path)), hash_file(file)) for file in parts]
        self.digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def _find_fairseq_dictionary(self) -> Path:
        """Find the dict.txt that all domains share: that of the folder, or the first domain's copy.

        Raise UserError if it is missing or the copies differ.
        """
        dictionary = self.path / "dict.txt"
        if dictionary.exists():
            return dictionary
        copies = [file for name in self.domains if (file := self.path / name / "dict.txt").exists()]
        if self._flat or len(copies) < len(self.domains):
            raise UserError(f"--data {self.path}: holds token files but no dict.txt")
        different = [file for file in copies if hash_file(file) != hash_file(copies[0])]
        if different:
            raise UserError(
                f"--data {self.path}: {different[0]} differs from {copies[0]}, so the domains do "
                "not share their ids; binarize all of them with one dictionary"
            )
        return copies[0]


def _build_index_path(prefix: Path) -> Path:
    """Return the path of the .idx file of a split's prefix."""
    return prefix.with_name(f"{prefix.name}.idx")
