"""Token files: fairseq's bytes, and every way a file can be wrong."""

import copy
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from megamod.data.corpus.indexed import (
    Dictionary,
    IndexedDataset,
    IndexedWriter,
    select_token_dtype,
)
from megamod.errors import UserError

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared/golden/demix_btm/databin"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no recorded data-bin here")

ITEMS = [[5, 6, 7, 2], [2], [8, 9, 2], [4, 2]]


def write(prefix: Path, items=ITEMS, dtype=np.uint16) -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for item in items:
            writer.add_item(np.array(item))
    return prefix


def test_dtype_follows_the_vocabulary():
    assert [select_token_dtype(size) for size in (50264, 65499, 65500)] == [
        np.uint16,
        np.uint16,
        np.int32,
    ]


def test_bytes_of_the_format(tmp_path):
    prefix = write(tmp_path / "a")
    tokens = [token for item in ITEMS for token in item]
    assert prefix.with_suffix(".bin").read_bytes() == struct.pack("<10H", *tokens)
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, 8, 4)
    expected += struct.pack("<4i", 4, 1, 3, 2) + struct.pack("<4q", 0, 8, 10, 16)
    assert prefix.with_suffix(".idx").read_bytes() == expected
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


@needs_golden
def test_reads_and_writes_fairseq_files(tmp_path):
    dictionary = Dictionary.load(GOLDEN / "dict.txt")
    lines = (GOLDEN / "train.txt.bpe").read_text().split("\n")[:-1]
    items = [[dictionary.get_id(symbol) for symbol in line.split()] + [2] for line in lines]
    write(tmp_path / "train", items, select_token_dtype(len(dictionary)))
    for name in ("train.bin", "train.idx"):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()
    dataset = IndexedDataset(GOLDEN / "train", vocab_size=len(dictionary))
    assert [dataset[item].tolist() for item in range(len(dataset))] == items
    dictionary.save(tmp_path / "dict.txt")
    assert (tmp_path / "dict.txt").read_bytes() == (GOLDEN / "dict.txt").read_bytes()


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8"])
def test_round_trip_in_every_dtype(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("megamod.data.corpus.indexed.SCAN", 2)
    generator = np.random.default_rng(1)
    items = [generator.integers(0, 120, size).tolist() for size in (3, 1, 0, 50, 7)]
    dataset = IndexedDataset(write(tmp_path / "a", items, dtype), vocab_size=120)
    assert dataset.dtype == np.dtype(dtype)
    assert [dataset[item].tolist() for item in range(len(dataset))] == items
    assert dataset.sizes.tolist() == [3, 1, 0, 50, 7] and dataset.sizes.dtype == np.int32
    assert dataset.offsets.tolist() == [0, 3, 4, 4, 54, 61] and dataset.offsets.dtype == np.int64
    assert dataset.tokens.tolist() == [token for item in items for token in item]
    assert dataset[-1].tolist() == items[-1]
    with pytest.raises(IndexError):
        dataset[5]


def test_ids_are_read_only_and_pickle_as_a_path(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "a"))
    with pytest.raises(ValueError):
        dataset.tokens[0] = 1
    assert dataset.__reduce__() == (IndexedDataset, (tmp_path / "a", None, False))
    assert copy.copy(dataset)[2].tolist() == [8, 9, 2]


def test_a_failed_writer_changes_nothing(tmp_path):
    prefix = write(tmp_path / "a")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), IndexedWriter(prefix, np.uint16) as writer:
        writer.add_item(np.array([1, 2, 3]))
        raise RuntimeError
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("where", ["bin", "idx"])
def test_a_crash_during_replacement_never_mixes_files(tmp_path, monkeypatch, where):
    prefix = write(tmp_path / "a")

    def replace(source, target, real=os.replace):
        if str(target).endswith(where):
            raise OSError("crash")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="crash"):
        write(prefix, [[1, 2], [3]])
    assert not prefix.with_suffix(".idx").exists()
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("ids", [[-1], [65536], [[1, 2]], [0.5]])
def test_writer_refuses_bad_items(tmp_path, ids):
    with pytest.raises(ValueError), IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_item(np.array(ids))
    assert not list(tmp_path.iterdir())


def raw(sizes=(4, 1, 3, 2), starts=(0, 8, 10, 16), *, code=8, version=1, count=4, middle=b""):
    head = b"MMIDIDX\0\0" + struct.pack("<QBQ", version, code, count)
    pointers = struct.pack(f"<{len(starts)}q", *starts)
    return head + middle + struct.pack(f"<{len(sizes)}i", *sizes) + pointers


