"""OUT/logs/HOST.log: which lines are kept, on which rank, and that nothing of it can end a run."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megamod.runs.node_log import LONGEST, NodeLog, write_node_log


@pytest.fixture
def rank(monkeypatch):
    """Sets the rank as a launcher would."""

    def set_rank(number: int, local: int) -> None:
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("LOCAL_RANK", str(local))

    return set_rank


def say(level: int, text: str) -> None:
    logging.getLogger("megamod.train").log(level, "%s", text)


def lines_of(folder):
    (file,) = (folder / "logs").iterdir()
    assert file.name == f"{os.uname().nodename}.log"
    return file.read_text().splitlines()


def test_lines_of_libraries_are_printed_once():
    """transformers and the hub have handlers of their own, and hand records on to the root, too."""
    program = (
        "import logging\nfrom megamod.runs.node_log import start_logging\nstart_logging()\n"
        "for name in ('transformers', 'huggingface_hub'):\n"
        "    logging.getLogger(name).addHandler(logging.StreamHandler())\n"
        "for name in ('transformers.models', 'huggingface_hub.file', 'megamod.train', 'other'):\n"
        "    logging.getLogger(name).warning('line of %s', name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lines = [line.rpartition("line of ")[2] for line in done.stderr.splitlines()]
    assert lines == ["transformers.models", "huggingface_hub.file", "megamod.train", "other"]


def test_a_run_that_ends_well_and_goes_on(tmp_path, rank):
    rank(8, 0)
    for step in (0, 40):
        with write_node_log(tmp_path, "table\nrows", step):
            say(logging.WARNING, f"after {step}")
        say(logging.WARNING, "not of the run")
    output = [re.sub(r"^[\d-]+ [\d:,]+ ", "", line) for line in lines_of(tmp_path)]
    process = f"I rank 8 of 1, process {os.getpid()}, begins at step"
    assert output == [
        *(f"{process} 0", "table", "rows", "W after 0", "I rank 8 is done after 0 s"),
        *(f"{process} 40", "table", "rows", "W after 40", "I rank 8 is done after 0 s"),
    ]


def test_the_error_that_ended_it(tmp_path, rank):
    rank(0, 0)
    with pytest.raises(KeyError), write_node_log(tmp_path, "table", 0):
        raise KeyError("law")
    assert lines_of(tmp_path)[-1].endswith("I rank 0 ended after 0 s: KeyError: 'law'")


def test_other_ranks_of_a_host_write_nothing(tmp_path, rank):
    rank(9, 1)
    with write_node_log(tmp_path, "table", 0):
        say(logging.WARNING, "here")
    assert list(tmp_path.iterdir()) == []


def test_long_records_are_cut(tmp_path, rank):
    rank(0, 0)
    with write_node_log(tmp_path, "table", 0):
        say(logging.WARNING, "x" * 2 * LONGEST)
    assert lines_of(tmp_path)[-2] == lines_of(tmp_path)[-2][:LONGEST] + " ..."


def test_a_folder_that_cannot_be_written_is_passed_over(tmp_path, rank):
    rank(0, 0)
    (tmp_path / "logs").write_text("a file")
    with write_node_log(tmp_path, "table", 0):
        say(logging.WARNING, "here")
    assert (tmp_path / "logs").read_text() == "a file"


def test_a_full_disk_is_told_once_by_the_name_of_the_file(capsys):
    log = NodeLog(Path("/dev/full"))
    for _ in range(2):
        log.append_line("text")
    log.close()
    assert capsys.readouterr().err == "/dev/full: cannot be written: No space left on device\n"
