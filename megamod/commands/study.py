"""Run a study, a matrix of runs, and make its table: arms x rungs x seeds from one file.

    megamod study ladder_1k --inputs DATA
    megamod study ladder_1k --inputs DATA --jobs 2
    megamod study ladder_1k --inputs DATA --cells dense.t80.s1 demix.t80.s1
    megamod study ladder_1k --inputs DATA --cells dense.t80.s1 --repeat true
    megamod study mine/study.yaml --inputs DATA --evidence mine/evidence
    megamod study ladder_1k --table true --document docs/results.md README.md
    megamod study ladder_1k --list true

A study is a YAML file, or the name of one in launchers/recipes/studies. DATA has the folders
domains (with a folder of train, valid and test files each) and glue, ner, pos. Every run leaves
a small JSON file in docs/evidence/NAME, and a run that has one is not made again. --repeat runs a
cell anew and compares its scores with the kept ones. docs/studies.md tells more.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megamod.errors import UserError, run_main
from megamod.flags import Arguments, option, parse_args, require_values
from megamod.shipped_files import find_shipped_folder

STUDIES = find_shipped_folder("launchers/recipes") / "studies"
EVIDENCE = Path("docs") / "evidence"


@dataclass
class StudyArgs(Arguments):
    """Study, selected runs and output."""

    study: str | None = option(None, "name or YAML file; may come first without the flag")
    inputs: str | None = option(None, "folder with the folders domains, glue, ner, pos")
    cells: list[str] | None = option(  # noqa: RUF009
        None, "runs to make, ARM.RUNG.sSEED each; none: all"
    )
    jobs: int = option(1, "processes that make runs at the same time, a thread each", least=1)
    work_dir: str | None = option(None, "folder of models and logs; none: runs/studies/NAME")
    evidence: str | None = option(None, "folder of the JSON files; none: docs/evidence/NAME")
    repeat: bool = option(False, "make --cells anew and compare with their kept scores")
    table: bool = option(False, "make the table of what there is, and run nothing")
    document: list[str] | None = option(  # noqa: RUF009
        None, "Markdown files in which to replace the study's table and cells between markers"
    )
    plot: str | None = option(None, "PNG file of ratios to write")
    list: bool = option(False, "print the runs and their settings, and run nothing")


def main() -> None:
    """Parse the flags, run the cells that are missing, and print the table.

    With --list the cells are printed alone, with --table nothing is run, and with --repeat
    differences are printed in place of the table.

    Raises:
        UserError: for a study, cell or document that does not exist, or as `run_missing_cells` and
            `report_figures`.
    """
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--study", *arguments]
    (args,) = parse_args(StudyArgs, argv=arguments, doc=__doc__)
    require_values(args, "study")
    path = find_study_file(args.study)
    for document in args.document or ():
        if not Path(document).is_file():
            raise UserError(f"--document {document}: there is no such file")

    from megamod.runs.studies.study_file import read_study

    study = read_study(path)
    cells = [study.find_cell(name) for name in args.cells] if args.cells else list(study.cells)
    if args.list:
        for cell in cells:
            settings = ", ".join(f"{name} {value}" for name, value in cell.settings.items())
            print(f"{cell.name}: {settings}")
        return
    evidence = Path(args.evidence) if args.evidence else EVIDENCE / study.name
    if not args.table:
        run_missing_cells(args, study, cells, evidence)
    if not args.repeat:
        report_figures(args, study, evidence)


def find_study_file(name: str) -> Path:
    """Find the file of a study: `name` as a path, else the study of that name in `STUDIES`.

    Raises:
        UserError: if there is none.
    """
    for path in (Path(name), STUDIES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in STUDIES.glob("*.yaml")))
    raise UserError(f"--study {name}: is no file and none of {known}")


def run_missing_cells(args: StudyArgs, study, cells: list, evidence: Path) -> None:
    """Run the cells that have no figures yet; with --repeat run --cells again, print differences.

    With --jobs above 1 they run in processes of this command.

    Args:
        study: a `Study`, see `read_study`.
        cells: selected cells of the study.
        evidence: folder of the files of figures, which are written there except with --repeat.
    Raises:
        UserError: if --inputs is missing or no folder, --repeat lacks --cells, or cells fail.
    """
    require_values(args, "inputs")
    if not Path(args.inputs).is_dir():
        raise UserError(f"--inputs {args.inputs}: there is no such folder")
    if args.repeat and not args.cells:
        raise UserError("--repeat: name the runs with --cells")

    from megamod.runs.node_log import start_logging
    from megamod.runs.studies.study import (
        StudyFolders,
        repeat_cell,
        run_cells,
        run_cells_in_processes,
    )

    start_logging()
    work = Path(args.work_dir) if args.work_dir else Path("runs") / "studies" / study.name
    folders = StudyFolders(Path(args.inputs), work, evidence)
    if args.repeat:
        for cell in cells:
            with tempfile.TemporaryDirectory() as again:
                print(repeat_cell(study, cell, folders, Path(again)))
    elif args.jobs == 1:
        run_cells(study, cells, folders)
    else:
        arguments = [__file__, *sys.argv[1:], "--jobs", "1"]
        run_cells_in_processes(study, cells, folders, arguments, args.jobs)


def report_figures(args: StudyArgs, study, evidence: Path) -> None:
    """Print the table of the figures in `evidence`; write it into --document and draw --plot.

    Args:
        study: a `Study`, see `read_study`.
        evidence: folder of the files of figures.
    Raises:
        UserError: if a file of figures does not fit the study, or a document lacks a marker's end.
    """
    from megamod.files import write_atomic
    from megamod.runs.studies.report import fill_document, format_markdown, plot_study, read_records

    records = read_records(study, evidence)
    print(format_markdown(study, records))
    for document in map(Path, args.document or ()):
        text = document.read_text(encoding="utf-8")
        write_atomic(document, fill_document(text, {study.name: (study, records)}))
    if args.plot is not None and not plot_study(study, records, Path(args.plot)):
        print(f"nothing to draw in {args.plot} yet")


if __name__ == "__main__":
    run_main(main)
