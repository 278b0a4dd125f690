"""Random lines of many files, the same whatever other files there are."""

import pytest

from megamod.data.corpus.line_sample import write_random_lines
from megamod.errors import UserError


def test_each_long_enough_file_gives_the_same_number_of_lines(tmp_path):
    books = tmp_path / "books"
    (books / "old").mkdir(parents=True)
    (books / "a.txt").write_text("".join(f"a{n}\n\n" for n in range(30)))
    (books / "old" / "b.txt").write_bytes(
        b"\xef\xbb\xbf" + b"".join(b"b%d\r\n" % n for n in range(9))
    )
    (books / "short.txt").write_text("one\n\n\ntwo\n")
    (books / "notes.md").write_text("x\n" * 50)
    settings = dict(encoding_errors="strict", seed=1)
    output = write_random_lines({"books": str(books)}, 5, tmp_path / "out", **settings)
    assert output == {"books": (2, 1)}
    lines = (tmp_path / "out" / "books.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 10
    assert [line[0] for line in lines] == ["a"] * 5 + ["b"] * 5
    assert set(lines[5:]) <= {f"b{n}" for n in range(9)} and lines[:5] != sorted(lines[:5])
    (books / "a.txt").unlink()
    write_random_lines({"books": str(books)}, 5, tmp_path / "again", **settings)
    assert (tmp_path / "again" / "books.txt").read_text().splitlines() == lines[5:]
    write_random_lines({"books": str(books)}, 5, tmp_path / "other", **settings | {"seed": 2})
    assert (tmp_path / "other" / "books.txt").read_text().splitlines() != lines[5:]


def test_refused_inputs(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    settings = dict(encoding_errors="strict", seed=1)
    with pytest.raises(UserError, match="--sample_lines 2: no file of --input x="):
        write_random_lines({"x": str(tmp_path)}, 2, tmp_path / "out", **settings)
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "no such file or folder"), ("empty", "holds no text file")):
        with pytest.raises(UserError, match=message):
            write_random_lines({"x": str(tmp_path / name)}, 2, tmp_path / "out", **settings)
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\n")
    with pytest.raises(UserError, match=r"a.txt"):
        write_random_lines({"x": str(tmp_path)}, 1, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
