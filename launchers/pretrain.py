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

from megamod.args import DataArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs, parse_args, require
from megamod.errors import run

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def main() -> None:
    """Parse, build, train, evaluate, and say where everything is."""
    parsed = parse_args(RunArgs, SafetyArgs, ModelArgs, OptimArgs, DataArgs, doc=__doc__)
    run_args, safety, model_args, optim, data_args = parsed
    require(run_args, "output_dir")
    require(data_args, "data")
    # Only now the heavy imports, so that --help and mistakes in flags answer at once.
    import torch.distributed as dist

    from megamod.data.lm import train_loader
    from megamod.data.pretraining import LmData
    from megamod.dist.process import init_process
    from megamod.dist.scope import Sharing, sharing_of
    from megamod.dist.topology import DomainTopology
    from megamod.evaluation.perplexity import DENSE, DomainEvaluation, own_scores
    from megamod.evaluation.report import write_report
    from megamod.models.auto import build_lm, lm_config
    from megamod.train import setup
    from megamod.train.checkpoint import Checkpoints, TrainState
    from megamod.train.engine import build_engine
    from megamod.train.export import ModelExport, publish
    from megamod.train.loop import train
    from megamod.train.objectives import CausalLM

    # What a user can get wrong is looked at before any process waits for another.
    setup.start_logging()
    output = Path(run_args.output_dir)
    data = LmData(
        data_args.data,
        domains=data_args.domains,
        block_size=data_args.max_seq_length,
        domain_token=data_args.domain_token,
    )
    sharing = sharing_of(model_args.untie)
    topology = DomainTopology(setup.started_world_size(), data.domains, sharing)
    rank, apart = setup.started_rank(), sharing is not Sharing.DENSE
    held = topology.domains_of(rank)
    part, parts = topology.group_rank(rank), len(topology.ranks_of(held[0]))
    config = lm_config(
        model_args.model,
        vocab_size=data.vocab_size,
        special_ids=data.special_ids,
        domains=data.domains,
        untie=model_args.untie,
        max_positions=data_args.max_seq_length,
        attn_implementation=model_args.attn_implementation,
        overrides={name: getattr(model_args, name) for name in SHAPE},
    )
    ds_config = setup.engine_config(run_args, safety, optim, topology, config.hidden_size)
    plan = setup.make_plan(run_args, safety, optim, topology)
    global_batch = run_args.per_device_train_batch_size * plan.micro_steps * topology.world_size
    batches = data.train_batches(
        sampler=data_args.sampler,
        alpha=data_args.alpha,
        seed=run_args.seed,
        micro_batch=run_args.per_device_train_batch_size,
        global_batch=global_batch,
        rank=part,
        ranks=parts,
        held=held if apart else None,
    )

    device = init_process(safety.dist_timeout)
    setup.check_agreement({"the run": repr(parsed), "the data": data.digest})
    table = setup.group_table(topology, device)
    if rank == 0:
        print(table, flush=True)
    if safety.print_groups:
        return
    model = build_lm(
        config,
        seed=run_args.seed,
        init_from=model_args.init_from,
        local_domains=held if sharing is Sharing.DEMIX else None,
    )
    if model_args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    engine = build_engine(
        model,
        setup.optimizer_maker(optim),
        ds_config,
        topology,
    )
    export = ModelExport(
        engine, config, topology, data.tokenizer_folder, output / "run.yaml", data.digest
    )
    checkpoints = Checkpoints(
        output / "checkpoints",
        engine,
        topology,
        export,
        setup.settings_to_keep(parsed, data.digest, global_batch),
        run_args.save_total_limit,
    )
    state = checkpoints.resume(safety.resume) or TrainState()
    setup.record_run(output, ds_config, parsed)
    evaluate = DomainEvaluation(
        model=engine.module,
        experts=topology.domains if apart else (DENSE,),
        held=held if apart else (DENSE,),
        choose=sharing is Sharing.DEMIX,
        domains=data.domains,
        batches=lambda domain: data.eval_batches(
            domain,
            data_args.eval_split,
            run_args.per_device_eval_batch_size,
            run_args.eval_batches,
        ),
        bytes_of=lambda domain: (
            0 if run_args.eval_batches else data.bytes_of(domain, data_args.eval_split)
        ),
        part=part,
        parts=parts,
        device=device,
        reduce=dist.all_reduce,
    )
    monitor = setup.make_monitor(run_args, data.domains, engine, config, topology, state.step)
    state = train(
        engine,
        CausalLM(data.domains, device, choose=sharing is Sharing.DEMIX),
        lambda step: train_loader(
            batches,
            step,
            data_args.dataloader_num_workers,
            pin_memory=device.type == "cuda",
        ),
        plan,
        state,
        checkpoints,
        monitor,
        lambda step: monitor.evaluated(
            step,
            {d: s.perplexity for d, s in own_scores(evaluate(own_only=True)).items()},
            data_args.eval_split,
        ),
    )
    matrix = evaluate()
    publish(export, output / "model")
    if rank == 0:
        monitor.close()
        print(write_report(output, matrix, data_args.eval_split, state.step))


if __name__ == "__main__":
    run(main)
