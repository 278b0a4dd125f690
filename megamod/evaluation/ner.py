"""Scores of labels per word: entities as the CoNLL evaluation counts them, and accuracy.

Source: Tjong Kim Sang and De Meulder 2003 (CoNLL-2003), section 2.4: an entity is right if its
type, its first and its last word are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamod.data.tasks.specs import TaskSpec

Labels = Sequence[Sequence[str]]


@dataclass
class Counts:
    """Entities that are right, found, and there."""

    right: int = 0
    found: int = 0
    there: int = 0

    def scores(self) -> dict[str, float]:
        """Precision, recall and F1; 0 where nothing was found or is there."""
        precision = self.right / self.found if self.found else 0.0
        recall = self.right / self.there if self.there else 0.0
        total = self.found + self.there
        f1 = 2 * self.right / total if total else 0.0
        return {"precision": precision, "recall": recall, "f1": f1}


def entities(labels: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Type, first word and last word of each entity of a sentence in IOB1 or IOB2.

    An entity begins at B-, and at an I- that continues none of its type; so every sequence of
    labels that a model may answer has a reading.
    """
    kind, start = None, 0
    for place, label in enumerate([*labels, "O"]):
        part, _, here = label.partition("-")
        if kind is not None and (part != "I" or here != kind):
            yield kind, start, place - 1
            kind = None
        if part in ("B", "I") and kind is None:
            kind, start = here, place


def entity_counts(gold: Labels, answers: Labels) -> dict[str, Counts]:
    """Counts by type, sorted by name."""
    counts: dict[str, Counts] = {}
    for there, found in zip(gold, answers, strict=True):
        if len(there) != len(found):
            raise ValueError(f"{len(found)} answers for {len(there)} words")
        want, have = set(entities(there)), set(entities(found))
        for kind, *_ in want:
            counts.setdefault(kind, Counts()).there += 1
        for one in have:
            count = counts.setdefault(one[0], Counts())
            count.found += 1
            count.right += one in want
    return dict(sorted(counts.items()))


def score_words(task: TaskSpec, gold: Labels, answers: Labels) -> dict[str, float]:
    """The task's metrics: over all entities ("f1", ...), and accuracy over all words."""
    pairs = [
        pair
        for there, found in zip(gold, answers, strict=True)
        for pair in zip(there, found, strict=True)
    ]
    scores = {"accuracy": sum(a == b for a, b in pairs) / max(1, len(pairs))}
    if set(task.metrics) & {"f1", "precision", "recall"}:
        by_type = entity_counts(gold, answers).values()
        total = Counts(
            sum(c.right for c in by_type),
            sum(c.found for c in by_type),
            sum(c.there for c in by_type),
        )
        scores |= total.scores()
    if "macro_f1" in task.metrics:
        kinds = [count.scores()["f1"] for count in entity_counts(gold, answers).values()]
        scores["macro_f1"] = sum(kinds) / max(1, len(kinds))
    return {name: scores[name] for name in (*task.metrics, "accuracy")}


def word_accuracy_by_slot(gold: Labels, answers: Labels, instances: int) -> list[float]:
    """Accuracy of words of each instance: sentence r is instance r % N."""
    slots = []
    for slot in range(min(instances, len(gold))):
        pairs = [
            (a, b)
            for there, found in zip(gold[slot::instances], answers[slot::instances], strict=True)
            for a, b in zip(there, found, strict=True)
        ]
        slots.append(sum(a == b for a, b in pairs) / max(1, len(pairs)))
    return slots


def conll_text(words: Labels, answers: Labels, gold: Labels | None) -> str:
    """Columns apart by tabs: words, labels if known, and answers; `conlleval -d` reads this."""
    columns = [words, answers] if gold is None else [words, gold, answers]
    sentences = zip(*columns, strict=True)
    return "\n".join(
        "".join("\t".join(row) + "\n" for row in zip(*sentence, strict=True))
        for sentence in sentences
    )
