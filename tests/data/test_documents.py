import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamod.data.corpus.decoding import Decoding
from megamod.data.corpus.documents import (
    assign_split,
    open_document_source,
    parse_domain_paths,
    read_documents,
)
from megamod.errors import UserError

DOMAINS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "domains"
LINES = st.text(st.characters(blacklist_characters="\0\r\n", blacklist_categories=["Cs"])).filter(
    lambda line: line.strip() and not line.startswith("\ufeff")
)


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_plain_text_with_mark_carriage_returns_and_many_blank_lines(tmp_path):
    path = write(
        tmp_path / "a.txt", b"\xef\xbb\xbf\r\none\r\n  two\r\n\r\n \t\r\n\r\nthree\n\nfour"
    )
    assert list(read_documents(path)) == ["one\n  two", "three", "four"]


@given(documents=st.lists(st.lists(LINES, min_size=1).map("\n".join)))
def test_documents_round_trip(tmp_path_factory, documents):
    path = tmp_path_factory.getbasetemp() / "written.txt"
    write(path, "\n\n".join(documents) + "\n")
    assert list(read_documents(path)) == documents


def test_real_domain_equals_naive_split():
    path = DOMAINS / "code_python" / "valid.txt"
    if not path.exists():
        pytest.skip("the shared text domains are not beside this repository")
    assert list(read_documents(path)) == path.read_text("utf-8").rstrip("\n").split("\n\n")


def test_jsonl_reads_the_named_key_and_skips_blank_documents(tmp_path):
    rows = [{"body": "a\n\nb"}, {"body": " \n"}, {"body": "c", "text": 3}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(read_documents(path, text_column="body")) == ["a\n\nb", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"other": 1}', "no key 'text' among 'other'"),
        ('{"text": null}', "'text' is null"),
        ('{"text": 3}', "'text' is int"),
        ('{"text": "a", "text": "b"}', "twice"),
        ('{"text": "a"', "not a JSON object"),
        ('["text"]', "a JSON list; JSON lines are needed"),
        ("[" * 100_000, "a JSON list"),
        ('{"text": "\\ud800"}', "U+D800"),
        ('{"text": "a\\u0000"}', "U+0000"),
    ],
)
def test_bad_json_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        list(read_documents(path))
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\nba\xffd\n", "invalid UTF-8 at byte offset 7"),
        (b"\xef\xbb\xbfgo\xc3\n", "invalid UTF-8 at byte offset 5"),
        (b"good\r\n\na\0b", "NUL byte at offset 8"),
        ("text".encode("utf-16"), "invalid UTF-8 at byte offset 0"),
    ],
)
def test_bad_bytes_name_file_and_offset(tmp_path, content, message):
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(UserError) as error:
        list(read_documents(path))
    assert f"{path}: {message}" in str(error.value)


def test_replacement_is_counted(tmp_path):
    path = write(tmp_path / "a.txt", "kept \ufffd".encode() + b" \xff\xfe\n\0\n")
    decoding = Decoding("replace")
    assert list(read_documents(path, decoding=decoding)) == ["kept � ��\n�"]
    assert decoding.replaced == 3
    assert decoding.repair_string("\ud800\0", "here") == "��"
    assert decoding.replaced == 5
    with pytest.raises(UserError, match="ignore: allowed are strict and replace"):
        Decoding("ignore")


