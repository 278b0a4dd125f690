"""Scores of labels per word: entities as the CoNLL evaluation counts them, and accuracy.

Source: Tjong Kim Sang and De Meulder 2003 (CoNLL-2003), section 2.4: an entity is correct if its
type, its first and its last word are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamod.data.tasks.iob import CONTINUE, LAST, OUTSIDE, are_entity_labels, parse_entity_label
from megamod.data.tasks.specs import TaskSpec

Labels = Sequence[Sequence[str]]


@dataclass
class Counts:
    """Numbers of entities: correct ones, predicted ones, and those of the gold labels."""

    correct: int = 0
    predicted: int = 0
    gold: int = 0

    def scores(self) -> dict[str, float]:
        """Precision, recall and F1; 0 without predicted or gold entities."""
        precision = self.correct / self.predicted if self.predicted else 0.0
        recall = self.correct / self.gold if self.gold else 0.0
        total = self.predicted + self.gold
        f1 = 2 * self.correct / total if total else 0.0
        return {"precision": precision, "recall": recall, "f1": f1}


def entities(labels: Sequence[str], runs: bool = False) -> Iterator[tuple[str, int, int]]:
    """Type, first word and last word of each entity of a sentence in any scheme of `data.iob`.

    An entity begins at B-, and at an I- that continues none of its type, so that any sequence of
    labels can be read.

    Args:
        runs: the labels are plain tags: an entity is a run of one tag other than O.
    """
    kind, start = None, 0
    for position, label in enumerate([*labels, OUTSIDE]):
        if label == OUTSIDE:
            part, here = None, None
        else:
            part, here = ("I", label) if runs else (parse_entity_label(label) or (None, None))
        if kind is not None and (part is None or part not in CONTINUE or here != kind):
            yield kind, start, position - 1
            kind = None
        if part is not None and kind is None:
            kind, start = here, position
        if part is not None and part in LAST:
            yield kind, start, position
            kind = None


def entity_counts(gold: Labels, answers: Labels, runs: bool = False) -> dict[str, Counts]:
    """Counts by type, sorted by name; `runs` as in `entities`."""
    counts: dict[str, Counts] = {}
    for gold_row, answered_row in zip(gold, answers, strict=True):
        if len(gold_row) != len(answered_row):
            raise ValueError(f"{len(answered_row)} answers for {len(gold_row)} words")
        expected = set(entities(gold_row, runs))
        for kind, *_ in expected:
            counts.setdefault(kind, Counts()).gold += 1
        for entity in set(entities(answered_row, runs)):
            count = counts.setdefault(entity[0], Counts())
            count.predicted += 1
            count.correct += entity in expected
    return dict(sorted(counts.items()))


def score_words(task: TaskSpec, gold: Labels, answers: Labels) -> dict[str, float]:
    """The task's metrics: over all entities ("f1", ...), and accuracy over all words.

    Without labels of entities a run of one tag other than O is an entity.
    """
    pairs = [
        pair
        for gold_row, answered_row in zip(gold, answers, strict=True)
        for pair in zip(gold_row, answered_row, strict=True)
    ]
    scores = {"accuracy": sum(a == b for a, b in pairs) / max(1, len(pairs))}
    by_type = entity_counts(gold, answers, has_runs(task)).values()
    total = Counts(
        sum(count.correct for count in by_type),
        sum(count.predicted for count in by_type),
        sum(count.gold for count in by_type),
    )
    scores |= total.scores()
    scores["macro_f1"] = sum(count.scores()["f1"] for count in by_type) / max(1, len(by_type))
    return {name: scores[name] for name in (*task.metrics, "accuracy")}


def has_runs(task: TaskSpec) -> bool:
    """True if the labels are plain tags, so that entities are runs of one tag."""
    return bool(task.labels) and not are_entity_labels(task.labels)


def word_accuracy_by_slot(gold: Labels, answers: Labels, instances: int) -> list[float]:
    """Accuracy of words of each instance: sentence r is instance r % N."""
    slots = []
    for slot in range(min(instances, len(gold))):
        pairs = [
            (a, b)
            for gold_row, answered_row in zip(
                gold[slot::instances], answers[slot::instances], strict=True
            )
            for a, b in zip(gold_row, answered_row, strict=True)
        ]
        slots.append(sum(a == b for a, b in pairs) / max(1, len(pairs)))
    return slots


def conll_text(words: Labels, answers: Labels, gold: Labels | None) -> str:
    """Words, labels if known, and answers in columns separated by tabs, as for `conlleval -d`."""
    columns = [words, answers] if gold is None else [words, gold, answers]
    sentences = zip(*columns, strict=True)
    return "\n".join(
        "".join("\t".join(row) + "\n" for row in zip(*sentence, strict=True))
        for sentence in sentences
    )
