"""Entities and their scores against the rules of the CoNLL evaluation, written out again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamod.data.tasks.specs import make_token_task
from megamod.evaluation.ner import (
    compute_word_accuracy_by_instance,
    count_entities,
    format_conll,
    iterate_entities,
    score_words,
)

LABELS = ["O", "B-A", "I-A", "B-B", "I-B", "B-two-parts", "I-two-parts"]
SENTENCE = st.lists(st.tuples(*[st.sampled_from(LABELS)] * 2), min_size=1, max_size=9)
NER = make_token_task("ner")


def chunks(labels: list[str]) -> set[tuple[str, int, int]]:
    """conlleval: each word ends a chunk, starts one, or neither, seen from the word before."""
    result, begin = set(), 0
    parts = [("O", "")] + [(label[0], label[2:]) for label in labels] + [("O", "")]
    for n in range(1, len(parts)):
        (before, kind_before), (here, kind) = parts[n - 1], parts[n]
        if before != "O" and (here in "BO" or kind != kind_before):
            result.add((kind_before, begin, n - 2))
        if here == "B" or (here == "I" and (before == "O" or kind != kind_before)):
            begin = n - 1
    return result


@given(st.lists(SENTENCE, min_size=1, max_size=5))
def test_entities_and_scores_are_those_of_conlleval(sentences):
    gold = [[pair[0] for pair in sentence] for sentence in sentences]
    answers = [[pair[1] for pair in sentence] for sentence in sentences]
    want = {(n, *item) for n, row in enumerate(gold) for item in chunks(row)}
    have = {(n, *item) for n, row in enumerate(answers) for item in chunks(row)}
    assert {(n, *item) for n, row in enumerate(answers) for item in iterate_entities(row)} == have
    precision = len(want & have) / len(have) if have else 0.0
    recall = len(want & have) / len(want) if want else 0.0
    scores = score_words(NER, gold, answers)
    assert scores["precision"] == pytest.approx(precision)
    assert scores["recall"] == pytest.approx(recall)
    total = precision + recall
    assert scores["f1"] == pytest.approx(2 * precision * recall / total if total else 0.0)
    words = [pair for sentence in sentences for pair in sentence]
    assert scores["accuracy"] == pytest.approx(sum(a == b for a, b in words) / len(words))


@given(st.lists(SENTENCE, min_size=1, max_size=4))
def test_equal_to_seqeval(sentences):
    seqeval = pytest.importorskip("seqeval.metrics")
    gold = [[pair[0] for pair in sentence] for sentence in sentences]
    answers = [[pair[1] for pair in sentence] for sentence in sentences]
    theirs = seqeval.f1_score(gold, answers, zero_division=0)
    assert score_words(NER, gold, answers)["f1"] == pytest.approx(theirs)


def test_counts_by_type():
    gold = [["B-A", "I-A", "O", "B-B"], ["B-B"]]
    answers = [["B-A", "O", "B-A", "B-B"], ["I-B"]]
    counts = count_entities(gold, answers)
    assert [(k, c.correct, c.predicted, c.gold) for k, c in counts.items()] == [
        ("A", 0, 2, 1),
        ("B", 2, 2, 2),
    ]
    assert counts["B"].compute_scores() == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    with pytest.raises(ValueError, match="1 answers for 2 words"):
        count_entities([["O", "O"]], [["O"]])


def test_plain_tags_have_accuracy_alone():
    scores = score_words(make_token_task("pos"), [["DET", "NOUN"]], [["DET", "VERB"]])
    assert scores == {"accuracy": 0.5}


def test_slots_are_sentences_modulo_n():
    gold, answers = [["a", "a"], ["a"], ["b"]], [["a", "b"], ["b"], ["b"]]
    assert compute_word_accuracy_by_instance(gold, answers, 2) == [pytest.approx(2 / 3), 0.0]


def test_predictions_as_columns():
    text = format_conll([["x", "y"], ["z"]], [["O", "B-A"], ["O"]], [["O", "O"], ["O"]])
    assert text == "x\tO\tO\ny\tO\tB-A\n\nz\tO\tO\n"
    assert format_conll([["x"]], [["O"]], None) == "x\tO\n"
