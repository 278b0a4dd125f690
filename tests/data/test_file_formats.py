"""Endings of data files in any case, and compressed files that are whole, cut or damaged."""

import gzip
from pathlib import Path

import pytest
import zstandard

from megamod.data.corpus.file_formats import FORMATS, format_of, raw_lines
from megamod.errors import UserError


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
    assert format_of(Path("x.txt") / name, list(FORMATS)) == kind


@pytest.mark.parametrize("name", ["a.xml", "a", "a.txt", ".tsv", "a.gz", "a.tsv.bz2", "a.tsv~"])
def test_other_endings_are_refused(name):
    with pytest.raises(UserError, match=r"not one of \.tsv, \.tab \(TSV\); \.csv \(CSV\), each"):
        format_of(Path(name), ["TSV", "CSV"])


LINES = [b"line %d of %d\n" % (n, n * n) for n in range(5000)]


def frames(parts: int) -> bytes:
    size = len(LINES) // parts
    return b"".join(
        zstandard.compress(b"".join(LINES[n * size : (n + 1) * size])) for n in range(parts)
    )


@pytest.mark.parametrize("parts", [1, 4])
def test_compressed_files_are_read_whole(tmp_path, parts):
    (tmp_path / "a.txt.zst").write_bytes(frames(parts))
    (tmp_path / "a.txt.GZ").write_bytes(gzip.compress(b"".join(LINES)))
    (tmp_path / "a.txt").write_bytes(b"".join(LINES))
    for name in ("a.txt.zst", "a.txt.GZ", "a.txt"):
        assert list(raw_lines(tmp_path / name)) == LINES


def test_cut_or_damaged_files_are_refused(tmp_path):
    for name, whole in (
        ("a.zst", frames(1)),
        ("b.zst", frames(2)),
        ("c.gz", gzip.compress(b"x" * 9999)),
    ):
        for content in (whole[:-3], whole[:9], b"plain text\n"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=rf"{name}: cannot be read: \S"):
                list(raw_lines(tmp_path / name))
    with pytest.raises(UserError, match=r"missing\.txt: cannot be read: No such file"):
        list(raw_lines(tmp_path / "missing.txt"))
