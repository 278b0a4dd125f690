"""The training loop, the only one in the repository.

Pretraining, finetuning, adaptation and branch training differ in objective, batches and sharing,
which are arguments. One iteration is one optimizer step.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

from megamod.dist.process import fail_together, is_true_on_all_ranks, make_tensor_for_collectives
from megamod.dist.watch import record_step
from megamod.errors import (
    Interrupted,
    PolicyStop,
    UserError,
    is_distributed_failure,
    is_user_fixable,
)
from megamod.states.checkpoint_folder import WINDOW, TrainState
from megamod.train.checkpoint import Checkpoints, History
from megamod.train.engine import finish_micro_step, get_loss_group, runs_forward_together
from megamod.train.monitor import Monitor
from megamod.train.objectives import Batch, BatchScore, Objective
from megamod.train.optim import Schedule, set_learning_rate
from megamod.train.stop_reason import Stop, StopSignals

logger = logging.getLogger(__name__)

MEAN_LOSS_DECAY = 0.98  # per step, of the running mean that spikes are compared with

SelectBatches = Callable[[deepspeed.DeepSpeedEngine, Sequence[Batch]], Sequence[Batch]]
"""Selects from this rank's micro-batches of a step those to train on; called on every rank."""

OpenBatches = Callable[[int], Iterator[Batch]]
"""From a step of data to an endless iterator of this rank's micro-batches."""


@dataclass(frozen=True)
class LoopPlan:
    """Settings of the training loop. An interval of 0 steps means "only at the end".

    Attributes:
        max_steps, stop_step: last step of the schedule, and of this run.
        micro_steps: micro-batches of a rank in a step.
        schedule: from finished steps to the learning rate of the next step.
        max_grad_norm: largest gradient norm; 0: no limit.
        nonfinite: policy for a loss or gradient that is not finite: "stop", "skip" or "rollback".
        max_nonfinite_steps: number of the last `WINDOW` steps that may be skipped or rolled back.
        spike_factor: a loss above this multiple of the running mean counts as not finite; 0: off.
        save_failure: "continue" or "stop" if a checkpoint cannot be written.
    """

    max_steps: int
    stop_step: int
    micro_steps: int
    schedule: Schedule
    max_grad_norm: float
    logging_steps: int
    eval_steps: int
    save_steps: int
    seed: int
    nonfinite: str
    max_nonfinite_steps: int
    spike_factor: float
    save_failure: str


