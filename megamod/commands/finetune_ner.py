"""Finetune, score and predict labels per word: entities or parts of speech, in CoNLL files.

    megamod finetune-ner --task wnut17 --data_dir NER --model MODEL \\
        --do_train --do_eval --do_predict --output_dir runs/wnut17
    megamod finetune-ner --task pos --data_dir POS/ud_ewt --model MUX_MODEL \\
        --num_instances 2 --seeds 1 2 3 --do_train --do_eval --output_dir runs/pos
    megamod finetune-ner --task any --data_dir FOLDER --label_column 3 \\
        --config_name bert_tiny --tokenizer_name TOKENIZER --do_train --do_eval --output_dir OUT

The folder has train.txt, dev.txt and test.txt, one word per line, a blank line after each sentence,
or CoNLL-U files. Entities may be in IOB1, IOB2, IOBES or BILOU and are scored as in CoNLL; other
labels by accuracy. The first token of a word carries its label. The same command resumes an
interrupted run. OUT/model is the best model on dev, OUT/results.json has the scores. See
docs/finetuning.md.
"""

from megamod.args import SafetyArgs
from megamod.errors import run_main
from megamod.flags import parse_args, require_values
from megamod.runs.finetune.args import (
    FinetuneOptimArgs,
    FinetuneRunArgs,
    OneTaskArgs,
    TaskArgs,
    WordArgs,
)


def main() -> None:
    """Parse the flags, train, score and predict.

    Raises:
        UserError: if --output_dir is missing.
        UserError, PolicyStop, Interrupted: as `megamod.runs.finetune.run.finetune`.
    """
    parsed = parse_args(
        FinetuneRunArgs, SafetyArgs, FinetuneOptimArgs, OneTaskArgs, TaskArgs, WordArgs, doc=__doc__
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
