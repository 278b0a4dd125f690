"""Finetune many models on many tasks: one file, one command, one table and one plot.

    megamod finetune-all SWEEP.yaml --output_dir runs/all
    megamod finetune-all SWEEP.yaml --output_dir runs/all --jobs 2
    megamod finetune-all SWEEP.yaml --output_dir runs/all --dry_run

    common: {data_dir: GLUE, max_steps: 1000, do_train: true, do_eval: true}
    tasks:
      sst-2: {max_steps: 20000}
      wnut17: {launcher: ner, data_dir: NER}
    models:
      plain: {model: runs/bert/model}
      mux: {model: "runs/mux-{N}/model", num_instances: [2, 5, 10]}
    seeds: [1, 2, 3]

Flags are those of finetune_glue.py, finetune_ner.py and finetune_mtl.py (launcher: glue, ner or
mtl). Each run has a folder with its log; the same command resumes and runs only what is missing.
summary.json, scores.png and trade_off.png are written at the end.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from megamod.errors import UserError, run_main
from megamod.flags import Arguments, option, parse_args, require_values


@dataclass
class SweepArgs(Arguments):
    """Sweep file and output."""

    sweep: str | None = option(None, "YAML file of the runs; may come first without the flag")
    output_dir: str | None = option(None, "folder of all runs and of their table")
    jobs: int = option(1, "runs at the same time", least=1)
    dry_run: bool = option(False, "print the commands only")


def main() -> None:
    """Parse the flags, run the missing jobs and print the table; with --dry_run only the commands.

    Raises:
        UserError: if a flag is missing, --output_dir is a file, or as `read_sweep`, `lock_folder`
            and `run_sweep`.
    """
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--sweep", *arguments]
    (args,) = parse_args(SweepArgs, argv=arguments, doc=__doc__)
    require_values(args, "sweep", "output_dir")
    from megamod.folder_lock import lock_folder
    from megamod.runs.node_log import start_logging
    from megamod.runs.studies.sweep import read_sweep, run_sweep

    jobs, launch = read_sweep(Path(args.sweep))
    here, output = Path(__file__).resolve().parent, Path(args.output_dir)
    if args.dry_run:
        for job in jobs:
            program = str(here / f"finetune_{job.launcher}.py")
            print(shlex.join([*(launch or ["python"]), program, *job.list_arguments(output)]))
        return
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output}: not a folder")
    start_logging()
    with lock_folder(output):
        print(run_sweep(jobs, output, here, args.jobs, launch))


if __name__ == "__main__":
    run_main(main)
