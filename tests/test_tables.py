import pytest

from megamod.tables import format_matrix, format_score_table, format_table


@pytest.mark.parametrize(
    ("rows", "right", "expected"),
    [
        ([], (), ""),
        ([("a",)], (), "a"),
        ([("name", "path"), ("x", "a/b")], (), "name  path\nx     a/b"),
        ([("name", "n"), ("x", "1,000")], {1}, "name      n\nx     1,000"),
        ([("n", "name"), ("1,000", "x")], range(1), "    n  name\n1,000  x"),
        ([("a", "b", "c"), ("", "22", "")], (1,), "a   b  c\n   22"),
        ([("a", "b"), ("1", "2 "), ("1", "333")], {0, 1}, "a    b\n1   2\n1  333"),
        ([("a", "b"), ("", "")], (), "a  b\n"),
    ],
    ids=["none", "one", "left", "right", "first-right", "gaps", "blank-in-cell", "empty-row"],
)
def test_text_is_as_written_by_hand(rows, right, expected):
    assert format_table(rows, right) == expected


def test_rows_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        format_table([("a", "b"), ("c",)])


def test_score_table_by_hand():
    table = format_score_table({"one": {"f1": 0.5}, "two": {"f1": 0.25, "x": "text"}}, "task")
    assert table.split("\n") == [
        "task      f1     x",
        "one   0.5000     -",
        "two   0.2500  text",
    ]


def test_matrix_is_aligned_and_marks_the_smallest():
    matrix = {"law": {"law": 9.5, "code": 100.0}, "code": {"law": 12.25, "code": 7.0}}
    assert format_matrix(matrix).splitlines() == [
        "expert \\ text     law     code",
        "law             9.50*  100.00",
        "code           12.25     7.00*",
    ]
    item = format_matrix({"dense": {"law": 9.5}}, corner="model")
    assert item.splitlines() == ["model    law", "dense  9.50"]
    gaps = format_matrix({"a": {"x": 1.0}, "b": {"y": 2.0}}, digits=1).splitlines()
    assert [line.split() for line in gaps[1:]] == [["a", "1.0*", "-"], ["b", "-", "2.0*"]]
