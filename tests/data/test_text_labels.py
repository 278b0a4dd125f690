"""Files of sentence tasks: the layouts of GLUE, other ones, and everything that is refused."""

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from megamod.data.corpus.lines import read_lines
from megamod.data.tasks.specs import TASKS, find_text_task
from megamod.data.tasks.task_file import read_task_spec
from megamod.data.tasks.text_labels import read_text_task
from megamod.errors import UserError

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "glue"

# The official columns of each file; a, b and l stand for the texts and the label.
LAYOUTS = {
    "cola": ("x l x a", "index a"),
    "sst-2": ("a l", "index a"),
    "rte": ("index a b l", "index a b"),
    "wnli": ("index a b l", "index a b"),
    "qnli": ("index a b l", "index a b"),
    "mrpc": ("l x x a b", "index x x a b"),
    "qqp": ("x x x a b l", "id a b"),
    "sts-b": ("x x x x x x x a b l", "x x x x x x x a b"),
    "mnli": ("x x x x x x x x a b x l", "x x x x x x x x a b"),
}
NAMES = {
    "cola": {"a": "sentence"},
    "sst-2": {"a": "sentence", "l": "label"},
    "rte": {"a": "sentence1", "b": "sentence2", "l": "label"},
    "wnli": {"a": "sentence1", "b": "sentence2", "l": "label"},
    "qnli": {"a": "question", "b": "sentence", "l": "label"},
    "mrpc": {"a": "#1 String", "b": "#2 String", "l": "Quality"},
    "qqp": {"a": "question1", "b": "question2", "l": "is_duplicate"},
    "sts-b": {"a": "sentence1", "b": "sentence2", "l": "score"},
    "mnli": {"a": "sentence1", "b": "sentence2", "l": "gold_label"},
}


def table(layout: str, names: dict[str, str], header: bool, label: str) -> str:
    columns = layout.split()
    rows = []
    if header:
        rows.append([names.get(column, f"{column}{n}") for n, column in enumerate(columns)])
    for row in range(3):
        cells = {"a": f'first "{row}', "b": f"second {row}", "l": label}
        rows.append([cells.get(column, f"cell{row}") for column in columns])
    return "\ufeff" + "".join("\t".join(row) + "\r\n" for row in rows)


@pytest.mark.parametrize("named", [True, False], ids=["names", "places"])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_official_layouts_by_names_and_by_places(tmp_path, name, named):
    task = find_text_task(name)
    label = "2.5" if task.is_regression else task.labels[-1]
    train, test = LAYOUTS[name]
    names = NAMES[name] if named else {}
    for split, layout in (("train", train), ("dev", train), ("test", test)):
        if split == "test" and not named and name in ("cola", "qqp", "sst-2"):
            continue  # other places than in train: only names tell
        text = table(layout, names, name != "cola" or split == "test", label)
        (tmp_path / task.files[split][0]).write_text(text, encoding="utf-8")
    splits = ["train", "dev"] + ["test"] * (tmp_path / task.files["test"][0]).exists()
    _, sets = read_text_task(task, tmp_path, splits)
    for split, result in sets.items():
        assert result.texts[0] == ['first "0', 'first "1', 'first "2']
        if len(task.texts) == 2:
            assert result.texts[1] == ["second 0", "second 1", "second 2"]
        expected = [2.5] * 3 if task.is_regression else [len(task.labels) - 1] * 3
        assert (None if result.labels is None else result.labels.tolist()) == (
            None if split == "test" else expected
        )
    header = 0 if name == "cola" else 1
    assert sets["train"].origins[0].endswith(f"line {1 + header}")


