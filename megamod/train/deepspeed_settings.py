"""Settings that flags and a DeepSpeed file decide together: batches, precision, optimizer."""

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from megamod.args import OptimArgs, RunArgs, SafetyArgs, apply_deepspeed_values
from megamod.data.batches import BatchDivision
from megamod.dist.ds_config import apply_sharing_rules, get_offload_device, resolve_ds_config
from megamod.dist.process import is_true_on_all_ranks
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.flags import Arguments, find_origin
from megamod.train.batch_size import count_domains_per_rank, count_micro_steps
from megamod.train.expert_parallel import apply_expert_parallel_rules
from megamod.train.loop import LoopPlan
from megamod.train.optim import SCHEDULES

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
"""Keys of a DeepSpeed file, and the flag that sets the same (of `betas`, one of two flags)."""


@dataclass(frozen=True)
class ResolvedSettings:
    """Arguments of a run after the DeepSpeed file was taken into account.

    Attributes:
        ds_config: DeepSpeed configuration without any "auto".
        run, optim: copies of the arguments with the values of the file.
        plan: settings of the training loop.
        topology: ranks and domains.
    """

    ds_config: dict[str, object]
    run: RunArgs
    optim: OptimArgs
    plan: LoopPlan
    topology: DomainTopology

    @property
    def global_batch(self) -> int:
        """Number of samples in an optimizer step, over all ranks."""
        steps = self.plan.micro_steps * self.topology.world_size
        return self.run.per_device_train_batch_size * steps

    def make_batch_division(self, rank: int) -> BatchDivision:
        """Return the division of the global batch over all ranks, as seen from `rank`."""
        micro_batch = self.run.per_device_train_batch_size
        return BatchDivision(micro_batch, self.global_batch, rank, self.topology.world_size)

    def replace_arguments(self, parsed: Sequence[Arguments]) -> tuple[Arguments, ...]:
        """Return the arguments of a run with this object's `run` and `optim` in place of theirs.

        Args:
            parsed: all arguments of the run, whose order is kept.
        """
        settled = {type(self.run): self.run, type(self.optim): self.optim}
        return tuple(settled.get(type(args), args) for args in parsed)


def resolve_settings(
    run: RunArgs,
    optim: OptimArgs,
    safety: SafetyArgs,
    topology: DomainTopology,
    hidden_size: int,
    mixture: PreTrainedConfig | None = None,
) -> ResolvedSettings:
    """Resolve flags and DeepSpeed file into one consistent set of settings.

    A value of the file replaces the default of a flag; if both are set, they must agree. The
    arguments are not changed.

    Args:
        run, optim, safety: flags; `safety` names the DeepSpeed file.
        topology: ranks and domains.
        hidden_size: hidden size of the model, for bucket sizes that are "auto".
        mixture: configuration of the mixture of experts that is trained; None: another model.
    Raises:
        UserError: see `count_micro_steps`, `resolve_ds_config`, `apply_deepspeed_values`,
            `apply_sharing_rules`, `apply_muon_rules`, `apply_expert_parallel_rules` and
            `make_loop_plan`.
    """
    run, optim = copy.copy(run), copy.copy(optim)
    steps = count_micro_steps(run, topology)
    ranks = topology.ranks_per_domain if topology.sharing is Sharing.BTM else topology.world_size
    # On one rank a dense model gains nothing from ZeRO's flat buffers, which cost 4 % of a step.
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
        "zero_optimization.offload_optimizer.nvme_path": str(get_offload_folder(run)),
    }
    origins = {
        key: origin
        for key, field in DS_KEYS.items()
        for args in (run, optim)
        if hasattr(args, field) and (origin := find_origin(args, field)) != "default"
    }
    resolved = resolve_ds_config(
        safety.deepspeed, values, origins, allow_unknown=safety.allow_unknown_ds_keys
    )
    apply_deepspeed_values(
        run,
        optim,
        resolved.values,
        f"DeepSpeed {safety.deepspeed}",
        count_domains_per_rank(topology),
    )
    apply_sharing_rules(resolved.config, topology.sharing, topology.world_size)
    apply_expert_parallel_rules(resolved.config, mixture, optim, topology.world_size)
    if optim.optim == "muon":
        apply_muon_rules(resolved.config)
    plan = make_loop_plan(run, optim, safety, topology)
    return ResolvedSettings(resolved.config, run, optim, plan, topology)


