"""A run that stops and resumes is the uninterrupted run, bit for bit; also at another world size.

Each pair of runs is made in one set of processes; a cut that no checkpoint follows is made by an
exception in the midst of a step.
"""

import logging
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from train.tiny_runs import DOMAINS, MICRO, VOCAB, masters, run_tiny

from megamod.data.batches import BatchDivision
from megamod.data.corpus.indexed import IndexedDataset, IndexedWriter
from megamod.data.lm.batches import TrainBatches
from megamod.data.lm.blocks import TokenBlocks
from megamod.data.lm.order import BalancedSampler
from megamod.dist.process import get_rank as my_rank
from megamod.dist.scope import Sharing
from megamod.states.weights import read_weights

SHARINGS = [("none", stage) for stage in (0, 1, 2, 3)]
SHARINGS += [("feedforward", 1), ("feedforward", 2), ("transformer_output", 2)]
INDEPENDENT = [("all", stage) for stage in (1, 2, 3)]
DROPOUT = [("none", 1), ("none", 3), ("feedforward", 2)]
RESHARDED = {"none": (0, 1, 2, 3), "feedforward": (1, 2)}


class Cut(Exception):
    """Stands for a process that dies."""


class DyingObjective:
    """Raises in the forward pass of one micro-batch, counted over the whole run of a process."""

    def __init__(self, objective, fatal: int):
        self.objective, self.left = objective, fatal
        self.domains, self.count_items = objective.domains, objective.count_items

    def compute_loss(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise Cut
        return self.objective.compute_loss(*arguments)


def data_of(folder: Path):
    """From a topology to the batches of a small data-bin of ours: 5 blocks in each of 4 domains.

    A step takes 4 sequences of a domain: after 5 steps its fourth epoch is over, after 4 it is in
    the midst of it.
    """

    def batches(topology):
        blocks = []
        for number, domain in enumerate(DOMAINS):
            if not (folder / f"{domain}-{my_rank()}.idx").exists():
                ids = np.random.default_rng(number).integers(4, VOCAB, 5 * 12, dtype=np.uint16)
                with IndexedWriter(folder / f"{domain}-{my_rank()}", np.uint16) as writer:
                    writer.add_item(ids)
            dataset = IndexedDataset(folder / f"{domain}-{my_rank()}")
            blocks.append(TokenBlocks(dataset, 12, eos_id=2, pad_id=1))
        order, size = BalancedSampler([5] * 4, seed=3), 4 * len(DOMAINS)
        if topology.sharing is Sharing.DENSE:
            division = BatchDivision(MICRO, size, my_rank(), topology.world_size)
            stream = TrainBatches.build_shared_stream(blocks, order, division)
        else:
            held = [DOMAINS.index(domain) for domain in topology.get_rank_domains(my_rank())]
            part = topology.get_rank_in_group(my_rank()), topology.ranks_per_domain
            stream = TrainBatches.build_domain_streams(
                blocks, order, BatchDivision(MICRO, size, *part), held
            )

        def batches_from(step: int):
            number = step * stream.micro_steps
            while True:
                yield stream[number]
                number += 1

        return batches_from

    return batches


def straight_and_cut(rank: int, root: Path, world: int) -> None:
    """Every pair of runs of a world size: ROOT/NAME-straight and ROOT/NAME-cut."""
    logging.disable(logging.WARNING)

    def pair(name, untie, stage, stop=2, last=4, fatal=None, **options):
        run_tiny(root / f"{name}-straight", untie, stage, last, **options)
        if fatal is None:
            run_tiny(root / f"{name}-cut", untie, stage, stop, **options)
        else:
            with pytest.raises(Cut):
                run_tiny(
                    root / f"{name}-cut",
                    untie,
                    stage,
                    last,
                    save_steps=stop,
                    wrap_objective=lambda objective: DyingObjective(objective, fatal),
                    **options,
                )
        _, state, _ = run_tiny(root / f"{name}-cut", untie, stage, last, **options)
        assert state.step == last

    for untie, stage in SHARINGS + INDEPENDENT * (world == 4):
        pair(f"{untie}-zero{stage}", untie, stage)
    for untie, stage in DROPOUT:
        pair(f"{untie}-zero{stage}-dropout", untie, stage, dropout=0.3)
    steps = 8 // world  # micro-batches of a step
    for untie, stage in (("none", 1), ("feedforward", 2)):
        # The checkpoint of step 2 is there; the process dies in the second micro-batch of step 4.
        pair(f"{untie}-zero{stage}-midstep", untie, stage, fatal=3 * steps + 1)
        for stop in (4, 5):
            data = root / f"data{untie}{stop}"
            data.mkdir(exist_ok=True)
            pair(f"{untie}-zero{stage}-epoch{stop}", untie, stage, stop, 6, batches=data_of(data))


def names_of(world: int) -> list[tuple[str, int]]:
    """The names of all pairs of a world size and their last step."""
    names = [f"{untie}-zero{stage}" for untie, stage in SHARINGS + INDEPENDENT * (world == 4)]
    names += [f"{untie}-zero{stage}-dropout" for untie, stage in DROPOUT]
    both = ("none-zero1", "feedforward-zero2")
    names += [f"{name}-midstep" for name in both]
    return [(name, 4) for name in names] + [
        (f"{name}-epoch{stop}", 6) for name in both for stop in (4, 5)
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """From a world size to the folder of its runs."""

    @cache
    def of_world(world: int) -> Path:
        root = tmp_path_factory.mktemp(f"world{world}")
        on_ranks(world, straight_and_cut, root, world)
        return root

    return of_world


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file, by file and name."""
    return {
        f"{file.relative_to(checkpoint)}/{name}": tensor
        for file in checkpoint.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "name", "last"),
    [
        pytest.param(world, name, last, marks=[pytest.mark.long] if world == 4 else [])
        for world in (1, 2, 4)
        for name, last in names_of(world)
    ],
)
def test_resumed_run_is_bitwise_the_straight_one(pairs, world, name, last):
    straight = pairs(world) / f"{name}-straight" / "checkpoints" / f"step-{last}"
    cut = pairs(world) / f"{name}-cut" / "checkpoints" / f"step-{last}"
    first, other = tensors_of(straight), tensors_of(cut)
    assert first.keys() == other.keys() and len(first) > 100
    differing = [key for key, tensor in first.items() if not torch.equal(tensor, other[key])]
    assert differing == []
    states = [
        {f.relative_to(c): f.read_text() for f in c.rglob("state.json")} for c in (straight, cut)
    ]
    assert states[0] == states[1] != {}


@pytest.mark.slow
def test_dropout_takes_part(pairs):
    plain = tensors_of(pairs(1) / "none-zero1-straight" / "checkpoints" / "step-4")
    dropped = tensors_of(pairs(1) / "none-zero1-dropout-straight" / "checkpoints" / "step-4")
    assert any(not torch.equal(tensor, dropped[name]) for name, tensor in plain.items())


def leg(rank: int, root: Path, legs: list[tuple[str, str, int, int]]) -> None:
    for folder, untie, stage, stop in legs:
        run_tiny(root / folder, untie, stage, stop)


@pytest.fixture(scope="module")
def resharded(tmp_path_factory) -> Path:
    """ROOT/UNTIE-zeroS went 4 -> 2 -> 1 -> 4 ranks with two steps on each; ROOT/UNTIE-zeros changes
    the stage each time too; ROOT/UNTIE-straight made the 8 steps on one rank."""
    root = tmp_path_factory.mktemp("reshard")
    stops = {0: (4, 2), 1: (2, 4), 2: (1, 6), 3: (4, 8)}
    for number, (world, stop) in stops.items():
        legs = [
            (f"{untie}-zero{stage}", untie, stage, stop)
            for untie, stages in RESHARDED.items()
            for stage in stages
        ]
        legs += [("none-zeros", "none", (1, 3, 2, 0)[number], stop)]
        legs += [("feedforward-zeros", "feedforward", (1, 2, 1, 2)[number], stop)]
        if world == 1:
            legs += [(f"{untie}-straight", untie, 1, 8) for untie in RESHARDED]
        on_ranks(world, leg, root, legs)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("untie", "stages"),
    [(untie, f"zero{s}") for untie, stages in RESHARDED.items() for s in (*stages, "s")],
)
def test_other_worlds_and_stages_go_on_alike(resharded, untie, stages):
    """4 -> 2 -> 1 -> 4 ranks: weights and moments of the straight run, to rounding."""
    went = resharded / f"{untie}-{stages}" / "checkpoints" / "step-8"
    straight = resharded / f"{untie}-straight" / "checkpoints" / "step-8"
    first, other = read_weights(straight), read_weights(went)
    assert first.keys() == other.keys()
    for name, tensor in first.items():
        assert (other[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name
    for kind, bound in (("exp_avg", 1e-5), ("exp_avg_sq", 1e-5)):
        first, other = masters(straight, kind), masters(went, kind)
        assert first.keys() == other.keys()
        for name, tensor in first.items():
            largest = max(float(t.abs().max()) for t in first.values())
            assert (other[name] - tensor).abs().max() <= bound * largest, (kind, name)
