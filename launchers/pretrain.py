"""Pretrain a language model: dense, with domain experts (DEMix), or one per domain (BTM).

    deepspeed launchers/pretrain.py launchers/recipes/quickstart.yaml \\
        --deepspeed ds_configs/cpu_smoke.json --output_dir runs/first
    deepspeed launchers/pretrain.py launchers/recipes/demix_125m_d8.yaml --data DATABIN \\
        --deepspeed ds_configs/demix_zero2_bf16.json --output_dir runs/demix
    torchrun --nproc_per_node 2 launchers/pretrain.py RECIPE.yaml --output_dir OUT
    python launchers/pretrain.py RECIPE.yaml --output_dir OUT      (one process)

The same command resumes an interrupted run. DATABIN comes from launchers/preprocess.py.
"""

from pathlib import Path

from megamod.args import (
    DataArgs,
    ModelArgs,
    OptimArgs,
    RunArgs,
    SafetyArgs,
    parse_args,
    require,
)
from megamod.errors import run


def main() -> None:
    """Parse, build, train, evaluate, and say where everything is."""
    parsed = parse_args(RunArgs, SafetyArgs, ModelArgs, OptimArgs, DataArgs, doc=__doc__)
    run_args, safety, model_args, optim, data_args = parsed
    require(run_args, "output_dir")
    require(data_args, "data")
    # Only now the heavy imports, so that --help and mistakes in flags answer at once.
    import torch.distributed as dist

    from megamod.data.lm import DataBin, LmData
    from megamod.dist.process import init_process, rank, world_size
    from megamod.dist.scope import Sharing, sharing_of
    from megamod.dist.topology import DomainTopology
    from megamod.evaluation.perplexity import DomainEvaluation
    from megamod.models.auto import build_lm, lm_config
    from megamod.train import setup
    from megamod.train.checkpoint import Checkpoints, TrainState
    from megamod.train.engine import build_engine
    from megamod.train.export import ModelExport
    from megamod.train.loop import train
    from megamod.train.monitor import Monitor, peak_of
    from megamod.train.objectives import CausalLM
    from megamod.train.optim import adamw

    # Everything a user can get wrong is looked at before any process waits for another.
    setup.start_logging()
    data_bin = DataBin(Path(data_args.data))
    data = LmData(data_bin, data_args, run_args)
    sharing = sharing_of(model_args.untie)
    topology = DomainTopology(setup.environment_world_size(), data.domains, sharing)
    config = lm_config(
        model_args.model,
        vocab_size=data.vocab_size,
        special_ids=data_bin.special_ids,
        domains=data.domains,
        untie=model_args.untie,
        max_positions=data_args.max_seq_length,
        attn_implementation=model_args.attn_implementation,
        overrides={
            name: getattr(model_args, name)
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                         "intermediate_size")
        },
    )
    ds_config = setup.engine_config(run_args, safety, optim, topology, config.hidden_size)
    plan = setup.make_plan(run_args, safety, optim, topology)
