"""CoNLL files of many corpora: columns, comments, blanks, schemes; random layouts and labels."""

import gzip
import json
import logging
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamod.data.tasks.conll import read_conll
from megamod.data.tasks.specs import make_token_task
from megamod.data.tasks.word_labels import read_token_task
from megamod.errors import UserError
from megamod.evaluation.ner import iterate_entities, score_words


def read(folder, text, name="any", file="train.txt", **columns):
    """Task, words and labels of one train file."""
    (folder / file).write_text(text, encoding="utf-8")
    task, sets = read_token_task(make_token_task(name, **columns), folder, ["train"])
    (folder / file).unlink()
    return task, sets["train"].words, sets["train"].labels


CONLLU = """# newdoc id = d
# sent_id = 1
# text = We don't
1\tWe\twe\tPRON\tPRP\t_\t2\tnsubj\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\tVBP\t_\t0\troot\t_\t_
3\tn't\tnot\tPART\tRB\t_\t2\tadvmod\t_\t_
3.1\tgo\tgo\tVERB\tVB\t_\t_\t_\t_\t_

# sent_id = 2
1\t#\t#\tSYM\tNN\t_\t0\troot\t_\t_
2\t10 000\t10000\tNUM\tCD\t_\t1\tnum\t_\t_
"""


@pytest.mark.parametrize(("name", "file"), [("ud_x", "train.conllu"), ("any", "train.txt")])
def test_conllu_is_known_by_its_columns(tmp_path, name, file):
    task, words, labels = read(tmp_path, CONLLU, name, file)
    assert words == [["We", "do", "n't"], ["#", "10 000"]]
    assert labels == [["PRON", "AUX", "PART"], ["SYM", "NUM"]]
    assert task.metrics == ("accuracy",)
    _, words, labels = read(tmp_path, CONLLU, name, file, word_column=2, label_column=4)
    assert words[0] == ["we", "do", "not"] and labels[1] == ["NN", "CD"]


def test_conllu_plus_names_its_columns(tmp_path):
    text = "# global.columns = ID UPOS FORM\n1\tDET\tthe\n2-3\t_\tof\n2\tNOUN\tcat\n"
    assert read(tmp_path, text)[1:] == ([["the", "cat"]], [["DET", "NOUN"]])


def test_germeval_and_multiconer_have_comments(tmp_path, caplog):
    germeval = "#\thttp://de/0 [2009]\n1\tWe\tO\tO\n2\tAda\tB-PER\tO\n\n"
    germeval += germeval.replace("/0", "/1").replace("Ada", "Bea")
    _, words, labels = read(tmp_path, germeval, word_column=1, label_column=2)
    assert words == [["We", "Ada"], ["We", "Bea"]] and labels == [["O", "B-PER"]] * 2
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, germeval)[1:] == (words, labels)
    assert "column 0 numbers the words, so words are column 1" in caplog.text
    with pytest.raises(UserError, match=r"all its labels are 'O'.*--label_column"):
        read(tmp_path, germeval, label_column=3)
    for comment in ("# id 5239d808\tdomain=en", "# id 5239d808 domain=en"):
        text = f"{comment}\nWe _ _ O\n# _ _ O\nAda _ _ B-PER\n\n{comment}\n# _ _ O\nBea _ _ I-PER\n"
        _, words, labels = read(tmp_path, text.replace("I-", "B-"))
        assert words == [["We", "#", "Ada"], ["#", "Bea"]]
        assert labels == [["O", "O", "B-PER"], ["O", "B-PER"]]
    (tmp_path / "test.txt").write_text("# id 1 domain=en\nWe _ _ _\nAda _ _ _\n")
    hidden = read_conll(tmp_path / "test.txt", None, None, "test")
    assert hidden.labels is None and hidden.words == [["We", "Ada"]]