def test_memory_for_a_huge_line_is_bounded(tmp_path):
    size = 8 << 20
    path = write(tmp_path / "a.txt", b"x" * size + b"\n\nshort\n")
    tracemalloc.start()
    lengths = [len(document) for document in read_documents(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [size, 5]
    assert peak < 4 * size


def test_division_is_a_hash_of_seed_and_content():
    documents = [f"document {number}" for number in range(4000)]
    result = [assign_split(document, 7) for document in documents]
    assert 0.88 < result.count("train") / 4000 < 0.92
    assert 0.04 < result.count("valid") / 4000 < 0.06
    digest = hashlib.blake2b(b"7\ndocument 0", digest_size=8).digest()
    expected = int.from_bytes(digest, "little") / 2**64
    assert result[0] == ("train" if expected < 0.9 else "valid" if expected < 0.95 else "test")
    assert result != [assign_split(document, 8) for document in documents]


def test_a_single_file_is_divided_and_duplicates_stay_together(tmp_path):
    texts = [f"document {number}" for number in range(200)] * 2
    path = write(tmp_path / "a.txt", "\n\n".join(texts))
    source = open_document_source(path, seed=3)
    pairs = list(source.iterate_documents())
    assert pairs == [(assign_split(text, 3), text) for text in texts]
    splits = [
        {text for split, text in pairs if split == item} for item in ("train", "valid", "test")
    ]
    assert sum(map(len, splits)) == 200
    assert [text for _, text in source.iterate_documents("test")] == [
        text for split, text in pairs if split == "test"
    ]


def test_a_folder_has_one_file_per_split(tmp_path):
    write(tmp_path / "train.txt", "a\n\n\n\nb\nc\n")
    write(tmp_path / "dev.jsonl", '{"text": "d\\ne"}\n{"text": "f"}\n')
    write(tmp_path / "test.txt", "g")
    source = open_document_source(tmp_path)
    expected = [("train", "a"), ("train", "b\nc"), ("valid", "d\ne"), ("valid", "f"), ("test", "g")]
    assert list(source.iterate_documents()) == expected
    assert [line for _, line in source.iterate_lines("valid")] == ["d", "e", "", "f"]
    write(tmp_path / "valid.txt", "h")
    with pytest.raises(UserError, match=r"valid .* there is dev\.jsonl and valid\.txt"):
        open_document_source(tmp_path)
    (tmp_path / "train.txt").unlink()
    with pytest.raises(UserError, match=r"split train is needed, .* there is none"):
        open_document_source(tmp_path)


def test_a_missing_split_is_cut_out_of_train(tmp_path):
    texts = [f"document {number}" for number in range(200)]
    write(tmp_path / "train.txt", "\n\n".join(texts))
    write(tmp_path / "valid.txt", "v")
    source = open_document_source(tmp_path)
    tests = [text for text in texts if assign_split(text, 0) == "test"]
    pairs = list(source.iterate_documents())
    assert [text for split, text in pairs if split == "test"] == tests and 2 < len(tests) < 30
    assert [text for split, text in pairs if split == "train"] == [
        text for text in texts if text not in tests
    ]
    assert list(source.iterate_documents("valid")) == [("valid", "v")]
    assert list(source.iterate_documents("test")) == [("test", text) for text in tests]
    assert list(source.iterate_lines("test"))[:3] == [
        ("test", tests[0]),
        ("test", ""),
        ("test", tests[1]),
    ]


def test_shards_of_a_split_are_read_in_order(tmp_path):
    for number in range(2):
        write(tmp_path / f"train-{number:05}-of-00002.jsonl", f'{{"text": "t{number}"}}\n')
    for split in ("validation", "test"):
        write(tmp_path / f"{split}-00000-of-00001.jsonl", f'{{"text": "{split}"}}\n')
    assert list(open_document_source(tmp_path).iterate_documents()) == [
        *(("train", "t0"), ("train", "t1"), ("valid", "validation"), ("test", "test"))
    ]
    (tmp_path / "train-00000-of-00002.jsonl").unlink()
    with pytest.raises(UserError, match="1 of 2 files of the split train: train-00001-of-00002"):
        open_document_source(tmp_path)


def test_lines_of_a_folder_of_text_files(tmp_path):
    for split in ("train", "valid", "test"):
        write(tmp_path / f"{split}.txt", "a\r\n\n\n b \n")
    lines = [line for _, line in open_document_source(tmp_path).iterate_lines("train")]
    assert lines == ["a", "", "", " b "]


def test_saved_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"text": [f"row {number}" for number in range(120)]}
    table = datasets.Dataset.from_dict(rows)
    table.save_to_disk(tmp_path / "one")
    assert [text for _, text in open_document_source(tmp_path / "one").iterate_documents()] == rows[
        "text"
    ]
    splits = datasets.DatasetDict({"train": table, "validation": table, "test": table})
    splits.save_to_disk(tmp_path / "three")
    assert [split for split, _ in open_document_source(tmp_path / "three").iterate_documents()] == (
        ["train"] * 120 + ["valid"] * 120 + ["test"] * 120
    )
    with pytest.raises(UserError, match="no column 'body'"):
        open_document_source(tmp_path / "one", text_column="body")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
    splits = [split for split, _ in open_document_source(tmp_path / "two").iterate_documents()]
    assert splits.count("test") == 120 and 0 < splits.count("valid") < 20
    datasets.DatasetDict({"train": table, "other": table}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match=r"has the splits \['other', 'train'\]"):
        open_document_source(tmp_path / "other")
    datasets.Dataset.from_dict({"text": ["a", None]}).save_to_disk(tmp_path / "null")
    with pytest.raises(UserError, match="null, row 1: 'text' is null"):
        list(open_document_source(tmp_path / "null").iterate_documents())


def test_hub_name_and_configuration(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*arguments, streaming):
        asked.append(arguments)
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["only"]})})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [text for _, text in open_document_source("hf:owner/name:part").iterate_documents()] == [
        "only"
    ]
    open_document_source("hf:owner/name")
    assert asked == [("owner/name", "part"), ("owner/name", None)]


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_document_source(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"table\.xlsx: the ending '\.xlsx' is not one of"):
        open_document_source(write(tmp_path / "table.xlsx", "a,b"))


def test_inputs_of_a_command_line():
    assert list(parse_domain_paths(["b=x=y", "a=z"]).items()) == [("b", "x=y"), ("a", "z")]
    for values, message in ((["a"], "write NAME=PATH"), (["a=1", "a=2"], "domain a is 1 already")):
        with pytest.raises(UserError, match=message):
            parse_domain_paths(values)


def test_json_lines_named_as_text_are_reported(tmp_path, caplog):
    path = write(tmp_path / "a.txt", '{"text": "one"}\n{"text": "two"}\n')
    assert len(list(open_document_source(path).iterate_documents())) == 1
    assert "line 1 is a JSON object" in caplog.text and "rename the file to .jsonl" in caplog.text
    caplog.clear()
    list(
        open_document_source(write(tmp_path / "b.txt", "{one} is no object\n")).iterate_documents()
    )
    assert caplog.text == ""
