"""Steps of training, as `gpu_training.py` times them: from flags to an engine, loops in turns."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from clock import synchronise
from step import CLIP, through_loop

DS_CONFIG = Path(__file__).resolve().parents[2] / "ds_configs" / "zero1_bf16.json"
WARM_UP = 3


@dataclass(frozen=True)
class Size:
    """A decoder to train; `floor` is the MFU that is to be reached, `more` further flags."""

    model: str
    rows: int
    micro_steps: int
    floor: float
    length: int = 1024
    more: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of an optimizer step."""
        return self.rows * self.micro_steps * self.length

    @property
    def flags(self) -> tuple[str, ...]:
        """Return the flags for a launcher."""
        return (
            *("--model", self.model, "--max_seq_length", str(self.length)),
            *("--per_device_train_batch_size", str(self.rows)),
            *("--global_batch_size", str(self.rows * self.micro_steps), *self.more),
        )


class Job:
    """Build what a launcher and the planner derive from flags, on one rank."""

    def __init__(self, *flags: str):
        from megamod.args import (
            DataArgs,
            LoraArgs,
            ModelArgs,
            MuxArgs,
            OptimArgs,
            RunArgs,
            SafetyArgs,
        )
        from megamod.btm.campaign import BtmArgs
        from megamod.flags import parse_args
        from megamod.planning.job import list_jobs
        from megamod.planning.plan import plan_job
        from megamod.planning.plan_args import PlanArgs

        kinds = (PlanArgs, BtmArgs, RunArgs, SafetyArgs, ModelArgs, LoraArgs)
        kinds += (OptimArgs, MuxArgs, DataArgs)
        inputs = ("--world_size", "1", "--precision", "bf16", "--deepspeed", str(DS_CONFIG))
        inputs += ("--max_grad_norm", str(CLIP), "--adam_beta2", "0.95", "--weight_decay", "0.1")
        self.parsed = parse_args(*kinds, argv=[*inputs, *flags])
        (self.job,) = list_jobs(self.parsed)
        self.plan = plan_job(self.job, self.parsed[0])

    def engine(self, device: torch.device):
        """A model with new weights in the engine of the launchers."""
        from megamod.train.deepspeed_settings import resolve_settings
        from megamod.train.engine import build_engine
        from megamod.train.optim import make_optimizer_factory

        _, _, run, safety, _, _, optim, _, _ = self.parsed
        config, topology = self.plan.network.config, self.job.topology
        settled = resolve_settings(run, optim, safety, topology, config.hidden_size)
        torch.manual_seed(1)
        with device:
            model = self.plan.network.build_rank_module(config)
        return build_engine(
            model, make_optimizer_factory(settled.optim), settled.ds_config, topology
        )


def random_batches(vocabulary: int, size: Size, device: torch.device) -> list[dict[str, object]]:
    """A step's micro-batches, in memory that is copied from at once where there is a GPU."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(size.micro_steps):
        ids = torch.randint(4, vocabulary, (size.rows, size.length + 1), generator=generator)
        batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        batch["domains"] = torch.zeros(size.rows, dtype=torch.int64)
        if device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        result.append(batch | {"domain": 0, "tokens": size.rows * size.length})
    return result


def in_turns(
    engine,
    step_batches: Sequence[dict[str, object]],
    others: Mapping[str, Callable[[], None]],
    device: torch.device,
    rounds: int,
) -> dict[str, float]:
    """Least seconds of a step of the training loop ("ours") and of the others, in turns."""
    steps = WARM_UP + rounds
    times: dict[str, list[float]] = {name: [] for name in ("ours", *others)}

    def now() -> float:
        synchronise(device.type == "cuda")
        return time.perf_counter()

    def batches(first: int) -> Iterator[dict[str, object]]:
        started = None
        for number in itertools.count():
            if started is not None:
                times["ours"].append(now() - started)
            if number < steps:
                for name, step in others.items():
                    begun = now()
                    step()
                    times[name].append(now() - begun)
            started = now()
            yield from step_batches

    micro_steps = len(step_batches)
    through_loop(engine, ("text",), device, batches, steps, micro_steps=micro_steps, lead=False)
    return {name: min(taken[WARM_UP:]) for name, taken in times.items()}


def whole_step(engine, objective, batches: Sequence[dict[str, object]]) -> Callable[[], None]:
    """A function that makes one optimizer step, as the loop does, without its bookkeeping."""
    from megamod.train.engine import finish_micro_step
    from megamod.train.optim import set_learning_rate

    items = [sum(counts) for counts in zip(*map(objective.count_items, batches), strict=True)]
    share = [count / len(batches) for count in items]
    engine.train()

    def step() -> None:
        set_learning_rate(engine.optimizer, 1e-4)
        for batch in batches:
            engine.backward(objective.compute_loss(engine, batch, share).loss)
            finish_micro_step(engine, CLIP)

    return step


def least(
    sides: Mapping[str, Callable[[], None]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Least seconds of each call, in turns."""
    result = dict.fromkeys(sides, float("inf"))
    for number in range(WARM_UP + rounds):
        for name, call in sides.items():
            synchronise(device.type == "cuda")
            started = time.perf_counter()
            call()
            synchronise(device.type == "cuda")
            if number >= WARM_UP:
                result[name] = min(result[name], time.perf_counter() - started)
    return result
