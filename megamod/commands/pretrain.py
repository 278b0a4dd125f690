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

from dataclasses import fields
from pathlib import Path

from megamod.args import (
    MIXTURE_FLAGS,
    DataArgs,
    LoraArgs,
    ModelArgs,
    MuxArgs,
    OptimArgs,
    RunArgs,
    SafetyArgs,
)
from megamod.errors import run_main
from megamod.flags import parse_args, refuse_values_without_effect, require_values


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


def refuse_pretraining_flags_without_effect(
    model: ModelArgs, lora: LoraArgs, mux: MuxArgs, data: DataArgs, optim: OptimArgs
) -> None:
    """Refuse flags of a pretraining run that have no effect together with its other flags.

    Args:
        model: with `lora`, `mux`, `data` and `optim` the flags of megamod pretrain.
    Raises:
        UserError: for such a flag whose value is not the default.
    """
    causal, plain = mux.objective == "causal_lm", mux.num_instances == 1
    named_size = "/" not in model.model and not Path(model.model).is_dir()
    if named_size:
        refuse_values_without_effect(
            model, ("from_scratch",), f"--model is {model.model}, which has no weights"
        )
    if model.init_from is not None:
        refuse_values_without_effect(model, ("from_scratch",), f"--init_from is {model.init_from}")
    if causal:
        names = [f.name for f in fields(mux) if f.name != "objective"]
        refuse_values_without_effect(
            mux, names, "it belongs to encoders, and --objective is causal_lm"
        )
    else:
        reason = f"--objective {mux.objective} trains an encoder"
        names = ("untie", "attn_implementation", "vocab_multiple", "anchor", *MIXTURE_FLAGS)
        refuse_values_without_effect(model, names, reason)
        refuse_values_without_effect(lora, ("lora_rank",), reason)
        refuse_values_without_effect(data, ("domain_token", "mask_documents"), reason)
        refuse_values_without_effect(optim, ("optim",), reason)
    if plain:
        names = ("muxing_variant", "demuxing_variant", "num_hidden_demux_layers", "learn_muxing")
        names += ("unmixed_layers", "task_loss_coeff")
        refuse_values_without_effect(mux, names, "--num_instances is 1")
    if mux.demuxing_variant == "index":
        refuse_values_without_effect(
            mux, ("num_hidden_demux_layers",), "--demuxing_variant is index"
        )
    if mux.objective != "replaced_token":
        names = ("disc_loss_weight", "generator_size", "gen_loss_weight")
        refuse_values_without_effect(mux, names, "--objective is not replaced_token")
    if mux.objective == "distillation":
        names = ("task_loss_coeff", "retrieval_loss_coeff", "mlm_probability")
        refuse_values_without_effect(mux, names, "--objective is distillation")
    else:
        refuse_values_without_effect(mux, ("teacher",), "--objective is not distillation")
    if mux.generator == "none" and named_size:  # a folder may hold one
        refuse_values_without_effect(
            mux, ("generator_size", "gen_loss_weight"), "--generator is none"
        )
    if data.sampler != "temperature":
        refuse_values_without_effect(data, ("alpha",), f"--sampler is {data.sampler}")


if __name__ == "__main__":
    run_main(main)
