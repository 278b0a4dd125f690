"""Adapt an expert of a forest, or a dense model, to a new domain (DAPT, expert addition).

    megamod adapt --forest runs/demix/model --data DATABIN --domain novel \\
        --max_steps 1000 --global_batch_size 128 --output_dir runs/novel
    deepspeed launchers/adapt.py --forest forest.json --data DATABIN --domain novel \\
        --method full --start law --deepspeed ds_configs/zero2_bf16.json --output_dir runs/novel
    torchrun --nproc_per_node 2 launchers/adapt.py --model runs/dense/model --data DATABIN \\
        --domain novel --method full --output_dir runs/novel

The expert to start from is the one that the posterior on the new domain's valid split favours.
With --method feedforward only feed-forward networks are trained: a model with experts (DEMix) gets
one more expert in OUT/model, and its other experts stay bit-equal. Otherwise OUT/model is a whole
dense model. Both are added to the forest; docs/adaptation.md explains where. The same
command resumes an interrupted run.
"""

from megamod.args import RunArgs, SafetyArgs
from megamod.errors import UserError, run_main
from megamod.flags import parse_args, require_values
from megamod.runs.pretrain.adapt_args import AdaptArgs, AdaptOptimArgs


def main() -> None:
    """Parse the flags, adapt the expert, and print scores and output paths.

    Raises:
        UserError: if a flag is missing.
        UserError, PolicyStop, Interrupted: as `megamod.runs.pretrain.adapt.adapt`.
    """
    parsed = parse_args(RunArgs, SafetyArgs, AdaptOptimArgs, AdaptArgs, doc=__doc__)
    args = parsed[-1]
    require_values(parsed[0], "output_dir")
    require_values(args, "data", "domain")
    if args.forest is None and args.model is None:
        raise UserError("--forest is missing, or --model: what to start from")
    # Imported late, so that --help and errors in flags answer at once.
    from transformers.utils.logging import disable_progress_bar

    from megamod.runs.node_log import start_logging
    from megamod.runs.pretrain.adapt import adapt

    start_logging()
    disable_progress_bar()
    adapt(*parsed)


if __name__ == "__main__":
    run_main(main)
