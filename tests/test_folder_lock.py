"""One process at a time writes a folder; leftovers of dead ones go, those of living ones stay."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from megamod import folder_lock
from megamod.errors import UserError
from megamod.folder_lock import Holder, delete_leftovers, lock_folder, lock_folder_name
from megamod.states.output_folder import create_new_folder

HOLDER = """
import sys, time
from pathlib import Path
from megamod.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds OUT."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def refused(folder) -> str:
    with pytest.raises(UserError) as caught, lock_folder(folder):
        pass
    return str(caught.value)


def test_temporary_files_below_go_but_not_those_of_other_runs(tmp_path):
    out, name = tmp_path / "out", ".latest.0123abcd.tmp"
    for folder in ("checkpoints", "seed-2/checkpoints"):
        (out / folder).mkdir(parents=True)
        (out / folder / name).write_text("cut")
    (out / "seed-2" / ".in_use").write_text("{}")
    with lock_folder(out):
        left = [str(path.relative_to(out)) for path in out.rglob("*.tmp")]
    assert left == [f"seed-2/checkpoints/{name}"]


def test_temporary_files_of_locks_go_after_the_death_of_their_processes(tmp_path):
    alive, lock = Holder.make_for_this_process(), tmp_path / ".out.in_use"
    texts = {"0000000a": json.dumps(asdict(alive)), "0000000c": "", "0000000d": ""}
    texts["0000000b"] = json.dumps(asdict(replace(alive, started=1)))
    for number, text in texts.items():
        lock.with_name(f"{lock.name}.{number}.tmp").write_text(text)
    os.utime(tmp_path / ".out.in_use.0000000d.tmp", (1, 1))  # of a machine that is long dead
    with lock_folder_name(tmp_path / "out"):
        pass
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".out.in_use.0000000a.tmp", ".out.in_use.0000000c.tmp"]


def test_a_second_process_is_refused_at_once_until_the_first_is_dead(other, tmp_path):
    out = tmp_path / "out"
    began = time.monotonic()
    message = refused(out)
    assert f"in use by process {other.pid} on {os.uname().nodename} since 20" in message
    assert time.monotonic() - began < 1
    other.kill()
    other.wait()
    (out / ".evaluations.json.0123abcd.tmp").write_text("cut")
    (out / ".notes.tmp").write_text("mine")
    with lock_folder(out):
        assert json.loads((out / ".in_use").read_text())["pid"] == os.getpid()
        with lock_folder(out):  # the same process again
            pass
        assert (out / ".in_use").exists()
    assert [path.name for path in out.iterdir()] == [".notes.tmp"]


def lock_of(folder, **changes) -> None:
    folder.mkdir()
    holder = replace(Holder.make_for_this_process(), **changes)
    (folder / ".in_use").write_text(json.dumps(asdict(holder)))


def test_a_number_that_another_process_got_is_not_the_holder(tmp_path):
    lock_of(tmp_path / "out", started=1)
    with lock_folder(tmp_path / "out"):
        pass


def test_a_holder_on_another_machine_is_known_by_its_touch(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "WATCH", 1.5)
    out = tmp_path / "out"
    lock_of(out, machine="another", host="node7", pid=7)
    file = out / ".in_use"
    touches = iter([1.0, 2.0])
    monkeypatch.setattr(folder_lock, "_read_touch_time", lambda path: next(touches))
    monkeypatch.setattr(folder_lock, "_read_file_system_time", lambda path: 3.0)
    assert "process 7 on node7" in refused(out)
    monkeypatch.setattr(
        folder_lock, "_read_touch_time", lambda path: 1.0
    )  # silent while it is watched
    with lock_folder(out):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    file.write_text(json.dumps(asdict(replace(Holder.make_for_this_process(), machine="another"))))
    monkeypatch.setattr(
        folder_lock, "_read_file_system_time", lambda path: 1.0 + folder_lock.STALE + 1
    )
    began = time.monotonic()
    with lock_folder(out):
        pass
    assert time.monotonic() - began < 1


def test_a_lock_that_took_the_place_of_a_dead_one_stays(tmp_path):
    lock_of(tmp_path / "out")
    file = tmp_path / "out" / ".in_use"
    before = file.read_text()
    folder_lock._delete_lock_file(file, replace(Holder.make_for_this_process(), token="dead"))
    assert file.read_text() == before


def test_without_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with lock_folder(tmp_path / "out"):
        assert json.loads((tmp_path / "out" / ".in_use").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "out").exists()  # nothing was written


def test_leftovers_of_killed_writers_of_this_name_go(tmp_path):
    for name in (".tmp-out-0123abcd", ".tmp-out-0123abcd-0123abcd", ".tmp-other-0123abcd"):
        (tmp_path / name).mkdir()
    with create_new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
        with pytest.raises(UserError, match="is in use"), lock_folder_name(tmp_path / "out"):
            pass
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".tmp-other-0123abcd", ".tmp-out-0123abcd-0123abcd", "out"]


def test_leftovers_beside_a_complete_folder_go_after_the_death_of_their_holder(tmp_path):
    output, lock = tmp_path / "out", tmp_path / ".out.in_use"
    names = (".tmp-out-0123abcd", ".out.partial", "out")
    for name in names:
        (tmp_path / name).mkdir()
    alive, dead = Holder.make_for_this_process(), replace(Holder.make_for_this_process(), started=1)
    for holder in (alive, replace(dead, machine="another")):
        lock.write_text(json.dumps(asdict(holder)))
        delete_leftovers(output, tmp_path / ".out.partial")
        assert {path.name for path in tmp_path.iterdir()} == {*names, lock.name}
    lock.write_text(json.dumps(asdict(dead)))
    delete_leftovers(output, tmp_path / ".out.partial")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
