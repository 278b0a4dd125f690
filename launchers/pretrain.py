"""Pretrain a language model: dense, with domain experts (DEMix), or one per domain (BTM).

    deepspeed launchers/pretrain.py launchers/recipes/quickstart.yaml \\
        --deepspeed ds_configs/cpu_smoke.json --output_dir runs/first
    deepspeed launchers/pretrain.py launchers/recipes/demix_125m_d8.yaml --data DATABIN \\
        --deepspeed ds_configs/demix_zero2_bf16.json --output_dir runs/demix
    torchrun --nproc_per_node 2 launchers/pretrain.py RECIPE.yaml --output_dir OUT
    python launchers/pretrain.py RECIPE.yaml --output_dir OUT      (one process)

The same command resumes an interrupted run. DATABIN comes from launchers/preprocess.py.
"""

from megamod.args import DataArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs, parse_args, require
from megamod.errors import run


def main() -> None:
    """Parse, train, and say where everything is."""
    parsed = parse_args(RunArgs, SafetyArgs, ModelArgs, OptimArgs, DataArgs, doc=__doc__)
    require(parsed[0], "output_dir")
    require(parsed[-1], "data")
    # Only now the heavy imports, so that --help and mistakes in flags answer at once.
    from megamod.runs.causal_lm import pretrain
    from megamod.train.setup import start_logging

    start_logging()
    pretrain(*parsed)


if __name__ == "__main__":
    run(main)
