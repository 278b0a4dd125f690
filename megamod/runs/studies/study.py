"""Running a study's cells: one after the other, in several processes, or one of them again.

A cell's file of figures says that it is done. Processes take cells through locks, so any number of
them can work on a study, and one that was killed leaves nothing behind that another must clean up.
"""

import fcntl
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from megamod.errors import UserError
from megamod.runs.studies import barrier_cell, finetuning, language_models
from megamod.runs.studies.records import (
    TOLERANCE,
    Figures,
    Record,
    find_largest_difference,
    make_cell_record,
    read_cell_record,
    write_cell_record,
)
from megamod.runs.studies.study_file import Cell, Study

logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0
Digests = Mapping[str, object]
RUNS: dict[str, Callable[[Study, Cell, Path, Path], tuple[Figures, Digests]]] = {
    "language_models": language_models.run_language_model_cell,
    "finetuning": finetuning.run_finetuning_cell,
    "barriers": barrier_cell.run_barrier_cell,
}
"""By kind: from study, cell, folder of inputs and folder of work to figures and input digests."""


@dataclass(frozen=True)
class StudyFolders:
    """Folders of a study: inputs, work in progress, and files of figures.

    Work in progress is what cells share or leave: data-bins, runs, locks and logs.
    """

    inputs: Path
    work: Path
    evidence: Path


def run_cells(study: Study, cells: Sequence[Cell], folders: StudyFolders) -> None:
    """Run the cells that have no figures yet, and write their figures into `folders.evidence`.

    Cells that another process works on are skipped.

    Args:
        cells: cells to run, in this order.
        folders: folders of inputs, work and figures.
    Raises:
        UserError: if a cell fails by its settings, or there are figures of other settings.
    """
    missing = [cell for cell in cells if read_cell_record(folders.evidence, cell) is None]
    for cell in missing:
        with _lock_cell(folders.work, cell) as taken:
            if not taken or read_cell_record(folders.evidence, cell) is not None:
                continue
            record = run_cell(study, cell, folders)
            write_cell_record(folders.evidence, record)
        logger.info(
            "%s: %.0f s; %s", cell.name, record["seconds"], format_progress(study, cells, folders)
        )


def run_cell(study: Study, cell: Cell, folders: StudyFolders) -> Record:
    """Run one cell and return its record, which is not written.

    It runs on one thread, on which sums have one order; the process keeps this setting. Its printed
    lines are appended to WORK/logs/CELL.txt.

    Args:
        folders: folders of inputs, work and figures.
    Raises:
        UserError: for settings that are missing or do not go together, or inputs that do not fit.
    """
    torch.set_num_threads(1)
    logs = folders.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    wall, processor = time.perf_counter(), time.process_time()
    with open(logs / f"{cell.name}.txt", "a", encoding="utf-8") as log, redirect_stdout(log):
        figures, digests = RUNS[study.file.kind](study, cell, folders.inputs, folders.work)
    seconds = time.perf_counter() - wall, time.process_time() - processor
    return make_cell_record(study, cell, figures, digests, *seconds)


def run_cells_in_processes(
    study: Study, cells: Sequence[Cell], folders: StudyFolders, command: Sequence[str], jobs: int
) -> None:
    """Start processes that each run cells, and log their progress until all have ended.

    Their output is appended to WORK/logs/process-N.txt.

    Args:
        cells: cells that the processes run.
        folders: folders of inputs, work and figures.
        command: arguments of python that make a process run the cells one after the other.
        jobs: largest number of processes.
    Raises:
        UserError: if cells are left when all processes have ended.
    """
    logs = folders.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    running = []
    for number in range(min(jobs, len(cells))):
        with open(logs / f"process-{number}.txt", "ab") as log:
            arguments = [sys.executable, *command]
            running.append(subprocess.Popen(arguments, stdout=log, stderr=log))
    last = ""
    while any(process.poll() is None for process in running):
        time.sleep(POLL_SECONDS)
        line = format_progress(study, cells, folders)
        if line != last:
            logger.info("%s", line)
            last = line
    left = [cell.name for cell in cells if read_cell_record(folders.evidence, cell) is None]
    if left:
        raise UserError(f"{len(left)} cells are not done, {left[0]} among them; see {logs}")


def repeat_cell(study: Study, cell: Cell, folders: StudyFolders, new_work: Path) -> str:
    """Run a cell again and compare its scores with the recorded ones.

    Args:
        folders: folders of inputs, work and figures.
        new_work: folder of the new run in place of `folders.work`.
    Returns:
        a sentence with the largest relative difference, for the console.
    Raises:
        UserError: if there are no figures, the inputs are others, or the scores differ by more than
            `TOLERANCE`.
    """
    recorded = read_cell_record(folders.evidence, cell)
    if recorded is None:
        raise UserError(f"--repeat: {folders.evidence} has no figures of {cell.name}")
    record = run_cell(study, cell, StudyFolders(folders.inputs, new_work, folders.evidence))
    if record["config_digest"] != recorded["config_digest"]:
        raise UserError(
            f"{cell.name}: the inputs are others than those of the kept figures: "
            f"{recorded['config']['inputs']} then, {record['config']['inputs']} now"
        )
    difference, score = find_largest_difference(recorded, record)
    line = f"{cell.name}: largest relative difference {difference:.2g} ({score})"
    if difference > TOLERANCE:
        raise UserError(f"{line}; at most {TOLERANCE:g} is expected on a machine of the same class")
    return line


def format_progress(study: Study, cells: Sequence[Cell], folders: StudyFolders) -> str:
    """Format the number of cells done, and an estimate of the time of the others, hours:minutes.

    The time is that of one process.

    Args:
        cells: cells to count.
    Raises:
        UserError: if there are figures of other settings.
    """
    records = [read_cell_record(folders.evidence, cell) for cell in cells]
    done = {cell.name: r for cell, r in zip(cells, records, strict=True) if r is not None}
    left = sum(
        _estimate_seconds(cell, list(done.values())) for cell in cells if cell.name not in done
    )
    hours, minutes = divmod(round(left / 60), 60)
    return f"{len(done)} of {len(cells)} cells of {study.name}; {hours}:{minutes:02} h of work left"


def _estimate_seconds(cell: Cell, records: Sequence[Record]) -> float:
    """Estimate the seconds of a cell from those of the cells done; 0 as long as there is none.

    It is the mean of the cells of the same arm and rung, else of the same rung, else of all.

    Args:
        records: records of the cells done.
    """
    groups = [
        [r["seconds"] for r in records if r["arm"] == cell.arm and r["rung"] == cell.rung],
        [r["seconds"] for r in records if r["rung"] == cell.rung],
        [r["seconds"] for r in records],
    ]
    seconds = next((group for group in groups if group), [0.0])
    return sum(seconds) / len(seconds)


@contextmanager
def _lock_cell(work: Path, cell: Cell) -> Iterator[bool]:
    """Hold the lock of a cell for the block, without waiting: the file WORK/locks/CELL.lock.

    Yields True, or False if another process holds it.

    Args:
        work: WORK, folder of the study's work in progress.
    """
    folder = work / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{cell.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