def test_words_that_begin_with_a_hash_are_words(tmp_path):
    text = "#fun\tB-tag\nis\tO\n\n#\tO\n#sun\tB-tag\n"
    assert read(tmp_path, text)[1] == [["#fun", "is"], ["#", "#sun"]]
    assert read(tmp_path, "#fun HT\na DET\n\n# SYM\nb DET\n# SYM\n")[1][0] == ["#fun", "a"]


def test_only_ascii_blanks_divide(tmp_path):
    text = "de\u00a0Vries NN B-PER \nmet  NN\tO\n"
    assert read(tmp_path, text)[1:] == ([["de\u00a0Vries", "met"]], [["B-PER", "O"]])
    text = "a\tO\n\u3000\tB-X\n\u2028\tI-X \n\u00a0\tO\n\nb\tO\n"
    _, words, labels = read(tmp_path, text)
    assert words == [["a", "\u3000", "\u2028", "\u00a0"], ["b"]]
    assert labels == [["O", "B-X", "I-X", "O"], ["O"]]


def test_plain_tags_with_o_are_scored_by_runs(tmp_path):
    text = "We O\nAda person-actor\nB person-actor\nin O\nBonn location-GPE\n"
    task, _, labels = read(tmp_path, text)
    assert task.labels == ("O", "location-GPE", "person-actor") and task.metrics[0] == "f1"
    assert list(iterate_entities(labels[0], plain_tags=True)) == [
        ("person-actor", 1, 2),
        ("location-GPE", 4, 4),
    ]
    answers = [["O", "person-actor", "O", "O", "location-GPE"]]
    scores = score_words(task, labels, answers)
    assert scores["f1"] == scores["precision"] == scores["recall"] == 0.5
    assert scores["accuracy"] == 0.8


def test_iob1_is_decided_by_the_majority(tmp_path, caplog):
    rows = ["a I-X", "b O", "c I-Y", "d B-Y", "e O", "f B-X", "g O"] + ["h I-X", "i O"] * 3
    with caplog.at_level(logging.WARNING):
        _, _, labels = read(tmp_path, "\n".join(rows) + "\n")
    assert labels == [["B-X", "O", "B-Y", "B-Y", "O", "B-X", "O", *["B-X", "O"] * 3]]
    assert "1 of its 2 B- labels stand where IOB1 has I-" in caplog.text
    with pytest.raises(UserError, match="line 1: I-X follows O: neither IOB1 nor IOB2") as error:
        read(tmp_path, "a I-X\nb O\nc B-X\nd O\ne B-Y\n")
    assert str(error.value).count("\n") < 3


CHUNKS = st.lists(
    st.tuples(st.sampled_from(["", "LOC", "B-odd", "o"]), st.integers(1, 4), st.booleans()),
    min_size=1,
    max_size=7,
)


def labels_of(chunks, begin, inside, last, single):
    """Labels of entities of given types and lengths in a scheme given by its letters."""
    row = []
    for kind, size, outside in chunks:
        parts = [single] if size == 1 else [begin, *[inside] * (size - 2), last]
        row += [f"{part}-{kind}" if kind else part for part in parts] + ["O"] * outside
    return row


@settings(max_examples=60)
@given(st.lists(CHUNKS, min_size=1, max_size=3), st.sampled_from(["BIES", "BILU", "BMES"]))
def test_schemes_with_ends_become_iob2_and_are_scored_alike(tmp_path_factory, rows, letters):
    folder = tmp_path_factory.getbasetemp()
    theirs = [labels_of(row, *letters) for row in rows]
    ours = [labels_of(row, "B", "I", "I", "B") for row in rows]
    text = "\n\n".join("\n".join(f"w {label}" for label in row) for row in theirs) + "\n"
    assert read(folder, text)[2] == ours
    for their_row, our_row in zip(theirs, ours, strict=True):
        assert list(iterate_entities(their_row)) == list(iterate_entities(our_row))


def test_an_inside_after_an_end_is_broken(tmp_path):
    with pytest.raises(UserError, match="line 3: I-X follows E-X"):
        read(tmp_path, "a B-X\nb E-X\nc I-X\n")