def apply_muon_rules(config: dict[str, object]) -> None:
    """Refuse settings that DeepSpeed does not combine with Muon; set those it requires.

    Args:
        config: a resolved configuration; changed in place.
    Raises:
        UserError: for offloading, fp16, clipping, and quantized gradients.
    """
    zero = config["zero_optimization"]
    for state in ("optimizer", "param"):
        if get_offload_device(zero, state) != "none":
            raise UserError(
                f"--optim muon with zero_optimization.offload_{state} is not supported; remove the "
                "block"
            )
    if config.get("fp16", {}).get("enabled"):
        raise UserError(
            "--optim muon with fp16 is not supported, because its momentum would mix gradients of "
            "several loss scales; use bf16"
        )
    if config["gradient_clipping"]:
        raise UserError(
            f"--optim muon: --max_grad_norm {config['gradient_clipping']} would scale down the "
            "orthogonalized updates, whose size is set by the rate; give 0"
        )
    if zero.get("zero_quantized_gradients"):
        raise UserError(
            "--optim muon needs whole gradients; remove zero_optimization.zero_quantized_gradients"
        )
    if zero["stage"] == 3:
        zero["reduce_scatter"] = False  # a matrix is orthogonalized as a whole


def make_loop_plan(
    run: RunArgs, optim: OptimArgs, safety: SafetyArgs, topology: DomainTopology
) -> LoopPlan:
    """Make the settings of the training loop.

    Without --warmup_steps the warm-up is --warmup_ratio of all steps, rounded down.

    Args:
        run, optim, safety: resolved flags.
        topology: ranks and domains.
    Raises:
        UserError: if the policy for losses that are not finite is impossible in this run.
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
        # The product of 100 and 0.29 is 28.999999999999996.
        warmup = int(run.max_steps * optim.warmup_ratio + 1e-9)
    return LoopPlan(
        max_steps=run.max_steps,
        stop_step=run.max_steps if run.stop_step is None else min(run.stop_step, run.max_steps),
        micro_steps=count_micro_steps(run, topology),
        schedule=SCHEDULES[optim.lr_scheduler_type](optim.learning_rate, warmup, run.max_steps),
        max_grad_norm=optim.max_grad_norm,
        logging_steps=run.logging_steps,
        eval_steps=run.eval_steps,
        save_steps=run.save_steps,
        seed=run.seed,
        nonfinite=safety.nonfinite,
        max_nonfinite_steps=safety.max_nonfinite_steps,
        spike_factor=safety.spike_factor,
        save_failure=safety.save_failure,
    )


def get_offload_folder(run: RunArgs) -> Path:
    """Return the folder that replaces "auto" as nvme_path of an offloaded optimizer.

    It is `offload` in --output_dir, or in the current folder without one.
    """
    return Path(run.output_dir or ".") / "offload"


def remove_offload_files(run: RunArgs, config: Mapping[str, object]) -> None:
    """Delete the files of an offloaded optimizer; collective.

    Nothing is deleted unless the optimizer was offloaded to `get_offload_folder`. A disk error is
    ignored.

    Args:
        run: flags; --output_dir is read.
        config: resolved DeepSpeed configuration.
    """
    optimizer = config["zero_optimization"].get("offload_optimizer") or {}
    if optimizer.get("device") != "nvme" or optimizer["nvme_path"] != str(get_offload_folder(run)):
        return
    is_true_on_all_ranks(True)  # no rank reads it any more
    shutil.rmtree(get_offload_folder(run), ignore_errors=True)
