"""Text to a data-bin: the folder of token files that training reads.

    OUT/databin.json                       what is inside, with digests; see `binarize`
    OUT/tokenizer/                         also readable by AutoTokenizer
    OUT/dict.txt, OUT/NAME/dict.txt        if the special ids are those of fairseq
    OUT/NAME/train.{bin,idx}, valid_NAME.{bin,idx}, test_NAME.{bin,idx}

All input is read and checked before anything is written. The work happens in a hidden folder beside
OUT, part by part, so a run that was killed goes on where it was, and OUT appears whole.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamod.data.corpus.documents import SPLITS, Source, open_source
from megamod.data.corpus.indexed import IndexedWriter, dtype_for, split_prefix
from megamod.data.corpus.pool import Encode, encoder
from megamod.data.corpus.tokenizers import (
    Tokenizer,
    load_tokenizer,
    trainer_of,
)
from megamod.errors import UserError
from megamod.files import sha256, sync_folder, sync_tree, write_json

FORMAT = 1
HEADER = "databin.json"
ITEMS = ("document", "line")
BYTES_PER_WORKER = 64 << 20  # a worker process takes seconds to start
SAMPLE_BYTES = 8 << 20


@dataclass
class Tally:
    """Number, UTF-8 bytes and digest of the items of one split; the digest sees their borders."""

    items: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, text: str) -> None:
        """Count one item."""
        data = text.encode()
        self.items += 1
        self.bytes += len(data)
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    @property
    def digest(self) -> str:
        """SHA-256 so far, hexadecimal."""
        return self._hash.hexdigest()


def binarize(
    inputs: Mapping[str, str | Path | Sequence[str]],
    tokenizer: str | Path | Tokenizer,
    output: str | Path,
    *,
    items: str | None = None,
    bos: bool = False,
    field: str = "text",
    encoding_errors: str = "strict",
    seed: int = 0,
    workers: int | None = None,
    do_lower_case: bool | None = None,
    streaming: bool = False,
) -> dict:
    """Write a data-bin and return its header.

    Args:
        inputs: for each domain, in the order kept by all that follows, what `open_source` reads.
        tokenizer: what `load_tokenizer` reads, `sentencepiece:VOCAB` to train one on the train
            splits, or a tokenizer.
        output: folder to make. If it is a data-bin of the same text, tokenizer and items already,
            nothing is done.
        items: "document" or "line"; each item gets an eos. Default "line", which is fairseq's way,
            for the GPT-2 kind and "document" for the others.
        bos: put bos in front of each item, as models that read [CLS] text [SEP] want it.
        field: JSON key or column of the text.
        encoding_errors: "strict" or "replace".
        seed: divides sources that are not split yet.
        workers: processes; default by the amount of text. The output does not depend on it.
        do_lower_case: for BERT's word pieces, see `load_fast`.
        streaming: read data sets of the hub without storing them.

    Returns:
        The content of databin.json: {"format", "tokenizer": {"kind", "digest"}, "vocab_size",
        "bos_id", "pad_id", "eos_id", "unk_id", "items", "bos", "replaced": {NAME: characters},
        "domains": {NAME: {SPLIT: {"items", "tokens", "bytes", "max_id", "text_sha256",
        "sha256": {"bin", "idx"}}}}}. "bytes" counts the UTF-8 text of the items without line ends
        between them, "tokens" includes the bos and eos of each item.

    Raises:
        UserError: on bad input, an empty split, or an output folder that holds something else.
    """
    output = Path(output).absolute()
    _check_names(inputs)
    if items not in (None, *ITEMS):
        raise UserError(f"--items {items}: allowed are {' and '.join(ITEMS)}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least 1 is needed")
    before = _existing(output)
    sources = {
        name: open_source(
            spec, field=field, encoding_errors=encoding_errors, seed=seed, streaming=streaming
        )
        for name, spec in inputs.items()
    }
    train = None
    if not isinstance(tokenizer, Tokenizer):
        train = trainer_of(str(tokenizer))
        if train is None:
            tokenizer = load_tokenizer(tokenizer, do_lower_case)
        elif do_lower_case is not None:
            raise UserError(
                f"--do_lower_case: --tokenizer {tokenizer} trains one, which has its own case"
            )
    gpt2 = isinstance(tokenizer, Tokenizer) and tokenizer.kind == "gpt2"
    items = items or ("line" if gpt2 else "document")
    tallies = {name: _scan(name, source, items) for name, source in sources.items()}
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = train(_sample(sources, tallies))
    header = {
        "format": FORMAT,
        "tokenizer": {"kind": tokenizer.kind, "digest": tokenizer.digest},
        "vocab_size": tokenizer.vocab_size,
        **tokenizer.special_ids,
        "items": items,
        "bos": bos,
        "replaced": {name: source.decoding.replaced for name, source in sources.items()},
    }
    key = _identity(header, {n: {s: t.digest for s, t in of.items()} for n, of in tallies.items()})
    if before is not None:
        if _identity_of(before) != key:
            raise UserError(
                f"--output_dir {output}: holds a data-bin made from other text or with another "
                "tokenizer or other options; name a new folder"
            )
        return before
    if workers is None:
        total = sum(tally.bytes for of in tallies.values() for tally in of.values())
        workers = min(os.cpu_count() or 1, 1 + total // BYTES_PER_WORKER)
    try:
        with _workplace(output, key) as work:
            header["domains"] = _write_parts(sources, tallies, tokenizer, items, bos, workers, work)
            _finish(work / "databin", header, tokenizer)
            os.rename(work / "databin", output)
            sync_folder(output.parent)
    except OSError as error:
        raise UserError(f"--output_dir {output}: cannot be written: {error}") from error
    except BrokenProcessPool as error:
        raise UserError(
            f"--workers {workers}: a worker process died, perhaps for lack of memory; the same "
            "command with fewer workers goes on where this one stopped"
        ) from error
    return header


def _check_names(inputs: Mapping[str, object]) -> None:
    if not inputs:
        raise UserError("no domain given: pass --input NAME=PATH or --builtin")
    for name in inputs:
        if not re.fullmatch("[A-Za-z0-9_-]+", name) or name == "tokenizer":
            raise UserError(
                f"--input {name}=...: a domain name is made of letters, digits, _ and -, and is "
                'not "tokenizer", which is a folder of every data-bin'
            )


def _existing(output: Path) -> dict | None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        header = json.loads((output / HEADER).read_text(encoding="utf-8"))
        _identity_of(header)
        return header
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--output_dir {output}: exists and is not a data-bin of this command; name a new "
            "folder"
        ) from error


def _identity(header: Mapping[str, object], digests: Mapping[str, Mapping[str, str]]) -> str:
    ordered = [[name, *(of[split] for split in SPLITS)] for name, of in digests.items()]
    told = [FORMAT, header["tokenizer"], header["items"], ordered]
    told += ["bos"] if header.get("bos") else []
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _identity_of(header: dict) -> str:
    domains = header["domains"].items()
    return _identity(
        header, {name: {s: of[s]["text_sha256"] for s in SPLITS} for name, of in domains}
    )


def _texts(source: Source, items: str, only: str | None = None) -> Iterator[tuple[str, str]]:
    return source.lines(only) if items == "line" else source.documents(only)


def _scan(name: str, source: Source, items: str) -> dict[str, Tally]:
    """Read a whole source, which finds all that is wrong with it."""
    tallies = {split: Tally() for split in SPLITS}
    for split, text in _texts(source, items):
        tallies[split].add(text)
    empty = [split for split, tally in tallies.items() if not tally.bytes]
    if len(empty) == len(SPLITS):
        raise UserError(f"domain {name}: {source.where} holds no text")
    if empty:
        raise UserError(
            f"domain {name}: the split {empty[0]} of {source.where} is empty. A single file is "
            "divided by chance and needs some hundred documents (another --seed may do); a folder "
            "with train, valid and test files is taken as it is"
        )
    return tallies


def _sample(
    sources: Mapping[str, Source], tallies: Mapping[str, Mapping[str, Tally]]
) -> Iterator[str]:
    """Evenly spaced train documents, about `SAMPLE_BYTES` in all and the same of each domain."""
    for name, source in sources.items():
        share = min(1.0, SAMPLE_BYTES / len(sources) / tallies[name]["train"].bytes)
        for number, (_, text) in enumerate(source.documents("train")):
            if int((number + 1) * share) > int(number * share):
                yield text


@contextmanager
def _workplace(output: Path, key: str) -> Iterator[Path]:
    """The hidden folder beside `output`, emptied unless it was begun under the same key, and
    removed when the block succeeds."""
    work = output.with_name(f".{output.name}.partial")
    (work / "parts").mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output_dir {output}: another run is making it") from None
        begun = work / "run.json"
        if not begun.exists() or json.loads(begun.read_text()) != {"key": key}:
            for folder in ("parts", "databin"):
                shutil.rmtree(work / folder, ignore_errors=True)
            (work / "parts").mkdir()
            write_json(begun, {"key": key})
        yield work
        shutil.rmtree(work, ignore_errors=True)


def _write_parts(
    sources: Mapping[str, Source],
    tallies: Mapping[str, Mapping[str, Tally]],
    tokenizer: Tokenizer,
    items: str,
    bos: bool,
    workers: int,
    work: Path,
) -> dict[str, dict[str, dict]]:
    from tqdm import tqdm

    domains: dict[str, dict[str, dict]] = {name: {} for name in sources}
    total = sum(tally.bytes for of in tallies.values() for tally in of.values())
    with (
        encoder(tokenizer, workers) as encode,
        tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for name, source in sources.items():
            folder = work / "databin" / name
            folder.mkdir(parents=True, exist_ok=True)
            for split in SPLITS:
                bar.set_description(f"{name} {split}")
                prefix = work / "databin" / split_prefix(name, split)
                record = work / "parts" / f"{name}.{split}.json"
                if record.exists():
                    done = json.loads(record.read_text())
                    if _digests(prefix) == done["sha256"]:
                        domains[name][split] = done
                        bar.update(done["bytes"])
                        continue
                for left in list(folder.iterdir()):
                    if left.name.lstrip(".").startswith(f"{prefix.name}."):
                        left.unlink()
                texts = (text for _, text in _texts(source, items, split))
                done = _write_part(texts, tokenizer, bos, prefix, encode, bar.update)
                if done["text_sha256"] != tallies[name][split].digest:
                    raise UserError(f"domain {name}: {source.where} changed while it was read")
                write_json(record, done)
                domains[name][split] = done
    return domains


def _write_part(
    texts: Iterator[str],
    tokenizer: Tokenizer,
    bos: bool,
    prefix: Path,
    encode: Encode,
    progress: Callable[[int], object],
) -> dict:
    tally = Tally()
    front = [tokenizer.bos_id] if bos else []
    tokens, largest, shown = 0, tokenizer.eos_id, 0

    def counted() -> Iterator[str]:
        for text in texts:
            tally.add(text)
            yield text

    with IndexedWriter(prefix, dtype_for(tokenizer.vocab_size)) as writer:
        for ids in encode(counted()):
            ids = np.concatenate([front, ids, [tokenizer.eos_id]]).astype(np.int32)
            writer.add(ids)
            tokens += len(ids)
            largest = max(largest, int(ids.max()))
            if tally.bytes > shown:
                progress(tally.bytes - shown)
                shown = tally.bytes
    return {
        "items": tally.items,
        "tokens": tokens,
        "bytes": tally.bytes,
        "max_id": largest,
        "text_sha256": tally.digest,
        "sha256": _digests(prefix),
    }


def _digests(prefix: Path) -> dict[str, str]:
    """Digests of a split's two files; those that are missing are missing here."""
    files = {ending: prefix.with_name(f"{prefix.name}.{ending}") for ending in ("bin", "idx")}
    return {ending: sha256(file) for ending, file in files.items() if file.exists()}


def _finish(databin: Path, header: dict, tokenizer: Tokenizer) -> None:
    """Add what is not a split, header last, after clearing what a killed run left of it."""
    for entry in list(databin.iterdir()):
        if entry.is_file():
            entry.unlink()
        elif entry.name not in header["domains"]:
            shutil.rmtree(entry)
    tokenizer.save(databin / "tokenizer")
    for folder in (databin, *(databin / name for name in header["domains"])):
        tokenizer.save_dictionary(folder / "dict.txt")
    sync_tree(databin)
    write_json(databin / HEADER, header)