CELL = st.text(st.sampled_from("ab#-\u00a0\u3000é_.0"), min_size=1, max_size=4)
TAG = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=5)


@settings(max_examples=150)
@given(st.data())
def test_random_columns_and_labels(tmp_path_factory, data):
    """Whatever stands in the other columns: words and labels are those that were written."""
    width = data.draw(st.integers(2, 6))
    word, label = data.draw(st.permutations(range(width)))[:2]
    tags = data.draw(st.lists(TAG, min_size=2, max_size=4, unique=True))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    separator = data.draw(st.sampled_from(["\t", " ", "  "]))
    words, labels, lines = [], [], []
    for number, size in enumerate(sizes):
        if data.draw(st.booleans()):
            lines.append(f"# sent_id = {number}")
        rows = [data.draw(st.lists(CELL, min_size=width, max_size=width)) for _ in range(size)]
        for row in rows:
            row[0] = row[0].lstrip("#") or "a"
            row[word] = row[word].lstrip("#") or "b"
            row[label] = data.draw(st.sampled_from(tags)) if label else "x"
            if label:
                row[label] = row[label].lstrip("#") or "x"
            lines.append(separator.join(row))
        words.append([row[word] for row in rows])
        labels.append([row[label] for row in rows])
        lines.append("")
    path = tmp_path_factory.getbasetemp() / "random.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    result = read_conll(path, word, label - width)
    assert (result.words, result.labels) == (words, labels)
    file = path.read_text(encoding="utf-8").split("\n")
    for row, sentence in zip(result.lines, result.words, strict=True):
        assert all(w in file[n - 1] for n, w in zip(row, sentence, strict=True))


def test_rows_with_lists_of_words(tmp_path):
    rows = [{"tokens": ["Ada", "met"], "ner_tags": ["B-PER", "O"]}, {"tokens": [], "ner_tags": []}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert read(tmp_path, text, file="train.JSONL".lower())[1:] == (
        [["Ada", "met"]],
        [["B-PER", "O"]],
    )
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"a B-X\nb O\n", mtime=0))
    _, sets = read_token_task(make_token_task("any"), tmp_path, ["train"])
    assert sets["train"].labels == [["B-X", "O"]]
    (tmp_path / "train.txt.gz").unlink()
    with pytest.raises(UserError, match="line 1: 2 words and 1 labels"):
        read(tmp_path, '{"tokens": ["a", "b"], "ner_tags": ["O"]}\n', file="train.jsonl")


def test_parquet_of_the_hub_names_its_labels(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("string")),
        ner_tags=datasets.List(datasets.ClassLabel(names=["O", "B-X", "I-X"])),
    )
    table = datasets.Dataset.from_dict(
        {"tokens": [["a", "b", "c"]], "ner_tags": [[1, 2, 0]]}, features=features
    )
    table.to_parquet(tmp_path / "train.parquet")
    _, sets = read_token_task(make_token_task("any"), tmp_path, ["train"])
    assert sets["train"].labels == [["B-X", "I-X", "O"]]


def test_labels_of_a_model_in_capitals(tmp_path):
    (tmp_path / "dev.txt").write_text("a O\nb B-per\n")
    names = ("B-PER", "I-PER", "O")
    task, sets = read_token_task(make_token_task("any"), tmp_path, ["dev"], labels=names)
    assert task.labels == names and sets["dev"].labels == [["O", "B-PER"]]


def test_messages_stay_short(tmp_path):
    random_ = random.Random(1)
    labels = [f"tag{random_.random()}" for _ in range(500)]
    (tmp_path / "train.txt").write_text("".join(f"w {label}\n" for label in labels))
    (tmp_path / "dev.txt").write_text("w " + "x" * 5000 + "\n")
    with pytest.raises(UserError, match=r"dev\.txt, line 1: label 'x+' .*500 in all") as error:
        read_token_task(make_token_task("any"), tmp_path, ["train", "dev"])
    assert len(str(error.value)) < 600
