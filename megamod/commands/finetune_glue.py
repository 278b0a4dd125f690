"""Finetune, score and predict on sentence tasks: GLUE, SICK-E, SNLI, or any from a file.

    megamod finetune-glue --task sst-2 --data_dir GLUE --model MODEL \\
        --do_train --do_eval --do_predict --output_dir runs/sst2
    megamod finetune-glue --task rte --data_dir GLUE --config_name bert_tiny \\
        --tokenizer_name TOKENIZER --seeds 1 2 3 --do_train --do_eval --output_dir runs/rte
    deepspeed launchers/finetune_glue.py --task mnli --data_dir GLUE --model MUX_MODEL \\
        --num_instances 5 --deepspeed ds_configs/zero1_bf16.json --max_steps 100000 \\
        --eval_steps 5000 --do_train --do_eval --output_dir runs/mnli
    megamod finetune-glue --task_spec reviews.yaml --model runs/reviews/model \\
        --do_eval --output_dir runs/reviews-scored

MODEL is a folder or a name on the hub: a stock encoder, or a multiplexed one with N rows in a
forward pass. GLUE is the folder of the official files. The same command resumes an interrupted
run. OUT/model is the best model by the task's first metric on dev, OUT/results.json has the scores
and OUT/predictions the files for the GLUE server. See docs/finetuning.md.
"""

from megamod.args import SafetyArgs
from megamod.errors import run_main
from megamod.flags import parse_args, require_values
from megamod.runs.finetune.args import FinetuneOptimArgs, FinetuneRunArgs, OneTaskArgs, TaskArgs


def main() -> None:
    """Parse the flags, train, score and predict.

    Raises:
        UserError: if --output_dir is missing.
        UserError, PolicyStop, Interrupted: as `megamod.runs.finetune.run.finetune`.
    """
    parsed = parse_args(
        FinetuneRunArgs, SafetyArgs, FinetuneOptimArgs, OneTaskArgs, TaskArgs, doc=__doc__
    )
    require_values(parsed[0], "output_dir")
    # Imported late, so that --help and errors in flags answer at once.
    from megamod.runs.finetune.one_task import prepare_one_task_model
    from megamod.runs.finetune.run import finetune
    from megamod.runs.node_log import start_logging

    start_logging()
    finetune(prepare_one_task_model(*parsed[3:]), parsed)


if __name__ == "__main__":
    run_main(main)