def test_the_other_header_of_an_inference_task(tmp_path):
    (tmp_path / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n1\ta\tb\tneutral\n")
    _, sets = read_text_task(TASKS["mnli"], tmp_path, ["train"])
    assert sets["train"].labels.tolist() == [2]


def test_short_rows_are_left_out_where_the_task_says_so(tmp_path):
    rows = [
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "1\t1\t2\ta\tb\t1",
        "2\t1\t2\tcut",
    ]
    (tmp_path / "train.tsv").write_text("\n".join(rows))
    _, sets = read_text_task(TASKS["qqp"], tmp_path, ["train"])
    assert sets["train"].texts == (["a"], ["b"])
    with pytest.raises(UserError, match=r"train.tsv, line 3: 4 columns, 6 are needed"):
        read_text_task(replace(TASKS["qqp"], skip_short=False), tmp_path, ["train"])


def test_json_lines_and_labels_of_the_train_file(tmp_path):
    spec = tmp_path / "task.yaml"
    spec.write_text(
        "{name: t, kind: sequence, text: text, label: y, files: {train: a.jsonl, test: b.jsonl}}"
    )
    (tmp_path / "a.jsonl").write_text('{"text": "one", "y": "b"}\n\n{"text": "two", "y": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    task, sets = read_text_task(read_task_spec(spec), tmp_path, ["train", "test"])
    assert task.labels == ("a", "b")
    assert sets["train"].labels.tolist() == [1, 0] and sets["test"].labels is None
    for line, message in (
        ('{"text": 3, "y": "a"}', "'text' is 3, text is needed"),
        ('{"text": "x"}', "no label 'y'"),
        ('{"txt": "x", "y": "a"}', "no column 'text'; there are 'txt', 'y'"),
        ('{"text": "x", "y": ["a"]}', r"label \['a'\] is not a name"),
        ("3", "a JSON int; JSON lines are needed"),
        ("[1]", "a JSON list; JSON lines"),
        ("{", "not a JSON object"),
        (r'{"text": "\ud800", "y": "a"}', r"character U\+D800 is not text"),
    ):
        (tmp_path / "a.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=rf"a.jsonl, line 1: {message}"):
            read_text_task(read_task_spec(spec), tmp_path, ["train"])


HEADER = "index\tsentence1\tsentence2\tlabel\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (HEADER.encode(), "no example of task rte in it"),
        (
            HEADER.encode() + b"0\ta\tb\tmaybe\n",
            "line 2: label 'maybe' is not one of task rte: ent",
        ),
        (HEADER.encode() + b"0\ta\tb\n", "line 2: 3 columns, 4 are needed"),
        (HEADER.encode() + b"0\ta\tb\tentailment\tx\n", "line 2: 5 columns, 4 are needed"),
        (
            HEADER.encode() + b"0\ta\tb\tentailment\n\n1\ta\tb\tentailment\n",
            "line 3: an empty line",
        ),
        (HEADER.encode() + b"0\ta\t\xff\tentailment\n", "line 2: invalid UTF-8 at byte 5"),
        (HEADER.encode() + b"0\ta\t\0\tentailment\n", r"line 2: character U\+0000 is not text"),
        (HEADER.encode() + b"0\t \t\tentailment\n", "line 2: no text in sentence1, sentence2"),
        (b"index\tsentence1\tlabel\n0\ta\tentailment\n", "line 1: no column 'sentence2' for task"),
        (b"index\tsentence1\tsentence1\tlabel\n", "line 1: two columns are named 'sentence1'"),
        (b"x\ty\n0\ta\n", "line 1: 2 columns"),
    ],
)
def test_files_that_are_refused_with_file_and_line(tmp_path, content, message):
    (tmp_path / "train.tsv").write_bytes(content)
    with pytest.raises(UserError, match=f"train.tsv(, |: ){message}"):
        read_text_task(TASKS["rte"], tmp_path, ["train"])


@pytest.mark.parametrize("label", ["6.0", "nan", "x", ""])
def test_values_out_of_bounds(tmp_path, label):
    cells = "\t".join(["x"] * 7 + ["a", "b", label])
    (tmp_path / "train.tsv").write_text("\t".join(["h"] * 0 or [f"h{n}" for n in range(10)]))
    with open(tmp_path / "train.tsv", "a") as file:
        file.write(f"\n{cells}\n")
    with pytest.raises(UserError, match=f"line 2: label '{label}' is not a number from 0 to 5"):
        read_text_task(TASKS["sts-b"], tmp_path, ["train"])


def test_a_split_that_is_missing(tmp_path):
    (tmp_path / "train.tsv").write_text(HEADER + "0\ta\tb\tentailment\n")
    with pytest.raises(UserError, match=r"has no split dev \(dev.tsv\)"):
        read_text_task(TASKS["rte"], tmp_path, ["train", "dev"])


def test_labels_of_the_hub_are_matched_by_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    names = ["entailment", "neutral", "contradiction"]  # another order than in the files
    features = datasets.Features(
        premise=datasets.Value("string"),
        hypothesis=datasets.Value("string"),
        label=datasets.ClassLabel(names=names),
    )
    rows = {"premise": ["p", "q", "r"], "hypothesis": ["h", "i", "j"], "label": [0, 2, -1]}
    loaded = {"train": datasets.Dataset.from_dict(rows, features=features)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: loaded)
    task, sets = read_text_task(TASKS["snli"], None, ["train"])
    assert [task.labels[n] for n in sets["train"].labels] == ["entailment", "contradiction"]


@pytest.mark.skipif(not REAL.exists(), reason="the real files are not beside this repository")
def test_real_files_have_the_known_numbers_of_rows():
    known = {
        "CoLA": (8551, 1043), "MRPC": (3667, 408), "SICK-E": (4500, 500),
        "SST-2": (20000, 872), "STS-B": (5749, 1500), "WNLI": (635, 71),
    }  # fmt: skip
    for folder, counts in known.items():
        _, sets = read_text_task(find_text_task(folder), REAL, ["train", "dev"])
        assert (len(sets["train"]), len(sets["dev"])) == counts
    assert sets["train"].labels.sum() == 312


def test_lines_end_at_line_feeds_alone(tmp_path):
    (tmp_path / "x").write_bytes("\ufeffa\x85b\x1cc\r\nd\u2028e".encode())
    assert list(read_lines(tmp_path / "x")) == [(1, "a\x85b\x1cc"), (2, "d\u2028e")]


SPEC = "{name: t, kind: sequence, text: text, label: y, files: {train: FILE}}"


def read_rows(folder: Path, name: str, content: bytes) -> tuple[tuple[str, ...], list, list]:
    """Labels, texts and label numbers of a train file."""
    (folder / name).write_bytes(content)
    (folder / "task.yaml").write_text(SPEC.replace("FILE", name))
    task, sets = read_text_task(read_task_spec(folder / "task.yaml"), folder, ["train"])
    return task.labels, sets["train"].texts[0], sets["train"].labels.tolist()


CSV = b'y,text\n"1 ","a ""b"", c"\n 0,"two\nlines"\n'
ROWS = b'{"y": " 1", "text": "a \\"b\\", c"}\n{"y": 0, "text": "two\\nlines"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV),
        ("a.csv.gz", gzip.compress(CSV, mtime=0)),
        ("a.ndjson", ROWS),
        ("a.jsonlines", ROWS),
        ("a.JSONL", ROWS),
        ("a.jl.zst", zstandard.compress(ROWS)),
        ("a.json", ROWS),
    ],
)
def test_formats_by_their_endings(tmp_path, name, content):
    assert read_rows(tmp_path, name, content) == (("0", "1"), ['a "b", c', "two\nlines"], [1, 0])


