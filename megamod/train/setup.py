"""What every training launcher does between its arguments and its loop."""

import logging
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from megamod.args import (
    Arguments,
    OptimArgs,
    RunArgs,
    SafetyArgs,
    follow_ds_values,
    origin_of,
    save_run,
)
from megamod.dist.ds_config import check_sharing, resolve_ds_config
from megamod.dist.process import adopt_rank, control, everywhere, gather_text
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.dist.wire import step_traffic
from megamod.errors import UserError
from megamod.files import write_json
from megamod.train.loop import Plan
from megamod.train.monitor import Monitor, peak_of, write_environment
from megamod.train.optim import SCHEDULES, adamw

logger = logging.getLogger(__name__)

DS_KEYS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_batch_size": "global_batch_size",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.betas": "adam_beta2",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
}
"""Keys of a DeepSpeed file that say the same as one of our fields."""


def started_world_size() -> int:
    """Number of ranks that the launcher announced; 1 for plain `python`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started_rank() -> int:
    """This process's rank as the launcher announced it; 0 for plain `python`."""
    return int(os.environ.get("RANK", "0"))


def start_logging() -> None:
    """Rank 0 at INFO, the others at WARNING; libraries at WARNING.

    Raises:
        UserError: if variables of srun or mpirun contradict each other, see `adopt_rank`.
    """
    adopt_rank()
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("megamod").setLevel(logging.INFO if started_rank() == 0 else logging.WARNING)
    for name in ("DeepSpeed", "deepspeed", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch is about to retire: nothing a user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


FREE_ON_RESUME = frozenset(
    (
        *("output_dir", "data", "init_from", "from_scratch", "resume", "deepspeed", "precision"),
        *("stop_step", "logging_steps", "eval_steps", "save_steps", "save_total_limit"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"),
        *("per_device_eval_batch_size", "eval_batches", "eval_split", "dataloader_num_workers"),
        *("nonfinite", "spike_factor", "save_failure", "dist_timeout", "report_to"),
        *("print_groups", "allow_unknown_ds_keys", "gradient_checkpointing"),
        *("attn_implementation", "torch_compile"),
    )
)
"""Fields that may differ when a run is resumed: they leave its numbers as they are, or (precision)
change their rounding only. The product of the batch sizes is compared apart."""


def held_domains(topology: DomainTopology) -> int:
    """Domains that a rank trains in turn: 1 where micro-batches are not tied to experts."""
    return 1 if topology.sharing is Sharing.DENSE else len(topology.domains_of(0))


def micro_steps(run: RunArgs, topology: DomainTopology) -> int:
    """Micro-batches of a rank in a step.

    Without --global_batch_size, --gradient_accumulation_steps counts micro-batches per domain, so
    that a rank with several domains takes that many of each.
    """
    if run.global_batch_size is None:
        return held_domains(topology) * run.gradient_accumulation_steps
    steps, held = run.accumulation(topology.world_size), held_domains(topology)
    if steps % held:
        at_once = run.per_device_train_batch_size * topology.world_size * held
        raise UserError(
            f"--global_batch_size {run.global_batch_size} is not a multiple of {at_once} = "
            f"--per_device_train_batch_size {run.per_device_train_batch_size} x "
            f"{topology.world_size} ranks x {held} domains of a rank"
        )
    return steps


def engine_config(
    run: RunArgs,
    safety: SafetyArgs,
    optim: OptimArgs,
    topology: DomainTopology,
    hidden_size: int,
) -> dict[str, object]:
    """The DeepSpeed configuration of a run: the file, its "auto" resolved, checked.

    Where the file says more than the defaults of `run` and `optim`, these are changed to follow it.

    Raises:
        UserError: see `resolve_ds_config` and `check_sharing`.
    """
    steps = micro_steps(run, topology)
    ranks = topology.ranks_per_domain if topology.sharing is Sharing.BTM else topology.world_size
    # Alone, a dense model gains nothing from ZeRO's flat buffers, which cost 4 % of a step.
    alone = topology.sharing is Sharing.DENSE and topology.world_size == 1
    plain = alone and safety.deepspeed is None and run.precision in (None, "fp32")
    values = {
        "zero_optimization.stage": 0 if plain else 1,
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
        "zero_optimization.offload_optimizer.nvme_path": str(offload_folder(run)),
    }
    origins = {
        key: origin
        for key, field in DS_KEYS.items()
        for args in (run, optim)
        if hasattr(args, field) and (origin := origin_of(args, field)) != "default"
    }
    resolved = resolve_ds_config(
        safety.deepspeed, values, origins, allow_unknown=safety.allow_unknown_ds_keys
    )
    follow_ds_values(
        run, optim, resolved.values, f"DeepSpeed {safety.deepspeed}", held_domains(topology)
    )
    check_sharing(resolved.config, topology.sharing, topology.world_size)
    return resolved.config


def offload_folder(run: RunArgs) -> Path:
    """Where an optimizer lives that is offloaded to "nvme", if the DeepSpeed file says "auto"."""
    return Path(run.output_dir or ".") / "offload"


def remove_offloaded(run: RunArgs, config: Mapping[str, object]) -> None:
    """Delete what an optimizer on a disk leaves behind, if it is in `offload_folder`; collective.

    Args:
        config: DeepSpeed's, resolved.
    """
    optimizer = config["zero_optimization"].get("offload_optimizer") or {}
    if optimizer.get("device") != "nvme" or optimizer["nvme_path"] != str(offload_folder(run)):
        return
    everywhere(True)  # nobody reads it any more
    shutil.rmtree(offload_folder(run), ignore_errors=True)


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
    if safety.nonfinite == "rollback" and run.precision == "fp16":
        raise UserError(
            "--nonfinite rollback has no effect with fp16, where a step that overflows is left out "
            "and the loss scale halved; use skip"
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


def optimizer_maker(optim: OptimArgs) -> Callable[[list[dict[str, object]]], torch.optim.Optimizer]:
    """From parameter groups to the optimizer that the flags describe."""
    return partial(
        adamw,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
    )


def record_run(folder: Path, config: Mapping[str, object], parsed: Sequence[Arguments]) -> None:
    """Leave the resolved run, DeepSpeed configuration and environment in the folder; collective.

    Raises:
        UserError: on every rank, if the folder cannot be written.
    """
    written = True
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_run(folder / "run.yaml", *parsed)
            write_json(folder / "ds_config.resolved.json", config)
            write_environment(folder / "env.json")
        except OSError as error:
            logger.error("%s", error)
            written = False
    if not everywhere(written):
        raise UserError(f"--output_dir {folder}: cannot be written")


def make_monitor(
    run: RunArgs,
    groups: Sequence[str],
    unit: str,
    engine: deepspeed.DeepSpeedEngine,
    topology: DomainTopology,
    flops_per_token: float | None,
    first_step: int,
) -> Monitor:
    """The log of a run; says what a step will put on the wire."""
    sizes = {
        name: getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    traffic = step_traffic(
        sizes,
        topology,
        engine.zero_optimization_stage(),
        engine.gradient_accumulation_steps(),
        next(engine.module.parameters()).element_size(),
    )
    logger.info(
        "%s trained parameters on this rank; on the wire per step and rank: %.2f MB over all "
        "ranks, %.2f MB inside a domain",
        f"{sum(sizes.values()):,}",
        traffic.world / 1e6,
        traffic.domain / 1e6,
    )
    on_gpu = engine.device.type == "cuda"
    return Monitor(
        Path(run.output_dir),
        groups,
        unit,
        run.max_steps,
        flops_per_token,
        peak_of(torch.cuda.get_device_name()) if on_gpu else None,
        run.report_to == "tensorboard",
        first_step,
    )


def settings_to_keep(
    parsed: Sequence[Arguments], data_digest: str, global_batch: int
) -> dict[str, object]:
    """What a resumed run must agree on: all that decides its numbers, and nothing else."""
    kept = {
        field.name: getattr(args, field.name)
        for args in parsed
        for field in fields(args)
        if field.name not in FREE_ON_RESUME | args.free_on_resume
    }
    return {**kept, "data digest": data_digest, "sequences per step": global_batch}


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
        name
        for name, low, high in zip(facts, lowest.tolist(), highest.tolist(), strict=True)
        if low != high
    ]
    if differing:
        raise UserError(
            f"the ranks disagree about {', '.join(differing)}: start all of them with the same "
            "recipe, flags, code and data"
        )
