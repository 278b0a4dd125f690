"""Scores of sentence tasks against formulas written out, and the files for the server."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamod.data.tasks.specs import TASKS
from megamod.errors import UserError
from megamod.evaluation.glue import (
    average_task_scores,
    compute_accuracy_by_instance,
    compute_metric,
    compute_task_score,
    format_submission,
    score_sentences,
)

PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30)


@given(PAIRS)
def test_two_labels_by_the_table_of_counts(pairs):
    answers, labels = np.array(pairs).T
    tp, fp, fn, tn = (pairs.count(cell) for cell in ((1, 1), (1, 0), (0, 1), (0, 0)))
    assert compute_metric("accuracy", answers, labels) == pytest.approx((tp + tn) / len(pairs))
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
    assert compute_metric("f1", answers, labels) == pytest.approx(f1)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    matthews = (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0
    assert compute_metric("matthews_correlation", answers, labels) == pytest.approx(
        matthews, abs=1e-12
    )


def test_correlations():
    random = np.random.default_rng(0)
    answers, labels = random.normal(size=40), random.normal(size=40)
    labels[:5] = answers[:5]
    assert compute_metric("pearson", answers, labels) == pytest.approx(
        np.corrcoef(answers, labels)[0, 1]
    )
    ranks = [np.argsort(np.argsort(values)) for values in (answers, labels)]
    assert compute_metric("spearmanr", answers, labels) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert compute_metric("pearson", np.ones(4), np.arange(4.0)) == 0.0  # not defined


def test_macro_f1_and_metrics_that_do_not_fit():
    answers, labels = np.array([0, 1, 2, 2]), np.array([0, 2, 2, 1])
    assert compute_metric("macro_f1", answers, labels) == pytest.approx((1 + 0 + 0.5) / 3)
    with pytest.raises(UserError, match="f1 is for two labels"):
        compute_metric("f1", answers, labels)


def test_loss_and_metrics_of_logits():
    logits, labels = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, -1.0]]), np.array([0, 1, 1])
    scores = score_sentences(TASKS["mrpc"], logits, labels)
    nll = [-math.log(np.exp(r)[y] / np.exp(r).sum()) for r, y in zip(logits, labels, strict=True)]
    assert scores["loss"] == pytest.approx(sum(nll) / 3)
    assert scores["accuracy"] == pytest.approx(2 / 3) and scores["f1"] == pytest.approx(2 / 3)
    scores = score_sentences(
        TASKS["sts-b"], np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 4.0])
    )
    assert scores["loss"] == pytest.approx(1 / 3) and scores["spearmanr"] == pytest.approx(1.0)


def test_slots_are_rows_modulo_n():
    answers, labels = np.array([1, 1, 0, 1, 0]), np.array([1, 0, 0, 0, 1])
    assert compute_accuracy_by_instance(answers, labels, 2) == [pytest.approx(2 / 3), 0.0]


def test_the_score_of_a_task_and_of_glue():
    split = {"accuracy": 0.8, "matthews_correlation": 0.3, "f1": 0.6}
    assert compute_task_score(TASKS["cola"], {"dev": split}) == pytest.approx(0.3)
    assert compute_task_score(TASKS["mrpc"], {"dev": split}) == pytest.approx(0.7)
    both = {"dev": {"accuracy": 0.6}, "dev_mm": {"accuracy": 0.8}, "test": {"accuracy": 0.0}}
    assert compute_task_score(TASKS["mnli"], both) == pytest.approx(0.7)
    assert average_task_scores({"a": 0.5, "b": 0.7}) == pytest.approx(0.6)


def test_files_for_the_server():
    logits = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert (
        format_submission(TASKS["mnli"], logits) == "index\tprediction\n0\tentailment\n1\tneutral\n"
    )
    assert format_submission(TASKS["cola"], logits[:, :2]) == "index\tprediction\n0\t1\n1\t0\n"
    values = np.array([[-1.0], [3.14159], [7.0]])
    text = "index\tprediction\n0\t0.000\n1\t3.142\n2\t5.000\n"
    assert format_submission(TASKS["sts-b"], values) == text
