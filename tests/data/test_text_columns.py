"""A column of text in CSV, TSV and Parquet files and in data sets of `datasets`."""

import csv
import gzip
import io
import random

import datasets
import pyarrow
import pytest
from pyarrow.parquet import write_table

from megamod.data.corpus.binarize import binarize
from megamod.data.corpus.decoding import Decoding
from megamod.data.corpus.documents import open_document_source, read_documents
from megamod.data.corpus.tokenizers import train_sentencepiece
from megamod.errors import UserError

TEXTS = [f"document {number} says {number * number}" for number in range(200)]


@pytest.mark.parametrize("seed", range(3))
def test_csv_of_any_cells_comes_back(tmp_path, seed):
    draw = random.Random(seed)
    quoting = [csv.QUOTE_MINIMAL, csv.QUOTE_ALL][seed % 2]
    letters = "ab ,;\"\n\t漢'" + "\r" * (quoting == csv.QUOTE_ALL)
    rows = [
        ["".join(draw.choices(letters, k=draw.randint(1, 12))) + "." for _ in range(3)]
        for _ in range(60)
    ]
    written = io.StringIO()
    csv.writer(written, lineterminator=draw.choice(["\n", "\r\n"]), quoting=quoting).writerows(
        [["id", "text", "x"], *rows]
    )
    content = b"\xef\xbb\xbf" + written.getvalue().encode()
    (tmp_path / "a.CSV").write_bytes(content)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(content, mtime=0))
    for name in ("a.CSV", "a.csv.gz"):
        assert list(read_documents(tmp_path / name)) == [row[1] for row in rows]
        assert list(read_documents(tmp_path / name, "x")) == [row[2] for row in rows]


def test_tsv_and_parquet(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b'id\ttext\r\n1\t"a" said "b"\r\n2\t  \n3\t\'c\n')
    assert list(read_documents(tmp_path / "a.tsv")) == ['"a" said "b"', "'c"]
    table = pyarrow.table({"body": ["a\nb", " ", "c"], "n": [1, 2, 3]})
    write_table(table, tmp_path / "a.parquet", row_group_size=1)
    assert list(read_documents(tmp_path / "a.parquet", "body")) == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"id,body\n1,a\n",
            "a.csv, line 1: no column 'text' among 'id', 'body'; --text_column",
        ),
        ("a.csv", b"text,text\n1,a\n", "a.csv, line 1: two columns are named 'text'"),
        ("a.csv", b"id,text\n1,a\n2\n", "a.csv, line 3: 1 columns, the header has 2"),
        ("a.csv", b'id,text\n1,"a\n', "a.csv, line 2: not CSV"),
        ("a.csv", b"id,text\n1,\xff\n", "a.csv: invalid UTF-8 at byte offset 10"),
        ("a.csv", b"", "a.csv, line 1: no column 'text' among none"),
        ("a.tsv", b"id\ttext\n1\ta\tb\n", "a.tsv, line 2: 3 columns, the header has 2"),
        ("a.tsv", b"id\ttext\r1\ta\r", "line ends are carriage returns alone"),
        ("a.tsv", b"id\ttext\n1\ta\0\n", "a.tsv: NUL byte at offset 11"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: cannot be read as Parquet"),
    ],
)
def test_faults_name_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_documents(tmp_path / name))
    assert message in str(error.value) and str(error.value).count("\n") == 0


def test_faults_of_columns_are_seen_before_any_source_is_read(tmp_path):
    write_table(pyarrow.table({"text": [3]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet, row 0: 'text' is int, a string is needed"):
        open_document_source(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: no column 'body' among 'text'"):
        open_document_source(tmp_path / "a.parquet", text_column="body")
    (tmp_path / "a.csv").write_bytes(b"text\n\xff\n")
    decoding = Decoding("replace")
    assert list(read_documents(tmp_path / "a.csv", decoding=decoding)) == ["\ufffd"]
    assert decoding.replaced == 1


def test_streams_of_datasets_give_the_data_bin_of_their_texts(tmp_path):
    tokenizer = train_sentencepiece(TEXTS, 290)
    expected = binarize({"a": TEXTS}, tokenizer, tmp_path / "expected", workers=1)
    table = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(200))})
    generated = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS))
    assert generated.column_names is None
    (tmp_path / "hub").mkdir()
    table.to_parquet(tmp_path / "hub" / "train.parquet")
    (tmp_path / "x.csv").write_text("text\n" + "\n".join(TEXTS))
    for number, source in enumerate(
        (
            table,
            table.to_iterable_dataset(),
            generated,
            f"hf:{tmp_path / 'hub'}",
            tmp_path / "x.csv",
        )
    ):
        output = tmp_path / str(number)
        assert binarize({"a": source}, tokenizer, output, workers=1, streaming=True) == expected
    with pytest.raises(UserError, match="no column 'body' among 'text', 'n'"):
        open_document_source(table.to_iterable_dataset(), text_column="body")
    with pytest.raises(UserError, match="no column 'body' among 'text'"):
        list(open_document_source(generated, text_column="body").iterate_documents())
