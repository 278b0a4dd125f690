"""Text to a data-bin, the folder of token files that training reads.

    OUT/databin.json                       header with counts and digests; see `DataBinHeader`
    OUT/tokenizer/                         also readable by AutoTokenizer
    OUT/dict.txt, OUT/NAME/dict.txt        if the special ids are those of fairseq
    OUT/NAME/train.{bin,idx}, valid_NAME.{bin,idx}, test_NAME.{bin,idx}

All input is read and checked before anything is written. Splits are written one by one to a hidden
folder next to OUT, which becomes OUT by one rename; a killed run resumes with the next split.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megamod.data.corpus.documents import DocumentSource, open_document_source
from megamod.data.corpus.header import (
    FORMAT,
    HEADER,
    SPLITS,
    SplitHeader,
    compute_header_digest,
    format_databin_header,
    read_databin_header,
)
from megamod.data.corpus.indexed import format_split_prefix
from megamod.data.corpus.pool import open_encoder
from megamod.data.corpus.split_files import ItemCounter, hash_split_files, write_split
from megamod.data.corpus.tokenizers import (
    Tokenizer,
    find_trainer,
    load_tokenizer,
)
from megamod.errors import UserError
from megamod.files import format_json, hash_file, sync_folder, sync_tree, write_atomic, write_json
from megamod.folder_lock import delete_leftovers, delete_temporaries, lock_folder_name
from megamod.names import check_domain
from megamod.progress import show_progress
from megamod.schemas import read_checked_file

logger = logging.getLogger(__name__)

ITEMS = ("document", "line")
BYTES_PER_WORKER = 64 << 20  # a worker process takes seconds to start
SAMPLE_BYTES = 8 << 20  # of text that a tokenizer is trained on
MOST_WORKERS = 1024


def binarize(
    inputs: Mapping[str, str | Path | Sequence[str]],
    tokenizer: str | Path | Tokenizer,
    output: str | Path,
    *,
    item_unit: str | None = None,
    add_bos: bool = False,
    text_column: str = "text",
    encoding_errors: str = "strict",
    seed: int = 0,
    workers: int | None = None,
    do_lower_case: bool | None = None,
    streaming: bool = False,
) -> dict:
    """Write a data-bin and return its header.

    A killed run leaves the hidden folder `.NAME.partial` next to `output`; the same call resumes
    there with the next split.

    Args:
        inputs: a source for `open_document_source` by domain; all later steps keep this order.
        tokenizer: an argument of `load_tokenizer`, `sentencepiece:VOCAB` or `wordpiece:VOCAB` to
            train one on the train splits, or a tokenizer.
        output: output folder. An existing data-bin of the same text, tokenizer and options is
            returned as it is.
        item_unit: "document" or "line"; an eos ends each item. The default is "line" for the GPT-2
            kind, as in fairseq, and "document" for the others.
        add_bos: start each item with bos, for models that read [CLS] text [SEP].
        text_column: JSON key or column of the text.
        encoding_errors: "strict" or "replace".
        seed: seed of the division of sources without splits.
        workers: processes; the default follows the amount of text. The output does not depend on
            it.
        do_lower_case: for BERT's word pieces, see `load_fast_tokenizer`.
        streaming: read data sets of the hub without storing them.

    Returns:
        The content of databin.json, see `DataBinHeader`.

    Raises:
        UserError: for bad input or an empty split, for an output folder that is not empty and not
            the same data-bin, that another run writes, or that cannot be written, and if a worker
            process dies.
    """
    output = Path(output).absolute()
    _check_domain_names(inputs)
    if item_unit not in (None, *ITEMS):
        raise UserError(f"--items {item_unit}: allowed are {' and '.join(ITEMS)}")
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"--workers {workers}: allowed are 1 to {MOST_WORKERS}")
    with ExitStack() as stack:
        existing = _read_existing_header(output)
        if existing is None:
            stack.enter_context(lock_folder_name(output))
            existing = _read_existing_header(output)  # another process may just have written it
        return _binarize_locked(
            *(inputs, tokenizer, output, existing, item_unit, add_bos, text_column),
            *(encoding_errors, seed, workers, streaming, do_lower_case),
        )


def _binarize_locked(
    inputs: Mapping[str, str | Path | Sequence[str]],
    tokenizer: str | Path | Tokenizer,
    output: Path,
    existing: dict | None,
    item_unit: str | None,
    add_bos: bool,
    text_column: str,
    encoding_errors: str,
    seed: int,
    workers: int | None,
    streaming: bool,
    do_lower_case: bool | None,
) -> dict:
    """Write the data-bin; the caller has locked the name of the output folder, see `binarize`.

    Args:
        existing: header of the data-bin in `output`, which then is not locked, because nothing is
            written; None: there is none.
        inputs, tokenizer, ...: as of `binarize`; `output` is absolute.
    Raises:
        UserError: as `binarize`.
    """
    sources = {
        name: open_document_source(
            spec,
            text_column=text_column,
            encoding_errors=encoding_errors,
            seed=seed,
            streaming=streaming,
        )
        for name, spec in inputs.items()
    }
    train, named = None, tokenizer
    if not isinstance(tokenizer, Tokenizer):
        train = find_trainer(str(tokenizer))
        if train is None:
            tokenizer = load_tokenizer(tokenizer, do_lower_case)
        elif do_lower_case is not None:
            raise UserError(
                f"--do_lower_case: --tokenizer {tokenizer} trains one, which has its own case"
            )
    gpt2 = isinstance(tokenizer, Tokenizer) and tokenizer.kind == "gpt2"
    item_unit = item_unit or ("line" if gpt2 else "document")
    counters_by_domain = {
        name: _count_items(name, source, item_unit) for name, source in sources.items()
    }
    if not isinstance(tokenizer, Tokenizer):
        logger.info("training the tokenizer %s, up to a minute", named)
        tokenizer = train(_iterate_train_sample(sources, counters_by_domain))
    header = {
        "format": FORMAT,
        "tokenizer": {"kind": tokenizer.kind, "digest": tokenizer.digest},
        "vocab_size": tokenizer.vocab_size,
        **tokenizer.special_ids,
        "items": item_unit,
        "bos": add_bos,
        "replaced": {name: source.decoding.replaced for name, source in sources.items()},
    }
    key = _compute_identity(
        header,
        {
            n: {s: t.digest for s, t in counters.items()}
            for n, counters in counters_by_domain.items()
        },
    )
    if existing is not None:
        if _compute_header_identity(existing) != key:
            raise UserError(
                f"--output_dir {output}: holds a data-bin made from other text or with another "
                "tokenizer or other options; choose a new folder"
            )
        delete_leftovers(output, _build_work_path(output))
        logger.info("%s: is this data-bin already, nothing is written", output)
        return existing
    if workers is None:
        total = sum(
            counter.bytes
            for counters in counters_by_domain.values()
            for counter in counters.values()
        )
        workers = min(os.cpu_count() or 1, 1 + total // BYTES_PER_WORKER)
    try:
        with _open_work_folder(output, key) as work:
            header["domains"] = _write_splits(
                sources, counters_by_domain, tokenizer, item_unit, add_bos, workers, work
            )
            _complete_databin(work / "databin", header, tokenizer)
            os.rename(work / "databin", output)
            sync_folder(output.parent)
    except OSError as error:
        raise UserError(f"--output_dir {output}: cannot be written: {error}") from error
    except BrokenProcessPool as error:
        raise UserError(
            f"--workers {workers}: a worker process died, perhaps for lack of memory; the same "
            "command with fewer workers resumes the run"
        ) from error
    return header


def _check_domain_names(inputs: Mapping[str, object]) -> None:
    """Raise UserError if there is no domain, or one whose name cannot be a folder of a data-bin.

    Args:
        inputs: mapping whose keys are the domains, see `binarize`.
    """
    if not inputs:
        raise UserError("no domain given: pass --input NAME=PATH or --builtin")
    for name in inputs:
        check_domain(name, "--input")
        if name == "tokenizer":
            raise UserError("--input tokenizer=...: is the name of a folder of every data-bin")


def _read_existing_header(output: Path) -> dict | None:
    """Read the header of an existing data-bin in `output`; None for an absent or empty folder.

    Raise UserError if the folder holds anything else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        return read_databin_header(output).model_dump(exclude_unset=True)
    except UserError as error:
        raise UserError(
            f"--output_dir {output}: exists and is not a data-bin of this command; choose a new "
            "folder"
        ) from error


