"""One training run from parsed arguments to a published model, whatever is trained.

Each kind of run (such as `runs/pretrain/causal_lm.py`) fills a `RunSpec`; `execute_run` does what
all kinds have in common, in a fixed order.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import PreTrainedConfig

from megamod.args import OptimArgs, RunArgs, SafetyArgs
from megamod.data.batches import BatchDivision, StepBatches
from megamod.data.lm.batches import iterate_train_batches
from megamod.dist.communication import compute_step_traffic
from megamod.dist.process import (
    check_ranks_agree,
    fail_together,
    gather_texts,
    is_true_on_all_ranks,
    join_process_group,
    read_launcher_rank,
)
from megamod.dist.topology import DomainTopology
from megamod.dist.watch import stop_heartbeat
from megamod.errors import UserError
from megamod.files import write_json
from megamod.flags import Arguments
from megamod.folder_lock import lock_folder
from megamod.models.lm.routing import is_sparse_moe
from megamod.run_recipe import write_run_recipe
from megamod.runs.code_digest import compute_code_digest
from megamod.runs.node_log import write_node_log
from megamod.runs.resume_settings import list_settings_to_repeat
from megamod.states.checkpoint_folder import TrainState
from megamod.train.checkpoint import Checkpoints
from megamod.train.compiled import check_compile_stage, check_compiler, compile_blocks
from megamod.train.deepspeed_settings import (
    ResolvedSettings,
    remove_offload_files,
    resolve_settings,
)
from megamod.train.engine import build_engine
from megamod.train.expert_parallel import (
    compute_parallel_exchange,
    get_expert_data_parallel_size,
    list_expert_names,
)
from megamod.train.export import Card, ModelExport, publish_model
from megamod.train.loop import SelectBatches, train
from megamod.train.monitor import Monitor, find_peak_flops, write_environment
from megamod.train.objectives import Objective
from megamod.train.optim import make_optimizer_factory
from megamod.train.trackers import check_tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActiveRun:
    """A run with its engine, as evaluations need it.

    Attributes:
        device: device of this rank.
        monitor: writes the metrics of the run.
        export: writes the present model to a folder.
        output: folder of the run.
        state: progress, which the training loop updates.
    """

    engine: deepspeed.DeepSpeedEngine
    device: torch.device
    monitor: Monitor
    export: ModelExport
    output: Path
    state: TrainState


@dataclass(frozen=True)
class RunSpec:
    """Parts of a run that depend on its kind.

    Attributes:
        config: configuration of the whole model, all domains.
        topology: ranks and domains.
        data_digest: digest of the training data; ranks and a resumed run must agree on it.
        tokenizer: folder that is copied into the model folder; None: the model gets none.
        card: content of the model card.
        groups: names of the losses that the log shows separately, such as domains.
        unit: items that a loss is the mean over: "tokens" or "examples".
        make_batches: from this rank's view of the global batch, divided over all ranks, to its
            micro-batches. Called before any process waits for another, because mistakes in the
            data show here.
        make_model: builds the module, with new or loaded weights.
        make_objective: from the device to the objective.
        make_evaluate: from the run to the function that every rank calls every --eval_steps with
            the number of finished steps.
        evaluates_start: a new run is also evaluated before its first step.
        prepare_output: writes further files into the output folder; called on every rank once the
            folder is locked, before the model is built. None: there are none.
        flops_per_token: from the module to the operations of a training step per token; None: the
            log shows no MFU.
        companions: further files that are copied into the model folder.
        seed_digest: digest of the weights of an adapter's seed; None: no adapter is trained.
        settings: further values that a resumed run must agree on.
        make_row_selector: from the device to `select_batches` of `train.loop.train`, or None.
        tokens_per_sample: tokens per sample of a language model.
        write_model: writes OUT/model, from the exporter and the folder; collective. None: the model
            of the checkpoints.
    """

    config: PreTrainedConfig
    topology: DomainTopology
    data_digest: str
    tokenizer: Path | None
    card: Card
    groups: Sequence[str]
    unit: str
    make_batches: Callable[[BatchDivision], StepBatches]
    make_model: Callable[[], nn.Module]
    make_objective: Callable[[torch.device], Objective]
    make_evaluate: Callable[[ActiveRun], Callable[[int], None]]
    evaluates_start: bool = False
    prepare_output: Callable[[], None] | None = None
    flops_per_token: Callable[[nn.Module], float] | None = None
    companions: Sequence[Path] = ()
    seed_digest: str | None = None
    settings: dict[str, object] | None = None
    make_row_selector: Callable[[torch.device], SelectBatches] | None = None
    write_model: Callable[[ModelExport, Path], object] | None = None
    tokens_per_sample: int | None = None


def execute_run(
    spec: RunSpec,
    parsed: Sequence[Arguments],
    *,
    workers: int = 0,
    checkpointing: bool = False,
    compiled: bool = False,
) -> ActiveRun | None:
    """Train, save checkpoints, publish OUT/model, and write the records of the run; collective.

    Rank 0 prints a table of the ranks. A run with checkpoints in OUT continues as --resume says.

    Args:
        spec: parts that depend on the kind of run.
        parsed: all arguments, `RunArgs`, `SafetyArgs` and `OptimArgs` among them.
        workers: processes that read data, per rank.
        checkpointing: recompute blocks in the backward pass.
        compiled: compile the blocks with torch.
    Returns:
        the finished run; None with --print_groups, which prints the table alone.
    Raises:
        UserError: for settings, data or ranks that do not fit each other, or if another job writes
            into the output folder.
        PolicyStop, Interrupted: see `megamod.train.loop.train`.
    """
    run, safety, optim = (
        _find_arguments(parsed, kind) for kind in (RunArgs, SafetyArgs, OptimArgs)
    )
    topology, output = spec.topology, Path(run.output_dir)
    # Mistakes of the user are found before any process waits for another.
    check_tracker(run.report_to)
    settings = resolve_settings(
        run,
        optim,
        safety,
        topology,
        spec.config.hidden_size,
        mixture=spec.config if is_sparse_moe(spec.config) else None,
    )
    parsed, ds_config = settings.replace_arguments(parsed), settings.ds_config
    if compiled:
        check_compile_stage(ds_config)
        check_compiler(get_accelerator().device_name())
    batches = spec.make_batches(settings.make_batch_division(read_launcher_rank()))

    device = join_process_group(safety.dist_timeout)
    facts = {
        "the run": repr(parsed),
        "the data": spec.data_digest,
        "the code": compute_code_digest(),
    }
    check_ranks_agree(facts)
    table = format_group_table(topology, device)
    if dist.get_rank() == 0:
        print(table, flush=True)
    if safety.print_groups:
        return None
    with lock_output(output):
        return _train_and_publish(
            spec, parsed, settings, batches, device, table, workers, checkpointing, compiled
        )


def _train_and_publish(
    spec: RunSpec,
    parsed: Sequence[Arguments],
    settings: ResolvedSettings,
    batches: StepBatches,
    device: torch.device,
    table: str,
    workers: int,
    checkpointing: bool,
    compiled: bool,
) -> ActiveRun:
    """Build the engine, resume, train and publish OUT/model; collective.

    The part of `execute_run` that writes into the output folder, which `lock_output` has locked.

    Args:
        spec, parsed: see `execute_run`.
        settings: settings of the run, with the values of the DeepSpeed file.
        batches: this rank's micro-batches.
        device: device of this rank.
        table: table of the ranks, for the log.
        workers, checkpointing, compiled: see `execute_run`.
    """
    run, safety = (_find_arguments(parsed, kind) for kind in (RunArgs, SafetyArgs))
    topology, ds_config, output = spec.topology, settings.ds_config, Path(run.output_dir)
    if spec.prepare_output:
        spec.prepare_output()
    model = spec.make_model()
    if checkpointing:
        model.gradient_checkpointing_enable()
    if compiled:
        compile_blocks(model)
    flops = spec.flops_per_token(model) if spec.flops_per_token else None
    engine = build_engine(
        model,
        make_optimizer_factory(settings.optim),
        ds_config,
        topology,
        decay_vectors=settings.optim.decay_norms_and_biases,
        muon=settings.optim.optim == "muon",
    )
    export = ModelExport(
        engine=engine,
        config=spec.config,
        topology=topology,
        tokenizer=spec.tokenizer,
        run_file=output / "run.yaml",
        card=spec.card,
        companions=spec.companions,
        seed_digest=spec.seed_digest or "",
    )
    checkpoints = Checkpoints(
        folder=output / "checkpoints",
        engine=engine,
        topology=topology,
        write_model=export,
        settings=list_settings_to_repeat(parsed, spec.data_digest, settings.global_batch)
        | (spec.settings or {}),
        keep_count=run.save_total_limit,
        defaults={field.name: field.default for args in parsed for field in fields(args)},
    )
    state = checkpoints.resume(safety.resume) or TrainState()
    if state.step >= settings.plan.stop_step > 0:
        logger.info("%s: has its %d steps already, nothing is trained", output, state.step)
    elif state.step:
        logger.info("%s: resumes at step %d of %d", output, state.step, run.max_steps)
    write_run_records(output, ds_config, parsed)
    with write_node_log(output, table, state.step):
        tokens = settings.global_batch // dist.get_world_size() * (spec.tokens_per_sample or 0)
        with fail_together():
            monitor = make_monitor(
                run, spec.groups, spec.unit, engine, topology, flops, state.step, tokens
            )
        running = ActiveRun(engine, device, monitor, export, output, state)
        evaluate = spec.make_evaluate(running)
        if spec.evaluates_start and state.step == 0:
            evaluate(0)
        train(
            engine=engine,
            objective=spec.make_objective(device),
            open_batches=lambda step: iterate_train_batches(
                batches, step, workers, pin_memory=device.type == "cuda"
            ),
            plan=settings.plan,
            state=state,
            checkpoints=checkpoints,
            monitor=monitor,
            evaluate=evaluate,
            select_batches=spec.make_row_selector(device) if spec.make_row_selector else None,
        )
        publish_model(
            partial(spec.write_model, export) if spec.write_model else export, output / "model"
        )
    stop_heartbeat()  # ranks may end at different times now
    remove_offload_files(run, ds_config)
    return running


@contextmanager
def lock_output(folder: Path) -> Iterator[None]:
    """Lock the output folder for this job, by its rank 0, for the time of the block; collective.

    Raises:
        UserError: on every rank, if another process holds it.
    """
    with ExitStack() as stack:
        with fail_together():
            if dist.get_rank() == 0:
                stack.enter_context(lock_folder(folder))
        yield


def format_group_table(topology: DomainTopology, device: torch.device) -> str:
    """Format a table of the ranks with host, device, domains and groups; collective."""
    hosts = gather_texts(os.uname().nodename)
    return topology.format_layout(hosts, gather_texts(str(device)))


def write_run_records(
    folder: Path, config: Mapping[str, object], parsed: Sequence[Arguments]
) -> None:
    """Write run.yaml, ds_config.resolved.json and env.json into the folder, on rank 0; collective.

    They hold the arguments, the resolved configuration of DeepSpeed and the environment.

    Args:
        folder: output folder of the run, created if needed.
        config: resolved configuration of DeepSpeed.
        parsed: all arguments of the command.
    Raises:
        UserError: on every rank, if the folder cannot be written.
    """
    written = True
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_run_recipe(folder / "run.yaml", *parsed)
            write_json(folder / "ds_config.resolved.json", config)
            write_environment(folder / "env.json")
        except OSError as error:
            logger.error("%s", error)
            written = False
    if not is_true_on_all_ranks(written):
        raise UserError(f"--output_dir {folder}: cannot be written")


def make_monitor(
    run: RunArgs,
    groups: Sequence[str],
    unit: str,
    engine: deepspeed.DeepSpeedEngine,
    topology: DomainTopology,
    flops_per_token: float | None,
    first_step: int,
    tokens: int,
) -> Monitor:
    """Build the monitor of a run; log the trained parameters and the bytes that a step will send.

    Args:
        groups, unit: see `RunSpec`.
        engine: engine with the model, for the sizes of its parameters.
        topology: ranks and domains, for the bytes.
        flops_per_token: operations of a training step per token; None: no MFU is logged.
        first_step: finished steps.
        tokens: tokens of this rank in a step of a language model; otherwise 0.
    """
    trained, frozen = {}, {}
    for name, parameter in engine.module.named_parameters():
        sizes = trained if parameter.requires_grad else frozen
        sizes[name] = getattr(parameter, "ds_numel", parameter.numel())
    traffic = compute_step_traffic(
        trained,
        topology,
        engine.zero_optimization_stage(),
        engine.gradient_accumulation_steps(),
        next(engine.module.parameters()).element_size(),
        frozen=frozen,
        experts=list_expert_names(engine.module),
        expert_data_parallel_size=get_expert_data_parallel_size(engine.module),
    )
    exchange = compute_parallel_exchange(engine.module, tokens)
    experts = ""
    if exchange:
        experts = (
            f", {traffic.expert / 1e6:.2f} MB over ranks with the same experts, and about "
            f"{exchange / 1e6:.2f} MB of tokens between experts"
        )
    logger.info(
        "%s trained parameters on this rank; on the wire per step and rank: %.2f MB over all "
        "ranks, %.2f MB inside a domain%s",
        f"{sum(trained.values()):,}",
        traffic.world / 1e6,
        traffic.domain / 1e6,
        experts,
    )
    on_gpu = engine.device.type == "cuda"
    return Monitor(
        folder=Path(run.output_dir),
        groups=groups,
        unit=unit,
        max_steps=run.max_steps,
        flops_per_token=flops_per_token,
        peak_flops=find_peak_flops(torch.cuda.get_device_name()) if on_gpu else None,
        report_to=run.report_to,
        first_step=first_step,
    )


def _find_arguments(parsed: Sequence[Arguments], kind: type) -> Arguments:
    """Return the first of the arguments that is an instance of `kind`."""
    return next(args for args in parsed if isinstance(args, kind))