def train(
    engine: deepspeed.DeepSpeedEngine,
    objective: Objective,
    open_batches: OpenBatches,
    plan: LoopPlan,
    state: TrainState,
    checkpoints: Checkpoints,
    monitor: Monitor,
    evaluate: Callable[[int], None],
    select_batches: SelectBatches | None = None,
) -> TrainState:
    """Train from `state`, and update it, to the last step; log, save and evaluate on the way.

    A failed evaluation loses no step: a checkpoint is written first where one is due, otherwise
    when the evaluation fails. A resumed run repeats an evaluation that did not end.

    Args:
        engine: with the model and its optimizer.
        objective: computes the loss of a micro-batch.
        open_batches: called with `state.data_step`, and again after a rollback.
        plan: numbers of steps, schedule and policies.
        state: changed in place, and returned.
        checkpoints, monitor: save, and log.
        evaluate: called on every rank with the number of finished steps. Its collectives must be
            those that `megamod.dist.process.fail_together` allows.
        select_batches: selects the data of a step to train on; None: all of them.
    Raises:
        PolicyStop: a loss or gradient was not finite and the policy is to stop, steps were skipped
            or rolled back too often, a rollback had no checkpoint, or no step at all was finite.
        Interrupted: SIGTERM, SIGUSR1 or Ctrl-C arrived. Before either, the last state is saved if a
            step was taken; if that fails and `save_failure` is "continue", it is logged.
        UserError: a checkpoint could not be written (raised at the end, or at once with
            `save_failure` "stop"), or an evaluation failed.
    """
    group = get_loss_group(engine)
    is_one_group = dist.get_world_size(group) == dist.get_world_size()
    batches = open_batches(state.data_step)
    saver = _Saver(checkpoints, plan.save_failure, state)
    signals = StopSignals()
    stop = Stop.NO

    if state.step and checkpoints.was_evaluation_interrupted(state.step):
        _evaluate_with_rescue_save(evaluate, state, saver, engine)
    engine.train()  # a loaded model is in evaluation mode

    def is_due(interval_steps: int) -> bool:
        """Return True after every `interval_steps` steps, unless it is 0, and after the last."""
        return state.step == plan.stop_step or (
            interval_steps > 0 and state.step % interval_steps == 0
        )

    while state.step < plan.stop_step:
        start_time = time.perf_counter()
        micro_batches = [next(batches) for _ in range(plan.micro_steps)]
        fetch_time = time.perf_counter()
        torch.manual_seed(_compute_dropout_seed(plan.seed, state.data_step))
        if select_batches is not None:
            micro_batches = select_batches(engine, micro_batches)
        item_totals = [
            sum(counts) for counts in zip(*map(objective.count_items, micro_batches), strict=True)
        ]
        item_totals, reason = _all_reduce_totals_and_stop(
            item_totals, max(stop, signals.stop_reason), group
        )
        if reason and is_one_group:
            stop = reason
            break

        rate = plan.schedule(state.step)
        set_learning_rate(engine.optimizer, rate)
        scores, grad_norm = _take_step(
            engine, objective, micro_batches, item_totals, plan, state, group
        )
        record_step()
        state.step += 1
        state.data_step += 1
        monitor.add_step(
            scores, grad_norm, rate, fetch_time - start_time, time.perf_counter() - start_time
        )
        # With fp16 an overflow is routine: the loss scale is halved and training goes on.
        routine = engine.fp16_enabled()
        saver.record_step(grad_norm is not None or routine)
        if grad_norm is None:
            state.skipped += 1
            if not routine:
                stop = max(stop, _apply_skip_policy(plan, state, saver))
                batches = open_batches(state.data_step) if plan.nonfinite == "rollback" else batches

        if is_due(plan.logging_steps) or is_due(plan.eval_steps) or is_due(plan.save_steps):
            if not is_one_group:  # independent models exchange signals only here
                _, stop = _all_reduce_totals_and_stop((), max(stop, signals.stop_reason), None)
            monitor.write_record(state)
            if is_due(plan.eval_steps):
                checkpoints.begin_evaluation(state.step)
            if is_due(plan.save_steps) or (
                is_due(plan.eval_steps) and runs_forward_together(engine)
            ):
                saver.save(state)
            if is_due(plan.eval_steps):
                _evaluate_with_rescue_save(evaluate, state, saver, engine)
            if stop and not is_one_group:
                break

    signals.restore_handlers()
    if monitor.steps:
        monitor.write_record(state)
    saver.save(state, diverged=stop is Stop.NONFINITE)
    if stop is Stop.NONFINITE:
        raise PolicyStop(_format_nonfinite_stop(plan, state, saver))
    if state.step and not is_true_on_all_ranks(state.skipped < state.step):
        raise PolicyStop(
            f"none of {state.step} steps had a finite loss and gradient, so nothing was trained "
            "and no model is published"
        )
    if stop is Stop.SIGNAL:
        raise Interrupted(
            f"stopped by a signal after step {state.step}; {saver.describe_checkpoint(state)}, the "
            "same command resumes"
        )
    saver.raise_if_failed()
    return state


def _evaluate_with_rescue_save(
    evaluate: Callable[[int], None],
    state: TrainState,
    saver: "_Saver",
    engine: deepspeed.DeepSpeedEngine,
) -> None:
    """Evaluate after the last step of `state`, and delete the record that the evaluation is due.

    If it fails on any rank, save a checkpoint by `saver` first, except where forward passes run
    together (it is saved already) or ranks are lost. Then raise UserError if a user can mend the
    cause, else the error itself.

    Args:
        evaluate: as in `train`.
        engine: decides if forward passes run together.
    """
    try:
        with fail_together(exchange_errors=not runs_forward_together(engine)):
            evaluate(state.step)
    except Exception as error:
        if isinstance(error, RuntimeError) and is_distributed_failure(error):
            raise  # without its peers a rank cannot write a checkpoint
        if not runs_forward_together(engine):
            saver.save(state)
        text = (
            f"the evaluation after step {state.step} failed: {error}; "
            f"{saver.describe_checkpoint(state)}, the same command repeats the evaluation and "
            "goes on"
        )
        if is_user_fixable(error):
            raise UserError(text) from error
        logger.error("%s", text)
        raise
    saver.checkpoints.end_evaluation()


