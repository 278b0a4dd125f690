"""Labelled texts as batches: special tokens, cuts, labels of tokens, order, groups, fillers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast

from megamod.data.batches import BatchDivision
from megamod.data.tasks.classification import (
    RowLengthLimits,
    TrainRows,
    encode_texts,
    encode_words,
    iterate_held_out_rows,
)
from megamod.data.tasks.text_labels import TextSet
from megamod.data.tasks.token_set import TokenSet
from megamod.errors import UserError

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "##a", "##b", "##c"]
LONG = RowLengthLimits(64, 64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> BertTokenizerFast:
    path = Path(tmp_path_factory.mktemp("vocab")) / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n")
    return BertTokenizerFast.from_pretrained(path.parent)


def pairs(first: list[str], second: list[str]) -> TextSet:
    labels = np.arange(len(first)) % 2
    return TextSet((first, second), labels, [f"file, line {n + 1}" for n in range(len(first))])


def spelled(ids: np.ndarray) -> str:
    return " ".join(VOCAB[item] for item in ids)


def test_pairs_carry_special_tokens_segments_and_labels(tokenizer):
    encoded = encode_texts(pairs(["a ab", "c"], ["b", "d d d d d"]), tokenizer, LONG)
    batch = encoded.gather_batch(np.array([0, 1]), None)
    assert spelled(batch["input_ids"][0]) == "[CLS] a a ##b [SEP] b [SEP] [PAD]" + " [PAD]" * 8
    assert batch["token_type_ids"][0].tolist() == [0] * 5 + [1] * 2 + [0] * 9
    assert batch["attention_mask"].sum(1).tolist() == [7, 9]
    assert batch["labels"].tolist() == [0, 1] and batch["items"] == 2
    assert encoded.gather_batch(np.array([0]), 12)["input_ids"].shape == (1, 12)
    assert batch["input_ids"].dtype == torch.int64


def test_the_longer_text_of_a_pair_is_cut(tokenizer):
    encoded = encode_texts(pairs(["a b"], ["c c c c c c"]), tokenizer, RowLengthLimits(8, 64))
    assert spelled(encoded.ids) == "[CLS] a b [SEP] c c c [SEP]" and encoded.cut == 1


def test_rows_beyond_the_model_are_refused_unless_cuts_were_asked_for(tokenizer):
    texts = pairs(["a", "a b"], ["b", "c c c c c c"])
    with pytest.raises(
        UserError, match="file, line 2: 11 tokens, the model has 10 positions; --tr"
    ):
        encode_texts(texts, tokenizer, RowLengthLimits(8, 10))
    assert (
        encode_texts(texts, tokenizer, RowLengthLimits(8, 10, truncate=True)).offsets[-1] == 5 + 8
    )
    words = TokenSet([["a"] * 9], [["O"] * 9], [[4] * 9], "file")
    with pytest.raises(UserError, match="file, line 4: 11 tokens, the model has 10 positions"):
        encode_words(words, tokenizer, RowLengthLimits(10, 10), ["O"])


@pytest.mark.parametrize("label_all", [False, True])
def test_the_first_token_of_a_word_carries_its_label(tokenizer, label_all):
    labels = ["O", "B-X", "I-X"]
    words = [["abc", "\ufe0f", "ca", "d"], ["a"]]
    result = TokenSet(words, [["B-X", "I-X", "O", "O"], ["O"]], [[1, 2, 3, 4], [6]], "file")
    encoded = encode_words(result, tokenizer, LONG, labels, label_all=label_all)
    assert spelled(encoded.ids[:9]) == "[CLS] a ##b ##c [UNK] c ##a d [SEP]"
    rest, other = (2, 0) if label_all else (-100, -100)
    assert encoded.labels[:9].tolist() == [-100, 1, rest, rest, 2, 0, other, 0, -100]
    assert [heads.tolist() for heads in encoded.word_starts] == [[1, 4, 5, 7], [1]]
    batch = encoded.gather_batch(np.array([1, 0]), None)
    assert batch["items"] == int((batch["labels"] != -100).sum()) == (8 if label_all else 5)


def test_words_behind_a_cut_have_no_token(tokenizer):
    result = TokenSet([["a", "abc", "d"]], [["O", "B-X", "O"]], [[1, 2, 3]], "file")
    encoded = encode_words(result, tokenizer, RowLengthLimits(5, 64), ["O", "B-X"], label_all=True)
    assert spelled(encoded.ids) == "[CLS] a a ##b [SEP]"
    assert encoded.word_starts[0].tolist() == [1, 2, -1]
    assert encoded.labels.tolist() == [-100, 0, 1, 1, -100]


def rows_of_step(encoded, ranks: int, micro: int, step: int, **more) -> np.ndarray:
    result = []
    for rank in range(ranks):
        batches = TrainRows(
            encoded, BatchDivision(micro, 8, rank, ranks), seed=3, instances=2, pad_to=None, **more
        )
        steps = batches.micro_steps
        result += [
            batches.select_rows(number) for number in range(step * steps, (step + 1) * steps)
        ]
    return np.concatenate(result)


def test_steps_are_the_same_on_any_ranks_and_epochs_are_permutations(tokenizer):
    encoded = encode_texts(pairs(["a"] * 10, ["b"] * 10), tokenizer, LONG)
    steps = [rows_of_step(encoded, 1, 8, step) for step in range(5)]
    for ranks, micro in ((2, 4), (2, 2), (4, 2), (1, 2)):
        for step, rows in enumerate(steps):
            assert (rows_of_step(encoded, ranks, micro, step) == rows).all()
    stream = np.concatenate(steps).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in stream.tolist())
    assert len({tuple(epoch) for epoch in stream.tolist()}) == 4


def test_groups_must_be_full(tokenizer):
    encoded = encode_texts(pairs(["a"] * 10, ["b"] * 10), tokenizer, LONG)
    with pytest.raises(UserError, match=r"train_batch_size 1: not a multiple of the 2 .*is 2"):
        rows_of_step(encoded, 1, 1, 0)
    with pytest.raises(UserError, match=r"--per_device_eval_batch_size 1: .* the nearest is 2"):
        list(iterate_held_out_rows(encoded, 1, 2, None))


@pytest.mark.parametrize("instances", [1, 2, 3])
def test_held_out_rows_come_once_in_order_with_fillers_behind(tokenizer, instances):
    words = [VOCAB[4 + n] for n in (0, 1, 2, 3, 0, 1, 2)]
    encoded = encode_texts(pairs(words, words), tokenizer, LONG)
    batches = list(iterate_held_out_rows(encoded, 2 * instances, instances, None))
    assert [b.start for b in batches] == list(range(0, 7, 2 * instances))
    assert sum(b.stop - b.start for b in batches) == 7
    for held in batches:
        rows = held.batch["input_ids"]
        assert len(rows) % instances == 0
        for position, row in enumerate(rows):
            source = held.start + position % (held.stop - held.start)
            assert spelled(row).split()[1] == words[source]
