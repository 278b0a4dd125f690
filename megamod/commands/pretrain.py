"""Pretrain a language model (dense, DEMix, independent experts) or an encoder (BERT, MUX-PLM).

    deepspeed launchers/pretrain.py launchers/recipes/quickstart.yaml \\
        --deepspeed ds_configs/cpu_smoke.json --output_dir runs/first
    deepspeed launchers/pretrain.py launchers/recipes/modern/demix_125m_d8.yaml --data DATABIN \\
        --deepspeed ds_configs/demix_zero2_bf16.json --output_dir runs/demix
    torchrun --nproc_per_node 2 launchers/pretrain.py RECIPE.yaml --output_dir OUT
    megamod pretrain RECIPE.yaml --output_dir OUT      (one process)
    megamod pretrain --objective masked_lm --model small --num_instances 5 \\
        --per_device_train_batch_size 40 --max_seq_length 128 --task_loss_coeff 0 \\
        --retrieval_loss_coeff 1 --data DATABIN --output_dir runs/warm-up

The same command resumes an interrupted run. DATABIN comes from megamod preprocess.
"""

from megamod.args import (
    DataArgs,
    LoraArgs,
    ModelArgs,
    MuxArgs,
    OptimArgs,
    RunArgs,
    SafetyArgs,
    refuse_pretraining_flags_without_effect,
)
from megamod.errors import run_main
from megamod.flags import parse_args, require_values


def main() -> None:
    """Parse the flags, train, and print scores and output paths.

    Raises:
        UserError: for flags that are missing or have no effect together.
        UserError, PolicyStop, Interrupted: as `pretrain_causal_lm` and `pretrain_encoder`.
    """
    run, safety, model, lora, optim, mux, data = parse_args(
        RunArgs, SafetyArgs, ModelArgs, LoraArgs, OptimArgs, MuxArgs, DataArgs, doc=__doc__
    )
    require_values(run, "output_dir")
    require_values(data, "data")
    refuse_pretraining_flags_without_effect(model, lora, mux, data, optim)
    # Imported late, so that --help and errors in flags answer at once.
    from megamod.runs.node_log import start_logging

    start_logging()
    if mux.objective == "causal_lm":
        from megamod.runs.pretrain.causal_lm import pretrain_causal_lm

        pretrain_causal_lm(run, safety, model, lora, optim, data)
    else:
        from megamod.runs.pretrain.encoder_lm import pretrain_encoder

        pretrain_encoder(run, safety, model, optim, mux, data)


if __name__ == "__main__":
    run_main(main)
