"""What every training launcher does between its arguments and its loop."""

import logging
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megamod.args import Arguments, OptimArgs, RunArgs, SafetyArgs, origin_of, save_run
from megamod.dist.ds_config import check_sharing, resolve_ds_config
from megamod.dist.process import control, gather_text
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.files import write_json
from megamod.train.loop import Plan
from megamod.train.monitor import write_environment
from megamod.train.optim import SCHEDULES

DS_KEYS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_batch_size": "global_batch_size",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
}
"""Keys of a DeepSpeed file that say the same as one of our fields."""


def start_logging() -> None:
    """Rank 0 at INFO, the others at WARNING; libraries at WARNING."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("megamod").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for name in ("DeepSpeed", "deepspeed", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)


def micro_steps(run: RunArgs, topology: DomainTopology) -> int:
    """Micro-batches of a rank in a step.

    Without --global_batch_size, --gradient_accumulation_steps counts micro-batches per domain, so
    that a rank with several domains takes that many of each.
    """
    held = 1 if topology.sharing is Sharing.DENSE else len(topology.domains_of(0))
    if run.global_batch_size is None:
        return held * run.gradient_accumulation_steps
    return run.accumulation(topology.world_size)


def engine_config(
    run: RunArgs,
    safety: SafetyArgs,
    optim: OptimArgs,
    topology: DomainTopology,
    hidden_size: int,
) -> dict[str, object]:
    """The DeepSpeed configuration of a run: the file, its "auto" resolved, checked.

    Raises:
        UserError: see `resolve_ds_config` and `check_sharing`.
    """
    steps = micro_steps(run, topology)
    ranks = (
        topology.ranks_per_domain if topology.sharing is Sharing.BTM else topology.world_size
    )
    values = {
        "train_micro_batch_size_per_gpu": run.per_device_train_batch_size,
        "gradient_accumulation_steps": steps,
        "train_batch_size": run.per_device_train_batch_size * steps * ranks,
        "gradient_clipping": optim.max_grad_norm,
        "optimizer.params.lr": optim.learning_rate,
        "optimizer.params.betas": [optim.adam_beta1, optim.adam_beta2],
        "optimizer.params.eps": optim.adam_epsilon,
        "optimizer.params.weight_decay": optim.weight_decay,
        "bf16.enabled": run.precision == "bf16",
        "fp16.enabled": run.precision == "fp16",
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }
    origins = {
        key: origin
        for key, field in DS_KEYS.items()
        for args in (run, optim)
        if hasattr(args, field) and (origin := origin_of(args, field)) != "default"
    }
    config = resolve_ds_config(
        safety.deepspeed, values, origins, allow_unknown=safety.allow_unknown_ds_keys
    )
    check_sharing(config, topology.sharing.value, topology.world_size)
    return config


def make_plan(run: RunArgs, safety: SafetyArgs, optim: OptimArgs, topology: DomainTopology) -> Plan:
    """The numbers that the loop needs.

    Raises:
        UserError: if the policy cannot be had with independent models.
    """
    if safety.nonfinite == "rollback" and topology.sharing is Sharing.BTM:
        raise UserError(
            "--nonfinite rollback: independent models (--untie all) cannot be rolled back one by "
            "one; use skip or stop, or one job per domain"
        )
    warmup = optim.warmup_steps
    if warmup is None:
        warmup = int(run.max_steps * optim.warmup_ratio + 1e-9)
    return Plan(
        max_steps=run.max_steps,
        stop_step=run.max_steps if run.stop_step is None else min(run.stop_step, run.max_steps),
        micro_steps=micro_steps(run, topology),
        schedule=SCHEDULES[optim.lr_scheduler_type](optim.learning_rate, warmup, run.max_steps),
        max_grad_norm=optim.max_grad_norm,
        logging_steps=run.logging_steps,
        eval_steps=run.eval_steps,
        save_steps=run.save_steps,
        seed=run.seed,
        nonfinite=safety.nonfinite,
        spike_factor=safety.spike_factor,
        save_failure=safety.save_failure,
    )


def group_table(topology: DomainTopology, device: torch.device) -> str:
    """Who does what: rank, host, device, domains and groups; collective."""
    hosts = gather_text(os.uname().nodename)
    return topology.table(hosts, gather_text(str(device)))


def record_run(folder: Path, config: Mapping[str, object], parsed: Sequence[Arguments]) -> None:
    """Leave the resolved run, DeepSpeed configuration and environment in the output folder."""
    save_run(folder / "run.yaml", *parsed)
    write_json(folder / "ds_config.resolved.json", config)
    write_environment(folder / "env.json")


def check_agreement(facts: Mapping[str, str]) -> None:
    """All ranks must have been started for the same run; collective.

    Args:
        facts: name -> text; equal on all ranks if all is well.
    Raises:
        UserError: on every rank, naming what differs.
    """
    digests = control([float(zlib.crc32(text.encode())) for text in facts.values()])
    lowest, highest = digests.clone(), digests.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    differing = [
        name for name, low, high in zip(facts, lowest.tolist(), highest.tolist(), strict=True)
        if low != high
    ]
    if differing:
        raise UserError(
            f"the ranks disagree about {', '.join(differing)}: start all of them with the same "
            "recipe, flags, code and data"
        )

