"""Loss barriers: losses on the straight line between models, as they are and aligned.

    megamod eval-barrier STUDY.yaml --output_dir runs/barrier

    models: {a: runs/seed-1/model, b: runs/seed-2/model, c: runs/seed-3/model}
    task: mlm
    data: valid.txt
    variants:
      vanilla: {method: identity}
      ff+attn: {groups: [ff, attn], calibration: {path: train.txt, fraction: 0.1}}
      all: {calibration: {path: train.txt, fraction: 0.1}}

task is mlm, clm (text files), or a task of finetune_glue.py or finetune_ner.py; then `data` is its
folder, and its train rows calibrate variants without a file. A list runs several tasks, and {task}
in a model's path is replaced by each. All pairs are compared, or those under `pairs`. The same
command resumes and computes only missing curves.
OUT/results.json has both definitions of the barrier by pair, their means and standard errors;
OUT/TASK.png (TASK_SPLIT.png of a task with several dev splits) the curves and OUT/barriers.png all
barriers. launchers/recipes/barrier_*.yaml are example studies; docs/merging.md explains them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamod.errors import UserError, run_main
from megamod.flags import Arguments, option, parse_args, require_values


@dataclass
class BarrierArgs(Arguments):
    """Study file and output."""

    study: str | None = option(None, "YAML file; may come first without the flag")
    output_dir: str | None = option(None, "folder of all curves, of the table and the plots")
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "device of the models; auto: a GPU if available"
    )


def main() -> None:
    """Parse the flags, compute the missing curves, and print the table.

    Raises:
        UserError: if a flag is missing, --output_dir is a file, the GPU is missing, or as
            `read_barrier_study`, `lock_folder` and `run_barrier_study`.
    """
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--study", *arguments]
    (args,) = parse_args(BarrierArgs, argv=arguments, doc=__doc__)
    require_values(args, "study", "output_dir")
    import torch

    from megamod.folder_lock import lock_folder
    from megamod.runs.node_log import start_logging
    from megamod.runs.studies.barrier import run_barrier_study
    from megamod.runs.studies.barrier_recipe import read_barrier_study

    study, output = read_barrier_study(Path(args.study)), Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output}: not a folder")
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch sees no GPU; use --device cpu")
    start_logging()
    device = torch.device("cuda" if has_gpu and args.device != "cpu" else "cpu")
    with lock_folder(output):
        print(run_barrier_study(study, output, device))


if __name__ == "__main__":
    run_main(main)
