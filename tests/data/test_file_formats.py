"""Endings of data files in any case, and compressed files that are whole, cut or damaged."""

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path

import pytest
import zstandard

from megamod.data.corpus.documents import open_document_source, read_documents
from megamod.data.corpus.file_formats import (
    FORMATS,
    parse_json_object,
    read_numbered_lines,
    read_raw_lines,
    require_format,
    strip_format_endings,
)
from megamod.data.corpus.lines import read_lines
from megamod.errors import UserError
from megamod.merging.alignment.calibration import read_token_ids

COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
CONTENT = b"\xef\xbb\xbfa\r\nb\x0bc\n\nlast\n" + b"x" * 300_000
LINES = [(1, 3, b"a"), (2, 6, b"b\x0bc"), (3, 10, b""), (4, 11, b"last"), (5, 16, b"x" * 300_000)]


@pytest.mark.parametrize("ending", ["", *COMPRESSORS])
def test_lines_of_plain_and_compressed_files(tmp_path, ending):
    compress = COMPRESSORS.get(ending, bytes)
    path = tmp_path / f"a.txt{ending.upper()}"
    path.write_bytes(compress(CONTENT))
    assert list(read_numbered_lines(path)) == LINES
    assert b"".join(read_raw_lines(path)) == CONTENT
    path.write_bytes(compress(CONTENT[:100]) + compress(CONTENT[100:]))  # as `cat` joins them
    assert list(read_numbered_lines(path)) == LINES


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_damaged_compressed_files_are_one_message(tmp_path, ending):
    packed = COMPRESSORS[ending](CONTENT)
    path, draw = tmp_path / f"a.jsonl{ending}", random.Random(ending)
    contents = {packed[: draw.randrange(len(packed))]: "" for _ in range(20)}
    contents[packed[:-1]] = "cut short inside its"
    contents[packed[:20] + b"\xff" * 40] = "damaged"
    contents[b"plain text\n"] = "data as its ending says"
    contents[b""] = "empty, not"
    for content, message in contents.items():
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            list(read_numbered_lines(path))
        assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    path = tmp_path / "a.txt"
    path.write_bytes(packed)
    with pytest.raises(UserError, match=f"rename it to a.txt{ending}"):
        list(read_numbered_lines(path))


def test_the_ending_decides_the_format_and_unknown_endings_are_refused(tmp_path):
    for name, endings in FORMATS.items():
        for ending in endings:
            for compression in ("", *COMPRESSORS):
                path = tmp_path / f"dev{ending}{compression}"
                assert (
                    require_format(path, list(FORMATS))
                    == require_format(Path(str(path).upper()), list(FORMATS))
                    == name
                )
                assert strip_format_endings(path) == "dev"
    known = {ending for endings in FORMATS.values() for ending in endings}
    for ending in (".log", ".json5", ".jsonl~", ".warc", ".zip", ".tar.gz", "", ".gz", ".x y"):
        assert ending not in known
        path = tmp_path / f"a{ending}"
        path.write_text('{"text": "a"}\n')
        for refused in (
            lambda path=path: open_document_source(path),
            lambda path=path: list(read_documents(path)),
            lambda path=path: read_token_ids(path, str.split, 4),
        ):
            with pytest.raises(UserError, match=r"the ending .* is not one of") as error:
                refused()
            assert str(path) in str(error.value) and ".jsonl" in str(error.value)
    with pytest.raises(UserError, match=r"a.csv: the ending '.csv' is not one of .txt"):
        require_format(tmp_path / "a.csv", ["text", "JSON lines"])


@pytest.mark.parametrize(
    "ending", [*FORMATS["JSON lines"], *FORMATS["JSON"], ".NDJSON", ".Jsonl.gz"]
)
def test_json_lines_by_any_of_their_endings(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    rows = "\n\n".join(json.dumps({"text": text, "meta": {"n": 0}}) for text in ("a b", "c"))
    path.write_bytes((gzip.compress if ending.endswith("gz") else bytes)(rows.encode()))
    assert list(read_documents(path)) == ["a b", "c"]
    assert read_token_ids(path, str.split, 4) == [["a", "b"], ["c"]]


def test_a_folder_of_splits_with_any_endings(tmp_path):
    for name in ("train.TXT", "dev.ndjson", "test.jl.gz", "README.md", "train.py"):
        content = b'{"text": "a"}\n'
        (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if "gz" in name else content)
    splits = dict(open_document_source(tmp_path).iterate_documents())
    assert splits == {"train": '{"text": "a"}', "valid": "a", "test": "a"}
    (tmp_path / "test.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"split test .* there is test.jl.gz and test.jsonl"):
        open_document_source(tmp_path)


@pytest.mark.parametrize("content", [b"a\rb\rc", b"a\rb\rc\r", b"a\tb\rc\td\r\n"])
def test_line_ends_of_old_macs_are_named(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    for read in (read_numbered_lines, read_lines, read_documents):
        with pytest.raises(UserError, match="line ends are carriage returns alone") as error:
            list(read(path))
        assert len(str(error.value)) < len(str(path)) + 200
    path.write_bytes(b"a\rb\nc\r\n")  # a carriage return inside of a line is text
    assert [line for *_, line in read_numbered_lines(path)] == [b"a\rb", b"c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n {\n  "text": "a"\n }\n]\n', "a.json:1: a JSON list; JSON lines are needed"),
        ('[{"text": "a"}]\n', "a.json:1: a JSON list; JSON lines are needed"),
        ('{\n "text": "a"\n}\n', "JSON lines are needed: one whole object per line"),
        ("3\n", "a JSON int; JSON lines"),
        ("null\n", "a JSON null; JSON lines"),
    ],
)
def test_json_that_is_not_json_lines(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError) as error:
        list(read_documents(tmp_path / "a.json"))
    assert message in str(error.value)


def test_json_object_keeps_repeated_keys_that_nobody_reads():
    assert parse_json_object('{"a": 1, "a": 2, "text": "b"}', "here", "text") == {
        "a": 2,
        "text": "b",
    }


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.txt", Path(tmp_path)):
        with pytest.raises(UserError, match="cannot be read: "):
            list(read_numbered_lines(path))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "JSON lines"),
        ("a.ndjson", "JSON lines"),
        ("a.JSONL", "JSON lines"),
        ("a.jsonlines.gz", "JSON lines"),
        ("b.c.jl", "JSON lines"),
        ("a.TSV.zst", "TSV"),
        ("a.Parquet", "Parquet"),
        ("a.conllu", "CoNLL"),
    ],
)
def test_endings(name, kind):
    assert require_format(Path("x.txt") / name, list(FORMATS)) == kind


@pytest.mark.parametrize("name", ["a.xml", "a", "a.txt", ".tsv", "a.gz", "a.tsv.zip", "a.tsv~"])
def test_other_endings_are_refused(name):
    with pytest.raises(UserError, match=r"not one of \.tsv, \.tab \(TSV\); \.csv \(CSV\), each"):
        require_format(Path(name), ["TSV", "CSV"])
