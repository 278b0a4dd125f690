"""Spoiled files of tasks: whatever was done to them, they are read or refused by name."""

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamod.data.tasks.specs import TASKS, make_token_task
from megamod.data.tasks.task_file import read_task_spec
from megamod.data.tasks.text_labels import read_text_task
from megamod.data.tasks.word_labels import read_token_task
from megamod.errors import UserError

TSV = "\ufeffindex\tsentence1\tsentence2\tlabel\n" + "".join(
    f"{n}\tone “{n}\ttwo\t{'not_' * (n % 2)}entailment\r\n" for n in range(6)
)
CONLL = "-DOCSTART- O\n\n" + "EU B-ORG\nthe I-ORG\nrejects O\n\nBonn B-LOC\n. O\n\n" * 3
SPEC = (
    "{name: t, kind: pair, text: [a, 3], label: l, labels: [x, y], metrics: [f1], bounds: [0, 1],\n"
    "files: {train: a.tsv, dev: b.tsv}, header: true}"
)
JSON = '{"a": "one", "l": "x"}\n{"a": "two", "l": "y"}\n'
PIECES = [
    b"",
    b"\t",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b" ",
    b"B-",
    b"I-X",
    b"{",
    b"null",
]


def spoil(content: bytes, seed: int) -> bytes:
    """A few random cuts, repeats and insertions."""
    random_ = random.Random(seed)
    for _ in range(random_.randint(1, 4)):
        a, b = sorted(random_.randrange(len(content) + 1) for _ in range(2))
        b = min(b, a + random_.choice((0, 1, 5, 40)))
        middle = random_.choice([*PIECES, content[a:b] * 2])
        content = content[:a] + middle + content[b:]
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_spoiled_files_are_read_or_refused(folder, seed):
    (folder / "train.tsv").write_bytes(spoil(TSV.encode(), seed))
    with contextlib.suppress(UserError):
        _, sets = read_text_task(TASKS["rte"], folder, ["train"])
        assert set(sets["train"].labels.tolist()) <= {0, 1}
    (folder / "train.txt").write_bytes(spoil(CONLL.encode(), seed))
    (folder / "train.tsv").unlink()
    with contextlib.suppress(UserError):
        task, sets = read_token_task(
            make_token_task("any"), folder, ["train"], repair=bool(seed % 2)
        )
        for words, labels in zip(sets["train"].words, sets["train"].labels, strict=True):
            assert len(words) == len(labels) and set(labels) <= set(task.labels)
    (folder / "task.yaml").write_bytes(spoil(SPEC.encode(), seed))
    (folder / "a.tsv").write_text("a\tb\tc\td\tl\n1\t2\t3\t4\tx\n")
    with contextlib.suppress(UserError):
        read_text_task(read_task_spec(folder / "task.yaml"), folder, ["train"])
    (folder / "a.jsonl").write_bytes(spoil(JSON.encode(), seed))
    (folder / "json.yaml").write_text(
        "{name: t, kind: sequence, text: a, label: l, files: {train: a.jsonl}}"
    )
    with contextlib.suppress(UserError):
        read_text_task(read_task_spec(folder / "json.yaml"), folder, ["train"])