def _compute_identity(
    header: Mapping[str, object], digests: Mapping[str, Mapping[str, str]]
) -> str:
    """Compute the SHA-256 of everything that decides the content of a data-bin.

    Args:
        header: its keys `tokenizer`, `items` and `bos` count.
        digests: digest of the text by domain and split; the order of domains counts.
    """
    ordered = [
        [name, *(split_digests[split] for split in SPLITS)]
        for name, split_digests in digests.items()
    ]
    content = [FORMAT, header.get("tokenizer"), header.get("items"), ordered]
    content += ["bos"] if header.get("bos") else []
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _compute_header_identity(header: dict) -> str:
    """Compute the identity of an existing data-bin from its header, see `_compute_identity`.

    A header of an earlier version may lack digests of text. Its identity then equals that of no new
    data-bin, so it is not taken for one of the same text.
    """
    digests = {
        name: {split: splits.get(split, {}).get("text_sha256") for split in SPLITS}
        for name, splits in header["domains"].items()
    }
    return _compute_identity(header, digests)


def _iterate_items(
    source: DocumentSource, item_unit: str, only_split: str | None = None
) -> Iterator[tuple[str, str]]:
    """Yield split and text of each item of a source.

    Args:
        item_unit: "document" or "line", see `binarize`.
        only_split: the only split to yield; None: all.
    """
    return (
        source.iterate_lines(only_split)
        if item_unit == "line"
        else source.iterate_documents(only_split)
    )


