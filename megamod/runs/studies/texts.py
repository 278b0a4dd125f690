"""Text of a study as data-bins, made from folders of text.

WORK/data/domains    the training domains, held-out text cut to `held_out_bytes` a split
WORK/data/random     the same training text, split at random into as many parts (a control)
WORK/data/novel      domains that nothing is trained on, with the tokenizer of the first
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from megamod.data.corpus.binarize import binarize
from megamod.data.corpus.documents import open_document_source
from megamod.data.lm.databin import DataBin
from megamod.files import write_atomic
from megamod.runs.studies.packages import resolve_package_path
from megamod.runs.studies.study_file import TextSpec

PARTS_SEED = 1  # of the random split


@dataclass(frozen=True)
class StudyText:
    """Text of a study. Its data-bins are written on first use.

    Attributes:
        source: folder with a folder of train, valid and test files per domain.
        work: folder of the study's files.
        domains: trained on and scored.
        novel: scored alone.
        tokenizer: as `megamod preprocess --tokenizer`.
        held_out_bytes: bytes of valid and of test text to keep per domain, in whole documents from
            the first on; None: all.
        items, bos: as `megamod preprocess`.
    """

    source: Path
    work: Path
    domains: Sequence[str]
    novel: Sequence[str]
    tokenizer: str
    held_out_bytes: int | None
    items: str | None = None
    bos: bool = False

    @cached_property
    def training_bin(self) -> Path:
        """Folder of the data-bin of the training domains, which is written at the first use."""
        return self._write_databin(
            "domains", {name: self._write_shortened_text(name) for name in self.domains}
        )

    @cached_property
    def random_bin(self) -> Path:
        """Folder of a data-bin with the same training text, randomly divided into as many domains.

        It is written at the first use.
        """
        count = len(self.domains)
        documents = [
            text for name in self.domains for text in self._iterate_documents(name, "train")
        ]
        random.Random(PARTS_SEED).shuffle(documents)
        inputs = {}
        for part, name in enumerate(self.domains):
            folder = self.work / "text" / f"part{part}"
            _write_documents(folder, "train", documents[part::count])
            for split in ("valid", "test"):  # never scored: the scored text is that of the domains
                _write_documents(
                    folder,
                    split,
                    _limit_documents(self._iterate_documents(name, split), self.held_out_bytes),
                )
            inputs[f"part{part}"] = folder
        return self._write_databin("random", inputs)

    @cached_property
    def novel_bin(self) -> Path:
        """Folder of the data-bin of the novel domains, which is written at the first use."""
        return self._write_databin(
            "novel", {name: self._write_shortened_text(name) for name in self.novel}
        )

    def write_excerpts(self, limit: int) -> Path:
        """Write an excerpt of the training text as one file; return the file.

        Args:
            limit: largest number of bytes of each domain, in whole documents, but at least one
                document.
        """
        documents = [
            document
            for name in self.domains
            for document in _limit_documents(self._iterate_documents(name, "train"), limit)
        ]
        _write_documents(self.work / "text" / "excerpts", "train", documents)
        return self.work / "text" / "excerpts" / "train.jsonl"

    @property
    def digest(self) -> str:
        """Digest of the data-bin of the training domains, which is written if it is missing."""
        return DataBin(self.training_bin).digest

    def _write_databin(self, kind: str, inputs: dict[str, Path]) -> Path:
        """Write the data-bin WORK/data/KIND and return its folder; one of the same text is kept.

        Args:
            kind: name of the data-bin's folder; "domains" is the one that may train a tokenizer.
            inputs: folder of text by domain.
        """
        output = self.work / "data" / kind
        output.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = self.tokenizer if kind == "domains" else self.training_bin / "tokenizer"
        binarize(inputs, tokenizer, output, item_unit=self.items, add_bos=self.bos, workers=1)
        return output

    def _write_shortened_text(self, name: str) -> Path:
        """Write a domain's text with held-out splits cut to `held_out_bytes`; return its folder.

        If nothing is to be cut, it is the folder of the source.

        Args:
            name: the domain.
        """
        if self.held_out_bytes is None:
            return self.source / name
        folder = self.work / "text" / name
        for split in ("train", "valid", "test"):
            limit = None if split == "train" else self.held_out_bytes
            _write_documents(
                folder, split, _limit_documents(self._iterate_documents(name, split), limit)
            )
        return folder

    def _iterate_documents(self, name: str, split: str) -> Iterator[str]:
        """Yield the texts of the documents in a split of the source's domain `name`, in order."""
        return (
            text for _, text in open_document_source(self.source / name).iterate_documents(split)
        )


def open_study_text(spec: TextSpec, inputs: Path, work: Path) -> StudyText:
    """Return the text that a study file asks for; cells of one process share its data-bins.

    Args:
        spec: block `text` of the study file.
        inputs: folder of the inputs, with a folder `domains`.
        work: folder of the study's data-bins.
    """
    return _open_shared_text(
        inputs / "domains",
        work,
        tuple(spec.domains),
        tuple(spec.novel),
        resolve_package_path(spec.tokenizer),
        spec.held_out_bytes,
        spec.items,
        spec.bos,
    )


# One object per text, whose cached properties all cells of a process share.
_open_shared_text = cache(StudyText)


def _limit_documents(documents: Iterable[str], limit: int | None) -> Iterator[str]:
    """Yield documents from the first on, as many as fit into `limit` bytes, but at least one."""
    total = 0
    for text in documents:
        total += len(text.encode())
        if limit is not None and total > limit and total > len(text.encode()):
            return
        yield text


def _write_documents(folder: Path, split: str, documents: Iterable[str]) -> None:
    """Write documents as FOLDER/SPLIT.jsonl, an object with the key `text` per line.

    The folder is created if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    write_atomic(folder / f"{split}.jsonl", "".join(lines))
