"""Run the drills: kills, cuts, lost ranks, NaN, damaged files, two jobs in one folder.

    python tests/drills/run.py                          all, in the size of every push
    python tests/drills/run.py kills damage             some
    python tests/drills/run.py --size nightly           all, hours

Each drill is some files of the suite; `nightly` adds those that take long, and more kills. A drill
has failed if one of its tests has; exit code 1 then.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from megamod.tables import format_table

REPOSITORY = Path(__file__).resolve().parents[2]
KILLS = {"push": "8", "nightly": "200"}


@dataclass(frozen=True)
class Drill:
    """Tests that show one promise, and further ones for the night."""

    title: str
    push: tuple[str, ...]
    nightly: tuple[str, ...] = ()


DRILLS = {
    "kills": Drill(
        "kill -9, and a fault at every write",
        ("tests/train/test_checkpoint.py::test_kills_lose_nothing_that_was_committed",),
        ("tests/train/test_checkpoint.py", "tests/btm/test_kill_drill.py"),
    ),
    "resume": Drill(
        "a resumed run equals the straight one",
        ("tests/train/test_old_checkpoint.py",),
        ("tests/train/test_resume.py", "tests/train/test_failed_evaluation.py"),
    ),
    "ranks": Drill(
        "lost ranks and launchers",
        ("tests/dist/test_watch.py",),
        ("tests/drills/test_two_hosts.py",),
    ),
    "nonfinite": Drill(
        "NaN, infinity and spikes", ("tests/train/test_diverged.py",), ("tests/train/test_loop.py",)
    ),
    "damage": Drill(
        "damaged files and flipped bits",
        ("tests/states/test_damaged_files.py", "tests/data/test_verify_data.py"),
        ("tests/data/test_tasks_fuzz.py", "tests/launchers/test_verify.py"),
    ),
    "hostile": Drill("files that would run code", ("tests/convert/test_reading.py",)),
    "folders": Drill("two jobs in one folder", ("tests/test_folder_lock.py",)),
}


def run_drill(drill: Drill, size: str) -> tuple[int, int, float]:
    """Run a drill; return its tests, the failed ones and seconds."""
    tests = dict.fromkeys((*drill.push, *(drill.nightly if size == "nightly" else ())))
    whole = {test for test in tests if "::" not in test}
    tests = [test for test in tests if test in whole or test.partition("::")[0] not in whole]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        subprocess.run(
            [*command, f"--junitxml={report}", *tests],
            cwd=REPOSITORY,
            env={**os.environ, "MEGAMOD_DRILL_KILLS": KILLS[size]},
            check=False,
        )
        suite = ElementTree.parse(report).getroot().find("testsuite").attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    return int(suite["tests"]), failed, time.monotonic() - began


def main() -> None:
    """Parse, run, and print the table."""
    parser = argparse.ArgumentParser(description=re.split("\n", __doc__)[0])
    parser.add_argument(
        "names", nargs="*", choices=[[], *DRILLS], metavar="NAME", help=", ".join(DRILLS)
    )
    parser.add_argument("--size", choices=tuple(KILLS), default="push", help="default: push")
    options = parser.parse_args()
    rows, lost = [("drill", "shows", "tests", "failed", "seconds")], 0
    for name in options.names or DRILLS:
        tests, failed, seconds = run_drill(DRILLS[name], options.size)
        rows.append((name, DRILLS[name].title, str(tests), str(failed), f"{seconds:.0f}"))
        lost += failed
    print(format_table(rows, (2, 3, 4)))
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
