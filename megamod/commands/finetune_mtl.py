"""Finetune one BERT on many tasks at once: CA-MTL, or plain multi-task learning.

    megamod finetune-mtl --tasks cola mrpc sst-2 --data_dir GLUE --model BERT \\
        --do_train --do_eval --do_predict --output_dir runs/three
    deepspeed launchers/finetune_mtl.py --data_dir GLUE --model CA-MTL-base \\
        --use_mt_uncertainty --freeze_encoder_layers 0-5 --per_device_train_batch_size 32 \\
        --learning_rate 2e-5 --num_train_epochs 5 --do_train --do_eval --output_dir runs/glue
    megamod finetune-mtl --tasks sst-2 wnut17 reviews.yaml --data_dir GLUE NER \\
        --model BERT --variant plain --mt_sampling temperature --seeds 1 2 3 --do_train --do_eval \\
        --output_dir runs/mixed
    megamod finetune-mtl --model runs/glue/model --data_dir GLUE --do_predict \\
        --output_dir runs/glue-answers

BERT is a folder or a name on the hub. The default of --tasks is the nine of GLUE; GLUE is the
folder of the official files. The same command resumes an interrupted run. OUT/model is the best
model by the mean score of all tasks on dev, OUT/results.json has the scores, OUT/predictions the
files for the GLUE server, OUT/task_shares.png the share of each task among the rows. See
docs/multitask.md.
"""

from megamod.args import SafetyArgs
from megamod.errors import run_main
from megamod.flags import parse_args, require_values
from megamod.runs.finetune.args import (
    FinetuneOptimArgs,
    FinetuneRunArgs,
    ManyTasksArgs,
    TaskListArgs,
)


def main() -> None:
    """Parse the flags, train, score and predict.

    Raises:
        UserError: if --output_dir is missing.
        UserError, PolicyStop, Interrupted: as `megamod.runs.finetune.run.finetune`.
    """
    parsed = parse_args(
        FinetuneRunArgs, SafetyArgs, FinetuneOptimArgs, ManyTasksArgs, TaskListArgs, doc=__doc__
    )
    require_values(parsed[0], "output_dir")
    # Imported late, so that --help and errors in flags answer at once.
    from megamod.runs.finetune.many_tasks import prepare_many_tasks_model
    from megamod.runs.finetune.run import finetune
    from megamod.runs.node_log import start_logging

    start_logging()
    finetune(prepare_many_tasks_model(*parsed[3:]), parsed)


if __name__ == "__main__":
    run_main(main)
