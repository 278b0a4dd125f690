"""One training run from parsed arguments to a published model, whatever is trained.

Each kind of run (`runs/pretrain/causal_lm.py` for one) fills a `Recipe`; `execute` does what all
kinds have in common, in a fixed order.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedConfig

from megamod.args import Arguments, OptimArgs, RunArgs, SafetyArgs
from megamod.data.lm.batches import train_loader
from megamod.dist.process import init_process
from megamod.dist.topology import DomainTopology
from megamod.runs.node_log import node_log
from megamod.train import setup
from megamod.train.checkpoint import Checkpoints, TrainState
from megamod.train.compiled import check_compiler, check_stage, compile_blocks
from megamod.train.engine import build_engine
from megamod.train.export import Card, ModelExport, publish
from megamod.train.loop import Choose, train
from megamod.train.monitor import Monitor
from megamod.train.objectives import Objective


@dataclass(frozen=True)
class Running:
    """A run after its engine was made: what evaluation needs of it."""

    engine: deepspeed.DeepSpeedEngine
    device: torch.device
    monitor: Monitor
    export: ModelExport
    output: Path
    state: TrainState


@dataclass(frozen=True)
class Recipe:
    """What is special about a kind of run.

    Attributes:
        config: of the whole model, all domains.
        topology: ranks, and what their domains share.
        data_digest: of what is trained on; ranks and a resumed run must agree on it.
        tokenizer: folder copied beside the model; None: none.
        card: what the model card says.
        groups: names by which losses are told apart in the log, such as domains.
        unit: what a loss is a mean over: "tokens" or "examples".
        make_batches: from the sequences of a step over all ranks to the micro-batches of this rank:
            item k is its k-th. Called before any process waits for another, as mistakes show here.
        make_model: the module, with new or loaded weights.
        make_objective: from the device to the objective.
        make_evaluate: from the run to what is called on every rank every --eval_steps with the
            number of finished steps.
        flops_per_token: from the module to the operations of a training step per token; None: the
            log shows no MFU.
        companions: further files copied beside the model.
        settings: further values that a resumed run must agree on.
        make_choice: from the device to what chooses among a step's data, see `train.loop.train`;
            None: all is trained on.
        write_model: writes OUT/model, from the exporter and the folder; collective. None: it is
            what checkpoints hold.
    """

    config: PreTrainedConfig
    topology: DomainTopology
    data_digest: str
    tokenizer: Path | None
    card: Card
    groups: Sequence[str]
    unit: str
    make_batches: Callable[[int], Dataset]
    make_model: Callable[[], nn.Module]
    make_objective: Callable[[torch.device], Objective]
    make_evaluate: Callable[[Running], Callable[[int], None]]
    flops_per_token: Callable[[nn.Module], float] | None = None
    companions: Sequence[Path] = ()
    settings: dict[str, object] | None = None
    make_choice: Callable[[torch.device], Choose] | None = None
    write_model: Callable[[ModelExport, Path], object] | None = None


def execute(
    recipe: Recipe,
    parsed: Sequence[Arguments],
    *,
    workers: int = 0,
    checkpointing: bool = False,
    compiled: bool = False,
) -> Running | None:
    """Train, save, publish OUT/model; collective.

    Args:
        parsed: all arguments, `RunArgs`, `SafetyArgs` and `OptimArgs` among them. What
            the DeepSpeed file decides is changed in them.
        workers: processes that read data, per rank.
        checkpointing: recompute blocks in the backward pass.
        compiled: have torch compile the blocks.
    Returns:
        the finished run; None if only the groups were asked for.
    Raises:
        UserError, PolicyStop, Interrupted: see `megamod.train.loop.train`.
    """
    run, safety, optim = (_of(parsed, kind) for kind in (RunArgs, SafetyArgs, OptimArgs))
    topology, output = recipe.topology, Path(run.output_dir)
    # What a user can get wrong is looked at before any process waits for another.
    ds_config = setup.engine_config(run, safety, optim, topology, recipe.config.hidden_size)
    if compiled:
        check_stage(ds_config)
        check_compiler(get_accelerator().device_name())
    plan = setup.make_plan(run, safety, optim, topology)
    global_batch = run.per_device_train_batch_size * plan.micro_steps * topology.world_size
    batches = recipe.make_batches(global_batch)

    device = init_process(safety.dist_timeout)
    facts = {"the run": repr(parsed), "the data": recipe.data_digest, "the code": code_digest()}
    setup.check_agreement(facts)
    table = setup.group_table(topology, device)
    if dist.get_rank() == 0:
        print(table, flush=True)
    if safety.print_groups:
        return None
    model = recipe.make_model()
    if checkpointing:
        model.gradient_checkpointing_enable()
    if compiled:
        compile_blocks(model)
    flops = recipe.flops_per_token(model) if recipe.flops_per_token else None
    engine = build_engine(model, setup.optimizer_maker(optim), ds_config, topology)
    export = ModelExport(
        engine,
        recipe.config,
        topology,
        recipe.tokenizer,
        output / "run.yaml",
        recipe.card,
        recipe.companions,
    )
    checkpoints = Checkpoints(
        output / "checkpoints",
        engine,
        topology,
        export,
        setup.settings_to_keep(parsed, recipe.data_digest, global_batch) | (recipe.settings or {}),
        run.save_total_limit,
    )
    state = checkpoints.resume(safety.resume) or TrainState()
    setup.record_run(output, ds_config, parsed)
    with node_log(output, table, state.step):
        monitor = setup.make_monitor(
            run, recipe.groups, recipe.unit, engine, topology, flops, state.step
        )
        running = Running(engine, device, monitor, export, output, state)
        train(
            engine,
            recipe.make_objective(device),
            lambda step: train_loader(batches, step, workers, pin_memory=device.type == "cuda"),
            plan,
            state,
            checkpoints,
            monitor,
            recipe.make_evaluate(running),
            recipe.make_choice(device) if recipe.make_choice else None,
        )
        publish(
            partial(recipe.write_model, export) if recipe.write_model else export, output / "model"
        )
    setup.remove_offloaded(run, ds_config)
    return running


def code_digest() -> str:
    """A digest of our sources, kernels among them, and the versions of what computes with them."""
    versions = (torch.__version__, deepspeed.__version__, transformers.__version__)
    found = hashlib.sha256(" ".join(versions).encode())
    for name in ("megamod", "megamod_kernels"):
        package = Path(find_spec(name).origin).resolve().parent
        for path in sorted(package.rglob("*.py")):
            found.update(str(path.relative_to(package)).encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def _of(parsed: Sequence[Arguments], kind: type) -> Arguments:
    return next(args for args in parsed if isinstance(args, kind))