def _count_items(name: str, source: DocumentSource, item_unit: str) -> dict[str, ItemCounter]:
    """Read the whole source of a domain and count its items: a counter for each split.

    Args:
        name: the domain, for messages.
        item_unit: "document" or "line", see `binarize`.
    Raises:
        UserError: for content that cannot be read, and for a split without text.
    """
    counters = {split: ItemCounter() for split in SPLITS}
    for split, text in show_progress(
        _iterate_items(source, item_unit), f"reading {name}", unit=item_unit
    ):
        counters[split].add_item(text)
    empty = [split for split, counter in counters.items() if not counter.bytes]
    if len(empty) == len(SPLITS):
        raise UserError(f"domain {name}: {source.where} holds no text")
    if empty:
        count = sum(counter.items for counter in counters.values())
        raise UserError(
            f"domain {name}: {source.where} has {count} {item_unit}s, none in the split "
            f"{empty[0]}. A source without splits is divided at random by documents (text between "
            "blank lines): use some hundred, another --seed, or a folder with a file per split"
        )
    return counters


def _iterate_train_sample(
    sources: Mapping[str, DocumentSource],
    counters_by_domain: Mapping[str, Mapping[str, ItemCounter]],
) -> Iterator[str]:
    """Yield evenly spaced train documents: about `SAMPLE_BYTES`, an equal part from each domain.

    Args:
        sources: source of each domain.
        counters_by_domain: counter of each domain and split, for the size of its text.
    """
    for name, source in sources.items():
        share = min(1.0, SAMPLE_BYTES / len(sources) / counters_by_domain[name]["train"].bytes)
        for number, (_, text) in enumerate(source.iterate_documents("train")):
            if int((number + 1) * share) > int(number * share):
                yield text


def _build_work_path(output: Path) -> Path:
    """Build the path of the work folder of `output`, a hidden sibling named `.NAME.partial`."""
    return output.with_name(f".{output.name}.partial")


