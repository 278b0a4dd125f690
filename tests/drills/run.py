"""Run the drills: kills, cuts, lost ranks, NaN, damaged files, full disks, two jobs in one folder.

    python tests/drills/run.py                          all, in the size of every push
    python tests/drills/run.py K F                      some
    python tests/drills/run.py --size nightly           all, hours
    python tests/drills/run.py K --size nightly --seed 3
    python tests/drills/run.py F --size nightly --share 0.1     a tenth of the cases of a night

Each drill is some files; `make test` runs them in the size of a push, without the further files of
a night that are marked long. The table has a row for each: its tests and how many failed, the cases
in them (kills, files, flipped bits, steps) and how many lost something, which must be none. --table
adds the rows to a JSON file as they come, and shows all that are in it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from megamod.files import write_json
from megamod.tables import format_table

REPOSITORY = Path(__file__).resolve().parents[2]
FAILURES = ("failure", "error")
PROCESSES = "3"  # of a push; drills wait for signals and timeouts for much of their time
LOAD = ("--dist", "loadfile", "--no-loadscope-reorder")
HEAD = ("drill", "shows", "size", "seed", "tests", "failed", "cases", "lost", "seconds")


@dataclass(frozen=True)
class Drill:
    """Tests that show one promise, and further ones for the night."""

    title: str
    push: tuple[str, ...]
    nightly: tuple[str, ...] = ()


DRILLS = {
    "K": Drill(
        "kill -9 at any call and instant",
        (
            "tests/drills/drill_kills.py",
            "tests/train/test_checkpoint.py::test_kills_lose_nothing_that_was_committed",
        ),
        ("tests/train/test_checkpoint.py", "tests/btm/test_kill_drill.py"),
    ),
    "R": Drill(
        "a resumed run equals the straight one",
        ("tests/drills/drill_cuts.py",),
        (
            "tests/train/test_old_checkpoint.py",
            "tests/train/test_resume.py",
            "tests/train/test_failed_evaluation.py",
            "tests/runs/test_encoder_lm.py",
            "tests/runs/test_multitask.py",
            "tests/runs/test_adapt.py",
        ),
    ),
    "D": Drill(
        "lost ranks and launchers",
        ("tests/drills/drill_ranks.py",),
        (
            "tests/dist/test_watch.py",
            "tests/dist/test_process.py",
            "tests/drills/test_two_hosts.py",
        ),
    ),
    "N": Drill(
        "NaN, infinity and spikes",
        ("tests/drills/drill_nonfinite.py",),
        ("tests/train/test_diverged.py", "tests/train/test_loop.py"),
    ),
    "F": Drill(
        "damaged files of every format",
        ("tests/drills/drill_malformed.py",),
        ("tests/states/test_damaged_files.py", "tests/data/test_tasks_fuzz.py"),
    ),
    "V": Drill(
        "flipped bits",
        ("tests/drills/drill_flips.py", "tests/data/test_verify_data.py"),
        ("tests/launchers/test_verify.py",),
    ),
    "S": Drill(
        "files that would run code",
        ("tests/drills/drill_hostile.py",),
        ("tests/convert/test_reading.py",),
    ),
    "C": Drill(
        "two jobs in one folder", ("tests/drills/drill_one_holder.py", "tests/test_folder_lock.py")
    ),
    "Q": Drill("full disks and read-only folders", ("tests/drills/drill_full_disk.py",)),
    "A": Drill("answers of a server under mixed load", ("tests/drills/drill_serve.py",)),
    "L": Drill("memory and files of a long run", ("tests/drills/drill_soak.py",)),
}


def list_tests(name: str, size: str) -> list[str]:
    """List the files and tests of a drill, without tests of files that are whole in the list."""
    drill = DRILLS[name]
    tests = dict.fromkeys((*drill.push, *(drill.nightly if size == "nightly" else ())))
    whole = {test for test in tests if "::" not in test}
    return [test for test in tests if test in whole or test.partition("::")[0] not in whole]


def run_drills(
    names: Sequence[str], size: str, share: float, seed: int
) -> dict[str, tuple[str, ...]]:
    """Run drills in a few processes, which share imports; return their rows of the table.

    At night there is one process, so that no drill is slowed by another. A drill without results,
    because its process died, counts as one that failed.
    """
    tests = {name: list_tests(name, size) for name in names}
    variables = {"SIZE": size, "SHARE": str(share), "SEED": str(seed)}
    variables = {f"MEGAMOD_DRILL_{name}": value for name, value in variables.items()}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-o", "junit_family=xunit1", f"--junitxml={report}"]
        command += ["-n", PROCESSES, *LOAD] if size == "push" else []
        subprocess.run(
            [*command, *(test for part in tests.values() for test in part)],
            cwd=REPOSITORY,
            env={**os.environ, **variables},
            check=False,
        )
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    rows = {}
    for name, part in tests.items():
        files = {test.partition("::")[0] for test in part}
        results = [case for case in cases if case.attrib["file"] in files]
        failed = sum(any(case.find(tag) is not None for tag in FAILURES) for case in results)
        sums = {"cases": 0, "lost": 0}
        for case in results:
            for item in case.iter("property"):
                if item.attrib["name"] in sums:
                    sums[item.attrib["name"]] += int(item.attrib["value"])
        counts = (len(results), failed or int(not results), sums["cases"], sums["lost"])
        seconds = sum(float(case.attrib["time"]) for case in results)
        part = size if share == 1 else f"{share:g} of {size}"
        row = (name, DRILLS[name].title, part, str(seed), *map(str, counts), f"{seconds:.0f}")
        rows[name] = row
    return rows


def main() -> None:
    """Parse, run, and print the table."""
    parser = argparse.ArgumentParser(description=re.split("\n", __doc__)[0])
    parser.add_argument(
        "names", nargs="*", choices=[[], *DRILLS], metavar="NAME", help=", ".join(DRILLS)
    )
    parser.add_argument("--size", choices=("push", "nightly"), default="push", help="default: push")
    parser.add_argument("--share", type=float, default=1, help="of the cases of a night")
    parser.add_argument("--seed", type=int, default=1, help="of all draws (default: 1)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="JSON file of rows to add to")
    options = parser.parse_args()
    rows: dict[str, tuple[str, ...]] = {}
    if options.table is not None and options.table.exists():
        rows = {row[0]: tuple(row) for row in json.loads(options.table.read_text())}
    began, failed = time.monotonic(), 0
    names = options.names or list(DRILLS)
    # At night a drill takes long enough to have a process, and a row as soon as it has ended.
    for part in [names] if options.size == "push" else [[name] for name in names]:
        new = run_drills(part, options.size, options.share, options.seed)
        failed += sum(int(row[5]) for row in new.values())
        rows |= new
        if options.table is not None:
            write_json(options.table, list(rows.values()))
    print(format_table([HEAD, *rows.values()], range(3, 9)))
    print(f"{time.monotonic() - began:.0f} s in all")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
