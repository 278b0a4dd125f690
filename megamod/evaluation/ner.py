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
class EntityCounts:
    """Numbers of entities: correct, predicted, and in the gold labels."""

    correct: int = 0
    predicted: int = 0
    gold: int = 0

    def compute_scores(self) -> dict[str, float]:
        """Compute "precision", "recall" and "f1".

        Precision is 0 without predicted entities, recall without gold ones, F1 without any entity.
        """
        precision = self.correct / self.predicted if self.predicted else 0.0
        recall = self.correct / self.gold if self.gold else 0.0
        total = self.predicted + self.gold
        f1 = 2 * self.correct / total if total else 0.0
        return {"precision": precision, "recall": recall, "f1": f1}


def iterate_entities(
    labels: Sequence[str], plain_tags: bool = False
) -> Iterator[tuple[str, int, int]]:
    """Yield the entities of a sentence as (type, index of the first word, index of the last word).

    An entity begins at B-, and at an I- that continues none of its type, so that any sequence of
    labels can be read. Labels that are neither O nor of this form end an entity.

    Args:
        labels: labels of the words, in any scheme of `data.tasks.iob`.
        plain_tags: the labels are plain tags: an entity is a run of one tag other than O.
    """
    kind, start = None, 0
    for position, label in enumerate([*labels, OUTSIDE]):
        if label == OUTSIDE:
            part, type_here = None, None
        else:
            part, type_here = (
                ("I", label) if plain_tags else (parse_entity_label(label) or (None, None))
            )
        if kind is not None and (part is None or part not in CONTINUE or type_here != kind):
            yield kind, start, position - 1
            kind = None
        if part is not None and kind is None:
            kind, start = type_here, position
        if part is not None and part in LAST:
            yield kind, start, position
            kind = None


def count_entities(
    gold: Labels, answers: Labels, plain_tags: bool = False
) -> dict[str, EntityCounts]:
    """Count entities by type, sorted by name.

    Args:
        gold, answers: labels of the words of each sentence.
        plain_tags: see `iterate_entities`.
    Raises:
        ValueError: if a sentence has another number of answers than labels.
    """
    counts: dict[str, EntityCounts] = {}
    for gold_row, answered_row in zip(gold, answers, strict=True):
        if len(gold_row) != len(answered_row):
            raise ValueError(f"{len(answered_row)} answers for {len(gold_row)} words")
        expected = set(iterate_entities(gold_row, plain_tags))
        for kind, *_ in expected:
            counts.setdefault(kind, EntityCounts()).gold += 1
        for entity in set(iterate_entities(answered_row, plain_tags)):
            count = counts.setdefault(entity[0], EntityCounts())
            count.predicted += 1
            count.correct += entity in expected
    return dict(sorted(counts.items()))


def score_words(task: TaskSpec, gold: Labels, answers: Labels) -> dict[str, float]:
    """Compute the task's metrics over all entities ("f1", ...), and "accuracy" over all words.

    If the task's labels are plain tags, a run of one tag other than O is an entity.

    Args:
        task: the task, whose `metrics` are computed.
        gold, answers: labels of the words of each sentence.
    Raises:
        ValueError: if a sentence has another number of answers than labels.
    """
    pairs = [
        pair
        for gold_row, answered_row in zip(gold, answers, strict=True)
        for pair in zip(gold_row, answered_row, strict=True)
    ]
    scores = {"accuracy": sum(a == b for a, b in pairs) / max(1, len(pairs))}
    by_type = count_entities(gold, answers, has_plain_tags(task)).values()
    total = EntityCounts(
        sum(count.correct for count in by_type),
        sum(count.predicted for count in by_type),
        sum(count.gold for count in by_type),
    )
    scores |= total.compute_scores()
    scores["macro_f1"] = sum(count.compute_scores()["f1"] for count in by_type) / max(
        1, len(by_type)
    )
    return {name: scores[name] for name in (*task.metrics, "accuracy")}


def has_plain_tags(task: TaskSpec) -> bool:
    """Return True if a task's labels are plain tags, such as parts of speech, and no entity labels.

    Entities are runs of one tag then, see `iterate_entities`.
    """
    return bool(task.labels) and not are_entity_labels(task.labels)


def compute_word_accuracy_by_instance(gold: Labels, answers: Labels, instances: int) -> list[float]:
    """Compute the word accuracy of each of the N instances of a multiplexed model.

    Sentence r is instance r % N; with fewer sentences than N, only as many numbers as sentences.

    Args:
        gold, answers: labels of the words of each sentence.
        instances: N.
    """
    accuracies = []
    for instance in range(min(instances, len(gold))):
        pairs = [
            (a, b)
            for gold_row, answered_row in zip(
                gold[instance::instances], answers[instance::instances], strict=True
            )
            for a, b in zip(gold_row, answered_row, strict=True)
        ]
        accuracies.append(sum(a == b for a, b in pairs) / max(1, len(pairs)))
    return accuracies


def format_conll(words: Labels, answers: Labels, gold: Labels | None) -> str:
    """Format a line per word, in tab-separated columns, as `conlleval -d` reads them.

    The columns are word, gold label if `gold` is there, and answer; an empty line separates
    sentences.

    Args:
        words: words of each sentence.
        answers: predicted label of each word.
        gold: gold label of each word; None: unknown.
    """
    columns = [words, answers] if gold is None else [words, gold, answers]
    sentences = zip(*columns, strict=True)
    return "\n".join(
        "".join("\t".join(row) + "\n" for row in zip(*sentence, strict=True))
        for sentence in sentences
    )
