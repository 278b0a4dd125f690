"""Branch-Train-Merge: train a seed, branch an expert per domain from it, write the forest.

    megamod btm launchers/recipes/btm_quick.yaml --output_dir runs/btm
    megamod btm launchers/recipes/modern/btm_125m.yaml --hostfile hostfile \\
        --data DATABIN --deepspeed ds_configs/zero1_bf16.json --output_dir OUT
    megamod btm RECIPE.yaml --data DATABIN --output_dir OUT --dry_run
    megamod btm RECIPE.yaml --data DATABIN --output_dir OUT \\
        --rounds "law med" "code tax" --topk 2 --average true --evaluate true

The recipe is one of megamod pretrain, with the flags that this help lists first. Each expert
is a separate job on its own GPUs and restarts alone after a crash. The same command resumes after
the driver was stopped or killed. OUT/forest.json lists the finished experts, OUT/logs has the
output of each job. docs/btm.md explains rounds, slots and restarts.
"""

from pathlib import Path

from megamod.args import DataArgs, LoraArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.btm.campaign import BtmArgs
from megamod.btm.driver import run_campaign
from megamod.errors import run_main
from megamod.flags import parse_args


def main() -> None:
    """Parse the flags, run all jobs, and print the path of the forest.

    Raises:
        UserError, PolicyStop, DistributedFailure, Interrupted: as `run_campaign`.
    """
    kinds = (BtmArgs, RunArgs, SafetyArgs, ModelArgs, LoraArgs, OptimArgs, DataArgs)
    parsed = parse_args(*kinds, doc=__doc__)
    run_campaign(parsed, Path(__file__).resolve().parent)


if __name__ == "__main__":
    run_main(main)