@contextmanager
def _open_work_folder(output: Path, key: str) -> Iterator[Path]:
    """Create and yield the work folder of `output`; remove it on success.

    If a killed run with the same `key` left the folder, its content is kept, else it is emptied. If
    the block raises, the folder stays.

    Args:
        output: locked by this process, see `lock_folder_name`.
        key: identity of the data-bin, see `_compute_identity`; run.json records it.
    """
    work = _build_work_path(output)
    record, content = work / "run.json", format_json({"key": key}, indent=2) + "\n"
    if not record.exists() or record.read_text(encoding="utf-8") != content:
        for folder in ("parts", "databin"):
            shutil.rmtree(work / folder, ignore_errors=True)
    (work / "parts").mkdir(parents=True, exist_ok=True)
    delete_temporaries(work)
    write_atomic(record, content)
    yield work
    shutil.rmtree(work, ignore_errors=True)


def _write_splits(
    sources: Mapping[str, DocumentSource],
    counters_by_domain: Mapping[str, Mapping[str, ItemCounter]],
    tokenizer: Tokenizer,
    item_unit: str,
    add_bos: bool,
    workers: int,
    work: Path,
) -> dict[str, dict[str, dict]]:
    """Write the token files of all splits that are not complete; return all header entries.

    `work/databin` becomes the data-bin. `work/parts/NAME.SPLIT.json` records the header entry of
    each written split. A split is complete if this record exists, has digests of blocks, and has
    the digests of both token files. Files of any other split, temporary ones too, are deleted, and
    the split is written again.

    Args:
        sources: source of each domain.
        counters_by_domain: counter of each domain and split from the first reading.
        item_unit: "document" or "line".
        workers: number of processes that encode.
        work: see `_open_work_folder`.
    Returns:
        entries by domain and split, as in `DataBinHeader.domains`.
    Raises:
        UserError: if a text has changed since it was first read.
    """
    domains: dict[str, dict[str, dict]] = {name: {} for name in sources}
    total = sum(
        counter.bytes for counters in counters_by_domain.values() for counter in counters.values()
    )
    with (
        open_encoder(tokenizer, workers) as encode,
        show_progress(total=total, unit="B") as bar,
    ):
        for name, source in sources.items():
            folder = work / "databin" / name
            folder.mkdir(parents=True, exist_ok=True)
            for split in SPLITS:
                bar.set_description(f"{name} {split}")
                prefix = work / "databin" / format_split_prefix(name, split)
                record = work / "parts" / f"{name}.{split}.json"
                if record.exists():
                    entry = read_checked_file(record, SplitHeader).model_dump()
                    if hash_split_files(prefix) == entry["sha256"] and entry["blocks"]:
                        domains[name][split] = entry
                        bar.update(entry["bytes"])
                        continue
                for file in list(folder.iterdir()):  # parts that a killed run left
                    if file.name.lstrip(".").startswith(f"{prefix.name}."):
                        file.unlink()
                texts = (text for _, text in _iterate_items(source, item_unit, split))
                entry = write_split(texts, tokenizer, add_bos, prefix, encode, bar.update)
                if entry["text_sha256"] != counters_by_domain[name][split].digest:
                    raise UserError(f"domain {name}: {source.where} changed while it was read")
                write_json(record, entry)
                domains[name][split] = entry
    return domains


def _complete_databin(databin: Path, header: dict, tokenizer: Tokenizer) -> None:
    """Add tokenizer, dictionaries and, last, databin.json to a folder of token files.

    Files and folders that belong to no domain, as a killed run may leave them, are deleted.

    Args:
        databin: folder of the token files of all splits.
        header: content of databin.json; "files" and "digest" are added to it.
    """
    for entry in list(databin.iterdir()):
        if entry.is_file():
            entry.unlink()
        elif entry.name not in header["domains"]:
            shutil.rmtree(entry)
    tokenizer.save(databin / "tokenizer")
    for folder in (databin, *(databin / name for name in header["domains"])):
        tokenizer.save_dictionary(folder / "dict.txt")
    header["files"] = {
        str(file.relative_to(databin)): hash_file(file)
        for file in sorted(databin.rglob("*"))
        if file.is_file() and file.suffix not in (".bin", ".idx")
    }
    sync_tree(databin)
    text = format_databin_header({**header, "digest": ""})
    header["digest"] = compute_header_digest(text, "")
    write_atomic(databin / HEADER, format_databin_header(header))
