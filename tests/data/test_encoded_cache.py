"""Kept token ids: the same rows again, and never those of other settings."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import BertTokenizerFast

from megamod.data.tasks.classification import RowLengthLimits, encode_texts, encode_words
from megamod.data.tasks.encoded_cache import compute_cache_key, encode_with_cache
from megamod.data.tasks.text_labels import TextSet
from megamod.data.tasks.token_set import TokenSet

LENGTHS = RowLengthLimits(8, 16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Word pieces of a few words."""
    file = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef", "##x"]))
    return BertTokenizerFast(str(file))


TEXTS = TextSet((["a b", "c", "f e d c b a f e d"],), np.array([0, 1, 1]), ["f, line 1"] * 3)
WORDS = TokenSet([["a", "bx"], ["c"]], [["O", "B-X"], ["O"]], [[1, 2], [4]], "f")


def never():
    raise AssertionError("it was there already")


def same(first, other) -> bool:
    if (first.word_starts is None) != (other.word_starts is None):
        return False
    pairs = [
        (getattr(first, n), getattr(other, n)) for n in ("ids", "segments", "offsets", "labels")
    ]
    pairs += list(zip(first.word_starts or [], other.word_starts or [], strict=True))
    numbers = all(getattr(first, n) == getattr(other, n) for n in ("pad_id", "cut", "longest"))
    return numbers and all(
        (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and np.array_equal(a, b)))
        for a, b in pairs
    )


def test_the_same_rows_come_back(tmp_path, tokenizer):
    for rows, labels, make in (
        (TEXTS, (), lambda: encode_texts(TEXTS, tokenizer, LENGTHS)),
        (
            replace(TEXTS, labels=None),
            (),
            lambda: encode_texts(replace(TEXTS, labels=None), tokenizer, LENGTHS),
        ),
        (
            WORDS,
            ("O", "B-X", "I-X"),
            lambda: encode_words(WORDS, tokenizer, LENGTHS, ("O", "B-X", "I-X")),
        ),
    ):
        key = compute_cache_key(rows, tokenizer, LENGTHS, labels, False)
        built = encode_with_cache(tmp_path / "kept", key, make)
        assert same(encode_with_cache(tmp_path / "kept", key, never), built)
        assert same(make(), built)
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_whatever_matters_changes_the_name(tokenizer, tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]))
    other_text = TextSet((["a b", "c", "f"],), TEXTS.labels, TEXTS.origins)
    keys = [
        compute_cache_key(rows, pieces, lengths, labels, label_all)
        for rows, pieces, lengths, labels, label_all in (
            (TEXTS, tokenizer, LENGTHS, ("0", "1"), False),
            (other_text, tokenizer, LENGTHS, ("0", "1"), False),
            (replace(TEXTS, labels=np.array([1, 1, 1])), tokenizer, LENGTHS, ("0", "1"), False),
            (replace(TEXTS, labels=None), tokenizer, LENGTHS, ("0", "1"), False),
            (TEXTS, BertTokenizerFast(str(file)), LENGTHS, ("0", "1"), False),
            (TEXTS, tokenizer, RowLengthLimits(7, 16), ("0", "1"), False),
            (TEXTS, tokenizer, LENGTHS, ("1", "0"), False),
            (WORDS, tokenizer, LENGTHS, ("0", "1"), False),
            (WORDS, tokenizer, LENGTHS, ("0", "1"), True),
        )
    ]
    assert len(set(keys)) == len(keys)
    again = TextSet(TEXTS.texts, TEXTS.labels.copy(), ["g, line 9"] * 3)
    assert compute_cache_key(again, tokenizer, LENGTHS, ("0", "1"), False) == keys[0]


def test_a_broken_file_is_written_again(tmp_path, tokenizer, caplog):
    (tmp_path / "key.safetensors").write_bytes(b"half")
    built = encode_with_cache(tmp_path, "key", lambda: encode_texts(TEXTS, tokenizer, LENGTHS))
    assert "written again" in caplog.text and len(built) == 3
    assert same(encode_with_cache(tmp_path, "key", never), built)