def _take_step(
    engine: deepspeed.DeepSpeedEngine,
    objective: Objective,
    micro_batches: Sequence[Batch],
    item_totals: Sequence[float],
    plan: LoopPlan,
    state: TrainState,
    group: dist.ProcessGroup | None,
) -> tuple[list[BatchScore], float | None]:
    """Take an optimizer step; return scores and the gradient norm, None if it was skipped.

    The engine averages gradients over micro-batches and ranks. A summed loss is divided by the
    items per micro-batch, `item_totals` over the number of micro-batches of the group: this gives
    the gradient of the mean over all items, also if micro-batches have unequal numbers of them.

    Args:
        engine: with the model and its optimizer.
        objective: computes the loss of a micro-batch.
        micro_batches: of this rank.
        item_totals: items of the step, over all ranks of the group, for each term of the loss.
        plan: gives the gradient clipping and the factor of a loss spike.
        state: its running mean of the loss is updated.
        group: ranks that average the loss; None: all.
    """
    micro_batch_count = len(micro_batches) * dist.get_world_size(group)
    item_shares = [count / micro_batch_count for count in item_totals]
    scores, grad_norm = [], None
    for number, micro_batch in enumerate(micro_batches, start=1):
        scores.append(objective.compute_loss(engine, micro_batch, item_shares))
        loss = scores[-1].loss
        if plan.spike_factor and number == len(micro_batches):
            step_loss = _average_loss(scores, group)
            if _is_loss_spike(step_loss, plan, state):
                # A gradient that is not finite makes every rank skip the update.
                loss = loss * float("nan")
            else:
                _update_mean_loss(state, step_loss)
        engine.backward(loss)
        grad_norm = finish_micro_step(engine, plan.max_grad_norm)
    return scores, grad_norm


def _average_loss(scores: Sequence[BatchScore], group: dist.ProcessGroup | None) -> float:
    """Average the loss over all items of a step; collective.

    Args:
        scores: of this rank's micro-batches.
        group: ranks whose items form one loss; None: all.
    """
    sums = torch.stack([torch.stack((s.total.sum(), s.items.sum())) for s in scores]).sum(0)
    dist.all_reduce(sums, group=group)
    return float(sums[0] / sums[1])


def _is_loss_spike(loss: float, plan: LoopPlan, state: TrainState) -> bool:
    """Return True if a loss is not finite, or above `plan.spike_factor` times the running mean."""
    mean = state.mean_loss
    return not math.isfinite(loss) or (mean is not None and loss > plan.spike_factor * mean)


def _update_mean_loss(state: TrainState, loss: float) -> None:
    """Update the running mean of the loss in `state` by the loss of a step that is no spike."""
    mean = state.mean_loss
    state.mean_loss = loss if mean is None else mean + (1 - MEAN_LOSS_DECAY) * (loss - mean)


def _apply_skip_policy(plan: LoopPlan, state: TrainState, saver: "_Saver") -> Stop:
    """Apply the policy of `plan` for a skipped step; return the reason to stop, if any.

    A rollback loads an older checkpoint of `saver` into the engine and `state` (except for the
    position in the data and the counts of skipped steps), and deletes later checkpoints.
    """
    logger.warning(
        "step %d: loss or gradient not finite, update skipped (policy: %s)",
        state.step,
        plan.nonfinite,
    )
    if state.record_nonfinite_step() > plan.max_nonfinite_steps or plan.nonfinite == "stop":
        return Stop.NONFINITE
    if plan.nonfinite == "rollback":
        # The weights that this step began with are no start: if they are a checkpoint's, an older
        # one is needed. So every rollback makes progress towards the first checkpoint or the end.
        path = saver.checkpoints.find_newest_checkpoint(below=state.step - 1)
        if path is None:
            return Stop.NONFINITE
        kept = {name: getattr(state, name) for name in ("data_step", "skipped", "nonfinite_steps")}
        vars(state).update(vars(saver.checkpoints.load(path)) | kept)
        saver.checkpoints.delete_later_checkpoints(state.step)
        saver.record_rollback(state)
        logger.warning("rolled back to %s; the data in between are skipped", path.name)
    return Stop.NO


