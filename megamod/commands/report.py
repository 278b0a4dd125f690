"""Write one HTML page about runs: curves, scores, experts, settings; it needs no network.

    megamod report runs/demix --output demix.html
    megamod report runs/dense runs/demix runs/btm --output all.html
    megamod report runs/sweep runs/barrier mixed.json --output studies.html

A RUN is the output folder of megamod pretrain, adapt, btm, finetune-glue, finetune-ner,
finetune-mtl, finetune-all or eval-barrier, or a file of megamod eval-ensemble --output. The page
shows what they have: losses, perplexity by expert and domain, posterior and load of the experts,
score against throughput, barriers, and the settings and environments side by side with differences
marked. docs/reports.md describes it.
"""

from pathlib import Path

from megamod.command_line import CommandParser
from megamod.errors import UserError, run_main


def main() -> None:
    """Parse the command line and write the page.

    Raises:
        UserError: if a run or the folder of the page does not exist.
    """
    parser = CommandParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="page to write (report.html)"
    )
    options = parser.parse_args()
    for path in options.runs:
        if not path.exists():
            raise UserError(f"{path}: there is no such run")
    if not options.output.absolute().parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.parent}")
    from megamod.evaluation.run_report import write_run_report

    sections = write_run_report(options.runs, options.output)
    print(f"{options.output}: {', '.join(sections)}")


if __name__ == "__main__":
    run_main(main)
