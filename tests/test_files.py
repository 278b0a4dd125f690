import errno
import hashlib
import json
import math
import os

import pytest

from megamod import files


def test_write_atomic_replaces_whole(tmp_path):
    path = tmp_path / "a.txt"
    files.write_atomic(path, "old ä")
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_atomic_that_fails_leaves_the_old_content(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    files.write_atomic(path, "old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_content_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The order of calls is what makes a crash harmless."""
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def noted_replace(source, target):
        calls.append(("replace", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    files.write_json(tmp_path / "a.json", {"n": 1, "ä": None})
    assert (tmp_path / "a.json").read_text() == '{\n  "n": 1,\n  "ä": null\n}\n'
    assert [kind for kind, _ in calls] == ["fsync", "replace", "fsync"]
    assert calls[0][1].startswith(".a.json.")
    assert calls[1:] == [("replace", "a.json"), ("fsync", tmp_path.name)]


def test_json_has_no_word_for_numbers_that_are_not_finite():
    value = {"a": [math.inf, (1.5, -math.inf)], "b": {"c": math.nan}, "d": "é", "e": True}
    text = files.format_json(value)
    assert text == '{"a": [null, [1.5, null]], "b": {"c": null}, "d": "é", "e": true}'
    half = {"half of a pair": "\ud800"}
    assert json.loads(files.format_json(half).encode()) == half
    assert files.format_json({"a": 1}, indent=2) == '{\n  "a": 1\n}'


def test_atomic_folder_appears_with_its_content(tmp_path):
    with files.create_folder_atomically(tmp_path / "deep" / "out") as folder:
        assert not (tmp_path / "deep" / "out").exists()
        (folder / "a").write_text("1")
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_atomic_folder_that_fails_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        files.create_folder_atomically(tmp_path / "out") as folder,
    ):
        (folder / "a").write_text("1")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_atomic_folder_never_replaces(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with (
        pytest.raises(FileExistsError, match="out exists already"),
        files.create_folder_atomically(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert os.listdir(tmp_path) == ["out"]


def test_sync_tree_reaches_every_file_and_folder(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("1")
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda d: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{d}")))
    )
    files.sync_tree(tmp_path)
    assert synced == ["file", "b", "a", tmp_path.name]


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 1000)
    expected = hashlib.sha256(bytes(range(256)) * 1000).hexdigest()
    assert files.hash_file(tmp_path / "a") == expected