def _format_nonfinite_stop(plan: LoopPlan, state: TrainState, saver: "_Saver") -> str:
    """Format the message of a run that stops because a step was not finite.

    It names the policy of `plan`, the step of `state`, and checkpoints of `saver` to resume from.
    """
    count, limit = len(state.list_recent_nonfinite()), plan.max_nonfinite_steps
    text = (
        f"a loss or gradient was not finite at step {state.step}; its update was skipped, "
        f"{saver.describe_checkpoint(state)}"
    )
    if plan.nonfinite == "stop":
        text += ". --nonfinite skip or rollback goes on instead"
    elif count > limit:
        text += f". {count} of the last {WINDOW} steps were so; --max_nonfinite_steps {limit}"
    else:
        text += ". --nonfinite rollback: there is no earlier checkpoint to go back to"
    sound = saver.checkpoints.find_sound_checkpoint()
    if sound is not None:
        text += f". --resume {sound} goes back to the last one that finite steps followed"
    return text


def _all_reduce_totals_and_stop(
    item_counts: Sequence[float], stop_reason: int, group: dist.ProcessGroup | None
) -> tuple[list[float], Stop]:
    """Sum the items and find the largest reason to stop, over a group; collective.

    Args:
        item_counts: items of this rank, for each term of the loss; may be empty.
        stop_reason: value of `Stop` on this rank.
        group: None: all ranks.
    """
    counts = make_tensor_for_collectives(
        [*item_counts, *(float(stop_reason >= reason) for reason in Stop if reason)]
    )
    dist.all_reduce(counts, group=group)
    totals = counts.tolist()
    reason_counts = totals[len(item_counts) :]
    return totals[: len(item_counts)], Stop(sum(count > 0 for count in reason_counts))


def _compute_dropout_seed(seed: int, data_step: int) -> int:
    """Compute the seed of dropout from the run's seed, the step of the data, and the rank.

    So no state of a random generator is saved.
    """
    return (seed << 31) + data_step * dist.get_world_size() + dist.get_rank()


class _Saver:
    """Saves each state once, except the loaded one, and remembers failures.

    A checkpoint is sound, and stays until a later one is, if all steps up to the next checkpoint
    were finite; or if the first was, and no step of the window before the checkpoint failed.
    """

    def __init__(self, checkpoints: Checkpoints, on_failure: str, loaded_state: TrainState):
        """Start with the state that `checkpoints` loaded, or a new one.

        `on_failure` is `LoopPlan.save_failure`.
        """
        self.checkpoints = checkpoints
        self.on_failure = on_failure
        self.failed = False
        self._start_counting(loaded_state)

    def _start_counting(self, state: TrainState) -> None:
        """Start counting the steps after the checkpoint of `state`."""
        self.saved = (state.step, state.data_step)
        self.healthy = not state.list_recent_nonfinite()
        self.finite: list[bool] = []

    def record_step(self, finite: bool) -> None:
        """Note that a step was taken, and if it was finite."""
        self.finite.append(finite)

    def record_rollback(self, state: TrainState) -> None:
        """Record that the weights are a checkpoint's again, while the data continue."""
        self._start_counting(state)
        self.saved = (state.step, -1)

    def save(self, state: TrainState, *, diverged: bool = False) -> None:
        """Save a state, unless it is saved already; collective.

        A failure is remembered; with `save_failure` "stop" raise UserError at once.

        Args:
            diverged: see `History`.
        """
        position = (state.step, state.data_step)
        if position == self.saved:
            return
        steps = self.finite
        sound = bool(steps) and steps[0] and (all(steps) or self.healthy)
        sound, unchanged = is_true_on_all_ranks(sound), is_true_on_all_ranks(not any(steps))
        last = self.saved[0] or None
        history = History(last if sound else None, last if unchanged else None, diverged)
        if self.checkpoints.save(state, history):
            self._start_counting(state)
            return
        self.failed = True
        if self.on_failure == "stop":
            self.raise_if_failed()

    def describe_checkpoint(self, state: TrainState) -> str:
        """Describe the checkpoint of `state`, after `save` of it, for an error message."""
        if not state.step:
            return "no step was taken, so nothing was saved"
        if self.saved == (state.step, state.data_step):
            return f"a checkpoint of that step is in {self.checkpoints.folder}"
        return f"a checkpoint could not be written to {self.checkpoints.folder}"

    def raise_if_failed(self) -> None:
        """Raise UserError if a checkpoint could not be written."""
        if self.failed:
            raise UserError(
                f"{self.checkpoints.folder}: a checkpoint could not be written, see the log above"
            )
