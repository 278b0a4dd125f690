"""Tasks by name, their files, and tasks written as YAML."""

import pytest

from megamod.data.tasks.specs import GLUE, TASKS, find_task_files, find_text_task, make_token_task
from megamod.data.tasks.task_file import read_task_spec
from megamod.errors import UserError


def test_the_nine_tasks_of_glue_in_their_order():
    names = "cola mnli rte wnli qqp sts-b sst-2 qnli mrpc"
    assert " ".join(GLUE) == names
    labels = {name: len(TASKS[name].labels) for name in GLUE}
    assert labels == dict.fromkeys(names.split(), 2) | {"mnli": 3, "sts-b": 0}
    first = {name: TASKS[name].metrics[0] for name in ("cola", "sts-b", "mnli", "qqp")}
    assert list(first.values()) == ["matthews_correlation", "spearmanr", "accuracy", "accuracy"]
    assert TASKS["mnli"].labels == TASKS["sick-e"].labels
    assert TASKS["mnli"].list_splits("dev") == ("dev", "dev_mm")


@pytest.mark.parametrize("name", ["sst2", "SST-2", "sst-2", "SST_2"])
def test_spellings_of_a_name(name):
    assert find_text_task(name) is TASKS["sst-2"]


def test_a_name_that_is_none():
    with pytest.raises(UserError, match="'sst3' is none of cola, mnli"):
        find_text_task("sst3")


@pytest.mark.parametrize("below", ["", "SST-2", "sst2"])
def test_files_lie_in_the_folder_or_in_that_of_the_task(tmp_path, below):
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    (folder / "train.tsv").touch()
    assert find_task_files(find_text_task("sst-2"), tmp_path) == {"train": folder / "train.tsv"}


def test_folders_without_files(tmp_path):
    with pytest.raises(UserError, match=r"no file of task rte \(train.tsv, dev.tsv, test.tsv\)"):
        find_task_files(find_text_task("rte"), tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        find_task_files(find_text_task("rte"), tmp_path / "missing")


def test_columns_of_token_tasks():
    assert make_token_task("pos").label.name == make_token_task("ud_ewt").label.name == "upos"
    assert make_token_task("wnut17").texts[0].index is make_token_task("wnut17").label.index is None
    assert (
        make_token_task("pos", 1, 2).label.index == 2
        and make_token_task("pos", 1, 2).texts[0].index == 1
    )


GOOD = """
name: reviews
kind: pair
text: [premise, 4]
label: label
labels: [0, 1]
metrics: [macro_f1, accuracy]
files: {train: a.tsv, dev_x: b.jsonl}
"""


def test_a_task_in_a_file(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(GOOD)
    task = read_task_spec(path)
    assert (task.kind, task.labels, task.metrics) == ("pair", ("0", "1"), ("macro_f1", "accuracy"))
    assert [(c.name, c.index) for c in task.texts] == [("premise", None), ("column 4", 4)]
    assert task.files == {"train": ("a.tsv",), "dev_x": ("b.jsonl",)}


@pytest.mark.parametrize(
    ("line", "replaced", "message"),
    [
        ("kind: pair", "kind: triple", "kind: 'triple' is not one of sequence, pair"),
        ("label: label", "labl: label", "unknown key 'labl'; the nearest is 'label'"),
        ("label: label", "label: true", "label: True is not a name or a number from 0"),
        ("name: reviews", "name: reviews\nname: x", "'name' appears twice"),
        ("kind: pair", "kind: pair\nhub: [a]", "hub: .'a'. is not text"),
        ("name: reviews", "name: ../../x", "name: '../../x' is not made of letters"),
        ("name: reviews", "name: '..'", "is not made of letters"),
        ("[0, 1]", "['a', 'a ']", "not a list of different names"),
        ("name: reviews", "", "name is missing"),
        ("[premise, 4]", "premise", "text: 1 columns, a pair task has 2"),
        ("[0, 1]", "[0, 0]", "not a list of different names"),
        ("[0, 1]", "[0]", "leaves nothing to decide"),
        ("[macro_f1, accuracy]", "[bleu]", r"metrics\[0\]: 'bleu' is not one of accuracy, f1"),
        ("dev_x", "valid", "split 'valid' is not train"),
        ("files: {train: a.tsv, dev_x: b.jsonl}", "", "give either files or hub"),
        ("label: label", "label: label\nheader: false", "a number: no header"),
        ("name: reviews", "name: [", "not YAML"),
        ("label: label", "label: label\nbounds: [1]", r"bounds: \[1\] has fewer than 2 items"),
    ],
)
def test_mistakes_in_a_task_file(tmp_path, line, replaced, message):
    path = tmp_path / "task.yaml"
    path.write_text(GOOD.replace(line, replaced))
    with pytest.raises(UserError, match=message):
        read_task_spec(path)
