"""Time of an optimizer step: the training loop against a hand-written one, DEMix against dense.

    python tests/bench/step.py

Steps of both sides alternate in one process and on one thread; minima of the rounds are compared,
three times over.
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from ranks import on_ranks  # noqa: E402

ROUNDS, REPEATS = 10, 3
DOMAINS = ("law", "med")
BATCH, LENGTH, VOCAB = 16, 128, 4000
CLIP = 1.0
RECIPE = dict(betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1)


def make_model(untie: str, held: tuple[str, ...], domains: tuple[str, ...] = DOMAINS):
    """Four layers of width 256: a step takes 0.3 s or more on one core."""
    from megamod.models.lm.configuration import DemixConfig
    from megamod.models.lm.demix import DemixForCausalLM, initialise_lm_weights

    config = DemixConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        domains=list(domains),
        untie=untie,
    )
    model = DemixForCausalLM(config, held if untie != "none" else None)
    initialise_lm_weights(model, seed=1)
    return model


def random_batch(number: int, domain: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(4, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    return {
        "input_ids": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "domain": domain,
        "domains": torch.full((BATCH,), domain),
        "tokens": BATCH * LENGTH,
    }


def hand_written(model) -> Callable[[dict[str, object]], None]:
    """The least a training step can be: forward, backward, clip, update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, **RECIPE)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)

    def step(batch: dict[str, object]) -> None:
        loss = model(batch["input_ids"], position_ids=positions, shift_labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_engine(untie: str, stage: int, domains: tuple[str, ...] = DOMAINS, **zero: object):
    """An engine, as launchers/pretrain.py builds it, and the topology; `zero`: further settings."""
    import torch.distributed as dist

    from megamod.dist.scope import Sharing, parse_sharing
    from megamod.dist.topology import DomainTopology
    from megamod.train.engine import build_engine
    from megamod.train.optim import make_adamw

    topology = DomainTopology(dist.get_world_size(), domains, parse_sharing(untie))
    held = topology.get_rank_domains(dist.get_rank())
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "use_data_before_expert_parallelism": topology.sharing is Sharing.DEMIX,
        "steps_per_print": None,
    }
    model = make_model("none" if untie == "all" else untie, held, domains)
    return build_engine(
        model, lambda groups: make_adamw(groups, **RECIPE), config, topology
    ), topology


def loop_against_hand(stage: int) -> list[float]:
    """Ratios ours / hand-written of the minima of each repeat.

    The real loop runs; whenever it asks for a batch, the hand-written loop makes a step first.
    """
    steps = ROUNDS * REPEATS + 1
    engine, _ = make_engine("none", stage)
    peer = hand_written(make_model("none", DOMAINS))
    ours, theirs = [], []

    def batches(first: int) -> Iterator[dict[str, object]]:
        for number in itertools.count(first):
            if number:
                ours.append(time.perf_counter() - asked[0])
            batch = random_batch(number, 0)
            started = time.perf_counter()
            peer(batch)
            asked[0] = time.perf_counter()
            theirs.append(asked[0] - started)
            yield batch

    asked = [0.0]
    through_loop(engine, DOMAINS, torch.device("cpu"), batches, steps)
    return ratios(ours[1:], theirs[1:])


def through_loop(
    engine,
    domains: tuple[str, ...],
    device: torch.device,
    batches: Callable[[int], Iterator[dict[str, object]]],
    steps: int,
    *,
    micro_steps: int = 1,
    lead: bool = True,
) -> None:
    """The training loop over causal batches, one step more than asked for; nothing is saved.

    Args:
        lead: whether this rank writes the log.
    """
    from megamod.states.checkpoint_folder import TrainState
    from megamod.train.loop import LoopPlan, train
    from megamod.train.monitor import Monitor
    from megamod.train.objectives import CausalLMObjective
    from megamod.train.optim import make_constant_schedule

    plan = LoopPlan(
        max_steps=steps + 1,
        stop_step=steps + 1,
        micro_steps=micro_steps,
        schedule=make_constant_schedule(1e-4, 0, steps),
        max_grad_norm=CLIP,
        logging_steps=10,
        eval_steps=0,
        save_steps=0,
        seed=1,
        nonfinite="stop",
        max_nonfinite_steps=0,
        spike_factor=0.0,
        save_failure="continue",
    )
    objective = CausalLMObjective(domains, device, selects_expert=False)
    state, saved = TrainState(), _NoCheckpoints()
    with tempfile.TemporaryDirectory() as folder:
        curves = "tensorboard" if lead else "none"
        monitor = Monitor(Path(folder), domains, "tokens", steps + 1, None, None, curves, 0)
        train(engine, objective, batches, plan, state, saved, monitor, lambda step: None)
        monitor.close()


def demix_against_dense(rank: int) -> list[float]:
    """Ratios DEMix / dense of the minima of each repeat, two ranks with one expert each."""
    from megamod.train.engine import finish_micro_step
    from megamod.train.optim import set_learning_rate

    engines = {untie: make_engine(untie, 1)[0] for untie in ("none", "feedforward")}
    times: dict[str, list[float]] = {untie: [] for untie in engines}
    for number in range(ROUNDS * REPEATS + 1):
        batch = random_batch(2 * number + rank, rank)
        for untie, engine in engines.items():
            torch.distributed.barrier()
            started = time.perf_counter()
            set_learning_rate(engine.optimizer, 1e-4)
            domain = DOMAINS[rank] if untie != "none" else None
            loss = engine(batch["input_ids"], shift_labels=batch["labels"], domain=domain).loss
            engine.backward(loss)
            finish_micro_step(engine, CLIP)
            torch.distributed.barrier()
            times[untie].append(time.perf_counter() - started)
    return ratios(times["feedforward"][1:], times["none"][1:])


class _NoCheckpoints:
    """Saving has a benchmark of its own."""

    folder = Path()

    def save(self, state: object, history: object = None) -> bool:
        return True

    def begin_evaluation(self, step: int) -> None: ...

    def end_evaluation(self) -> None: ...


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Sorted ratios ours / theirs of the minima of each repeat."""
    pieces = range(0, ROUNDS * REPEATS, ROUNDS)
    return sorted(min(ours[i : i + ROUNDS]) / min(theirs[i : i + ROUNDS]) for i in pieces)


def measure() -> dict[str, list[float]]:
    """Sorted ratios of the repeats: the middle one is the result, the others its spread."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    return {
        "step, ZeRO 1 / hand-written loop": on_ranks(1, _on_one, 1)[0],
        "step, ZeRO 0 / hand-written loop": on_ranks(1, _on_one, 0)[0],
        "DEMix step / dense step, 2 ranks": on_ranks(2, demix_against_dense)[0],
    }


def _on_one(rank: int, stage: int) -> list[float]:
    return loop_against_hand(stage)


def main() -> None:
    for name, ratios in measure().items():
        print(f"{name}: {ratios[1]:.3f} ({ratios[0]:.3f} to {ratios[2]:.3f})")


if __name__ == "__main__":
    main()