MALFORMED = {
    "magic": (b"PK" + raw()[2:], "byte 0"),
    "empty file": (b"", "ends at byte 0"),
    "short head": (raw()[:20], "ends at byte 20"),
    "version": (raw(version=2), "version 2 at byte 9"),
    "dtype": (raw(code=6), "dtype code 6 at byte 17"),
    "truncated": (raw()[:-3], "71 bytes long, but 4 items .* need 74"),
    "too long": (raw() + b"\0", "75 bytes long"),
    "absurd count": (raw(count=1 << 63), f"{1 << 63} items"),
    "no items": (raw((), (), count=0), "no items"),
    "all items empty": (raw((0,) * 4, (0,) * 4), "all 4 items are empty"),
    "negative size": (raw((4, -1, 3, 2)), "size -1 of item 1 at byte 30"),
    "offsets fall": (raw(starts=(0, 8, 6, 16)), "offset 6 of item 2 at byte 58 .* end at 10"),
    "offset not at an item": (raw(starts=(0, 8, 10, 1 << 40)), "item 3 at byte 66"),
    "first offset": (raw(starts=(2, 8, 10, 16)), "offset 2 of item 0 at byte 42"),
    "ids too few": (raw((4, 1, 3, 9)), r"a\.bin: ends at byte 20, shorter .* end at byte 34"),
    "ids too many": (raw((4, 1, 3, 1)), r"a\.bin: ends at byte 20, longer .* end at byte 18"),
    "megatron": (
        raw(middle=struct.pack("<Q", 5)) + struct.pack("<5q", 0, 1, 2, 3, 4),
        "Megatron-LM .5 document bounds at byte 26",
    ),
}


@pytest.mark.parametrize("chunk", [1, 3, 1 << 22])
@pytest.mark.parametrize("case", MALFORMED)
def test_errors_name_file_and_byte(tmp_path, monkeypatch, case, chunk):
    monkeypatch.setattr("megamod.data.corpus.indexed.SCAN", chunk)
    prefix = write(tmp_path / "a")
    content, message = MALFORMED[case]
    prefix.with_suffix(".idx").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        IndexedDataset(prefix)
    assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_missing_files_are_named(tmp_path, ending):
    prefix = write(tmp_path / "a")
    prefix.with_suffix(f".{ending}").unlink()
    with pytest.raises(UserError, match=rf"a\.{ending}: No such file"):
        IndexedDataset(prefix)


def test_random_damage_is_an_error_or_harmless(tmp_path):
    """Whatever happens to the index, the reader answers with a UserError or with valid items."""
    generator = np.random.default_rng(0)
    prefix = write(tmp_path / "a")
    whole = bytearray(raw())
    refused = 0
    for _ in range(500):
        damaged = whole.copy()
        for where in generator.integers(0, len(whole), generator.integers(1, 4)):
            damaged[where] ^= 1 << int(generator.integers(8))
        prefix.with_suffix(".idx").write_bytes(damaged[: generator.integers(1, len(whole) + 40)])
        try:
            dataset = IndexedDataset(prefix)
            assert dataset.offsets[-1] == len(dataset.tokens)
        except UserError:
            refused += 1
    assert refused > 450


def test_ids_outside_the_vocabulary_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megamod.data.corpus.indexed.SCAN", 3)
    prefix = write(tmp_path / "a")
    IndexedDataset(prefix, vocab_size=10)
    message = r"token id 9 at byte 12 \(item 2\) is outside the vocabulary of 9: allowed are 0 to 8"
    with pytest.raises(UserError, match=message):
        IndexedDataset(prefix, vocab_size=9)
    write(prefix, [[1, 2], [3, -4]], np.int32)
    with pytest.raises(UserError, match=r"token id -4 at byte 12 \(item 1\)"):
        IndexedDataset(prefix, vocab_size=9)


def test_dictionary_numbers_lines_from_four(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_bytes("the 7\nof 5\r\nnew york 3\n\u2028 1\n".encode())
    dictionary = Dictionary.load(path)
    assert len(dictionary) == 8
    names = ("<s>", "<pad>", "</s>", "<unk>", "the", "of", "new york", "\u2028")
    assert [dictionary.get_id(name) for name in names] == list(range(8))
    assert [dictionary.get_symbol(item) for item in range(8)] == list(names)
    assert dictionary.get_id("missing") == 3
    assert dictionary.add_symbol("the", 2) == 4 and dictionary.counts[4] == 9
    assert dictionary.add_symbol("<legal>", 0) == 8
    with pytest.raises(IndexError):
        dictionary.get_symbol(9)


def test_dictionary_overwrite(tmp_path):
    path = tmp_path / "dict.txt"
    text = "a 3\n<s> 2 #fairseq:overwrite\na 1 #fairseq:overwrite\nb 0\n"
    path.write_text(text)
    dictionary = Dictionary.load(path)
    assert (dictionary.get_id("<s>"), dictionary.get_id("a"), dictionary.get_id("b")) == (5, 6, 7)
    assert dictionary.get_symbol(0) == "<s>" and dictionary.get_symbol(4) == "a"
    dictionary.save(tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_text() == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a 1\nb\n", "line 2: 'b' is not"),
        (b"a 1\nb x\n", "line 2: 'b x' is not"),
        (b"a 1\n\nb 1\n", "line 2: '' is not"),
        (b" 1\n", "line 1: ' 1' is not"),
        (b"a " + b"9" * 5000, "line 1"),
        (b"a 1\nb 1\na 2\n", "line 3: 'a' has id 4 already"),
        (b"<pad> 1\n", "line 1: '<pad>' has id 1 already"),
        (b"a 1\n\xff 1\n", "line 2: not UTF-8 at byte 0"),
    ],
)
def test_malformed_dictionaries_name_the_line(tmp_path, content, message):
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path)) + ", " + message):
        Dictionary.load(path)


def test_symbols_that_do_not_fit_a_line_are_refused():
    for symbol in ("", "a\nb", "\r"):
        with pytest.raises(ValueError):
            Dictionary().add_symbol(symbol)