@pytest.mark.parametrize("name", ["a.xml", "a.xlsx", "a", "a.tsv.zip", "a.arrow"])
def test_unknown_endings_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"the ending '.*' is not one of \.tsv, "):
        read_rows(tmp_path, name, b"text\ty\na\t0\nb\t1\n")


def test_parquet_has_the_names_of_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"), y=datasets.ClassLabel(names=["no", "yes"])
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "y": [1, 0]}, features=features)
    table.to_parquet(tmp_path / "b.parquet")
    content = (tmp_path / "b.parquet").read_bytes()
    assert read_rows(tmp_path, "a.parquet", content) == (("no", "yes"), ["a", "b"], [1, 0])
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
        read_rows(tmp_path, "a.parquet", content[:-9])


@pytest.mark.parametrize("blank", [" ", "\t"[:0], "  ", "\u00a0"])
def test_blanks_around_labels_do_not_count(tmp_path, blank):
    rows = f"text\ty\na\t{blank}1\nb\t0\nc\t1{blank}\n".encode()
    assert read_rows(tmp_path, "a.tsv", rows) == (("0", "1"), ["a", "b", "c"], [1, 0, 1])
    with pytest.raises(UserError, match="line 3: no label in y"):
        read_rows(tmp_path, "a.tsv", f"text\ty\na\t1\nb\t{blank}\nc\t0\n".encode())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv",
            b"text\ty\r" + b"some text\t0\r" * 500,
            "a.tsv: one line, because its .* carriage",
        ),
        (
            "a.tsv",
            b"text\ty\r" + b"some text\t0\r" * 500 + b"\n",
            "a.tsv: one line, because its .* carriage",
        ),
        ("a.json", b'[\n {"text": "a", "y": 0},\n {"text": "b", "y": 1}\n]\n', "a JSON list; JSON"),
        (
            "a.jsonl",
            b'[{"text": "a", "y": 0}]',
            "a.jsonl, line 1: a JSON list; JSON lines are needed",
        ),
        (
            "a.tsv",
            b"\t".join(b"c%d" % n for n in range(9999)) + b"\n",
            "no column 'text' .*9999 in",
        ),
        ("a.jsonl", b'{"text": "a", "y": "' + b"long" * 999 + b'"}\n', "all its labels are 'lo"),
        ("a.csv", b'text,y\n"a,0\n', "line 2: not CSV"),
    ],
)
def test_short_messages_name_the_cause(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        read_rows(tmp_path, name, content)
    assert len(str(error.value).splitlines()) <= 3 and len(str(error.value)) < 500


def test_capitals_of_labels_do_not_count(tmp_path):
    (tmp_path / "train.tsv").write_text(HEADER + "0\ta\tb\tENTAILMENT\n1\ta\tb\tNot_Entailment\n")
    _, sets = read_text_task(TASKS["rte"], tmp_path, ["train"])
    assert sets["train"].labels.tolist() == [0, 1]
    labels, *_, numbers = read_rows(tmp_path, "a.tsv", b"text\ty\na\tUS\nb\tus\n")
    assert labels == ("US", "us") and numbers == [0, 1]
