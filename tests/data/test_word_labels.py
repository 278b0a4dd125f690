"""CoNLL files: columns, IOB schemes and their repair, label sets, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamod.data.tasks.conll import read_conll
from megamod.data.tasks.iob import convert_to_iob2
from megamod.data.tasks.specs import make_token_task
from megamod.data.tasks.token_set import TokenSet
from megamod.data.tasks.word_labels import read_token_task
from megamod.errors import UserError

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def tokens(*rows: str) -> TokenSet:
    labels = [row.split() for row in rows]
    starts = [1 + sum(len(row) + 1 for row in labels[:n]) for n in range(len(labels))]
    lines = [list(range(at, at + len(row))) for at, row in zip(starts, labels, strict=True)]
    return TokenSet([["w"] * len(row) for row in labels], labels, lines, "file")


def as_iob1(labels: list[str]) -> list[str]:
    """IOB2 to IOB1: B- only where an entity touches one of its type."""
    before = ["O", *labels]
    return [
        "I" + label[1:] if label[0] == "B" and before[n][2:] != label[2:] else label
        for n, label in enumerate(labels)
    ]


def test_without_a_train_split_the_labels_are_unknown(tmp_path):
    (tmp_path / "dev.txt").write_text("a B-X\nb O\n")
    with pytest.raises(UserError, match="the splits read, dev, have no train split with labels"):
        read_token_task(make_token_task("entities"), tmp_path, ["dev"])


PARTS = st.lists(
    st.tuples(st.sampled_from(["O", "A", "B"]), st.integers(1, 3)), min_size=1, max_size=8
)


@given(st.lists(PARTS, min_size=1, max_size=4))
def test_iob1_is_read_as_the_iob2_it_came_from(sentences):
    rows = [
        [label for kind, n in parts for label in
         (["O"] * n if kind == "O" else [f"B-{kind}"] + [f"I-{kind}"] * (n - 1))]
        for parts in sentences
    ]  # fmt: skip
    result = tokens(*(" ".join(as_iob1(row)) for row in rows))
    scheme = convert_to_iob2(result, repair=False)
    assert result.labels == rows
    assert scheme == ("iob2" if all(as_iob1(row) == row for row in rows) else "iob1")


def test_a_broken_transition_is_refused_or_repaired():
    rows = ("O B-PER I-PER O", "B-LOC I-PER O I-LOC")
    with pytest.raises(UserError, match="file, line 7: I-PER follows B-LOC: neither IOB1 nor IOB2"):
        convert_to_iob2(tokens(*rows), repair=False)
    result = tokens(*rows)
    assert convert_to_iob2(result, repair=True) == "broken"
    assert result.labels[1] == ["B-LOC", "B-PER", "O", "B-LOC"]


def test_a_label_of_no_scheme():
    with pytest.raises(UserError, match="line 2: label 'X-PER' is none of O, B-TYPE, I-TYPE"):
        convert_to_iob2(tokens("O X-PER"), repair=True)


TEXT = """-DOCSTART- -X- -X- O

EU NNP I-NP I-ORG
rejects VBZ I-VP O

# text = comment
German JJ I-NP I-MISC


"""


def test_columns_blank_lines_document_starts_and_comments(tmp_path):
    (tmp_path / "train.txt").write_text(TEXT)
    result = read_conll(tmp_path / "train.txt", 0, -1)
    assert result.words == [["EU", "rejects"], ["German"]]
    assert result.labels == [["I-ORG", "O"], ["I-MISC"]]
    assert result.lines == [[3, 4], [7]]
    assert read_conll(tmp_path / "train.txt", 0, 1).labels == [["NNP", "VBZ"], ["JJ"]]
    task, sets = read_token_task(make_token_task("any"), tmp_path, ["train"])
    assert sets["train"].labels == [["B-ORG", "O"], ["B-MISC"]]
    assert task.labels == ("O", "B-MISC", "I-MISC", "B-ORG", "I-ORG")
    assert task.metrics[0] == "f1"


def test_plain_tags_are_scored_by_accuracy(tmp_path):
    (tmp_path / "train.txt").write_text("the\tDET\tDT\ncat\tNOUN\tNN\n")
    (tmp_path / "test.txt").write_text("a\na\n\nb\n")
    task, sets = read_token_task(make_token_task("pos"), tmp_path, ["train", "test"])
    assert task.labels == ("DET", "NOUN") and task.metrics == ("accuracy",)
    assert sets["test"].labels is None and sets["test"].words == [["a", "a"], ["b"]]
    task, _ = read_token_task(make_token_task("any"), tmp_path, ["train"])
    assert task.labels == ("DT", "NN") and task.metrics == ("accuracy",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no sentence in it"),
        (b"\n\n", "no sentence in it"),
        (b"a\tO\nb\n", "line 2: 1 columns, most lines have 2"),
        (b"a\tO\nb\tO\tO\n", "line 2: 3 columns"),
        (b"a\n", "line 1: 1 columns, so word and label would be the same"),
        (b"a\tO\n\xff\tO\n", "line 2: invalid UTF-8"),
        (b"a\tO\n\tO\n", "line 2: no word in column 0"),
        (b"a\tB-X\nb\tO\nc\tI-X\n", "line 3: I-X follows O"),
        (b"a\tB-X\nb\tDET\n", "line 2: label 'DET' is none of"),
    ],
)
def test_files_that_are_refused_with_file_and_line(tmp_path, content, message):
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"train.txt.*{message}"):
        read_token_task(make_token_task("any"), tmp_path, ["train"])


def test_labels_that_train_does_not_have(tmp_path):
    (tmp_path / "train.txt").write_text("a\tB-X\n")
    (tmp_path / "dev.txt").write_text("a\tB-X\nb\tI-X\n\nc\tB-Y\n")
    with pytest.raises(UserError, match=r"dev.txt, line 4: label 'B-Y' is not one of O, B-X, I-X"):
        read_token_task(make_token_task("any"), tmp_path, ["train", "dev"])
    labels = ("B-Y", "B-X", "I-X", "O")  # of a trained model
    task, _ = read_token_task(make_token_task("any"), tmp_path, ["dev"], labels=labels)
    assert task.labels == labels


@pytest.mark.skipif(not REAL.exists(), reason="the real files are not beside this repository")
def test_real_files_have_the_known_numbers():
    for name, folder, counts in (
        ("wnut17", "ner", [(3394, 62730), (1009, 15733), (1287, 23394)]),
        ("ud_ewt", "pos", [(12544, 204577), (2001, 25147), (2077, 25094)]),
    ):
        task, sets = read_token_task(make_token_task(name), REAL / folder, ["train", "dev", "test"])
        assert [(len(s), sum(map(len, s.words))) for s in sets.values()] == counts
        assert len(task.labels) == {"wnut17": 13, "ud_ewt": 17}[name]
