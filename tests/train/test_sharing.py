"""Every sharing x ZeRO stage x world size makes the steps of one process on the joint objective.

Micro-batches are ragged and accumulated; the reference knows neither DeepSpeed nor ranks.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from train.tiny_runs import DOMAINS, PEAK, make_batch, masters, reference, run_tiny

from megamod.states.weights import read_weights

STEPS, CLIP = 4, 0.5
EXPERTS = (
    "feedforward",
    "feedforward_every_other",
    "feedforward_top",
    "transformer",
    "transformer_output",
    "input_output",
)


def cases_of(world: int) -> list[tuple[str, int, int, str]]:
    """(untie, ZeRO stage, number of domains, precision) for a world size."""
    dense = [("none", stage, 4, "fp32") for stage in (0, 1, 2, 3)]
    demix = [(untie, stage, 4, "fp32") for untie in EXPERTS for stage in (1, 2)]
    half = [("none", stage, 4, "bf16") for stage in (1, 2, 3)]
    half += [("feedforward", stage, 4, "bf16") for stage in (1, 2)]
    if world == 4:  # also two ranks for each of two domains
        demix += [(untie, stage, 2, "fp32") for untie in EXPERTS[:1] for stage in (1, 2)]
        half += [("all", 2, 4, "bf16")]
    held = {1: (1,), 2: (2,), 4: (4, 2)}[world]  # independent models need a rank each
    independent = [("all", stage, count, "fp32") for count in held for stage in (1, 2, 3)]
    return dense + demix + independent + half


def name_of(case: tuple[str, int, int, str]) -> str:
    untie, stage, domains, precision = case
    return f"{untie}-zero{stage}-{domains}domains-{precision}"


def per_domain_of(case: tuple[str, int, int, str]) -> int:
    """Micro-batches of a domain in a step: every rank accumulates two or more."""
    return 2 if case[2] == 4 else 4


def train_cases(rank: int, root: Path, cases: list[tuple[str, int, int, str]]) -> None:
    for case in cases:
        untie, stage, domains, precision = case
        run_tiny(
            root / name_of(case),
            untie,
            stage,
            STEPS,
            per_domain=per_domain_of(case),
            clip=CLIP,
            precision=precision,
            domains=DOMAINS[:domains],
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """From a world size to the folder of its runs, which are all made by one set of processes."""

    @cache
    def of_world(world: int) -> Path:
        root = tmp_path_factory.mktemp(f"world{world}")
        on_ranks(world, train_cases, root, cases_of(world))
        return root

    return of_world


expected = cache(reference)


def relative(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest error of any tensor, relative to its largest entry."""
    assert got.keys() == expected.keys()
    return max(
        float((got[name].float() - item).abs().max() / item.abs().max().clamp(min=1e-12))
        for name, item in expected.items()
    )


ALL = [(world, case) for world in (1, 2, 4) for case in cases_of(world)]
FULL = [pair for pair in ALL if pair[1][3] == "fp32"]
HALF = [pair for pair in ALL if pair[1][3] == "bf16"]


def ids(pairs):
    return [f"W{world}-{name_of(case)}" for world, case in pairs]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), FULL, ids=ids(FULL))
def test_steps_are_those_of_the_joint_objective(trained, world, case):
    untie, _, domains, _ = case
    checkpoint = trained(world) / name_of(case) / "checkpoints" / f"step-{STEPS}"
    target_value = expected(untie, STEPS, per_domain_of(case), CLIP, DOMAINS[:domains])
    if untie == "all":
        for domain, (weights, _) in target_value.items():
            assert relative(read_weights(checkpoint / domain), weights) <= 1e-6
    else:
        assert relative(read_weights(checkpoint), target_value[0]) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), FULL, ids=ids(FULL))
def test_log_has_norm_rate_and_tokens(trained, world, case):
    """The norm is that before clipping and counts every expert once, however many ranks hold it."""
    untie, _, domains, _ = case
    per_domain = per_domain_of(case)
    log = (trained(world) / name_of(case) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    target_value = expected(untie, STEPS, per_domain, CLIP, DOMAINS[:domains])
    norms = (target_value["law"] if untie == "all" else target_value)[1]  # rank 0 trains law
    assert [record["step"] for record in records] == [2, 4]
    assert [r["grad_norm"] for r in records] == pytest.approx([norms[1], norms[3]], rel=2e-6)
    assert min(norms) > CLIP  # so clipping took part
    # The rate of a step is that of the number of steps before it: warm-up 2, end 10.
    assert [r["lr"] for r in records] == pytest.approx([PEAK / 2, PEAK * 7 / 8])
    tokens = [
        sum(
            make_batch(domain, step, index)["tokens"]
            for domain in DOMAINS[:domains]
            for step in range(last)
            for index in range(per_domain)
        )
        for last in (2, 4)
    ]
    assert [r["tokens"] for r in records] == tokens


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), HALF, ids=ids(HALF))
def test_bf16_moves_the_masters_alike(trained, world, case):
    """Up to 1.5 % of the movement (root mean square) from the reference's, which is in float32.

    The masters start from weights rounded to bf16, as the engine casts the model first.
    """
    untie, _, domains, _ = case
    checkpoint = trained(world) / name_of(case) / "checkpoints" / f"step-{STEPS}"
    arguments = (per_domain_of(case), CLIP, DOMAINS[:domains])
    before = expected(untie, 0, *arguments)
    after = expected(untie, STEPS, *arguments)
    if untie != "all":
        before, after = {"": before}, {"": after}
    got = masters(checkpoint)
    error = moved = 0.0
    for domain, (weights, _) in after.items():
        for name, weight in weights.items():
            start = before[domain][0][name]
            mine = got[f"{domain}:{name}" if domain else name].view_as(weight)
            movement = mine - start.bfloat16().float()
            error += float((movement - (weight - start)).square().sum())
            moved += float((weight - start).square().sum())
    assert (error / moved) ** 0.5 < 0.015


@pytest.mark.slow
def test_shared_weights_do_not_depend_on_the_world(trained):
    """Rank counts 1, 2 and 4 agree with each other about as well as with the reference."""
    case = ("feedforward", 2, 4, "fp32")
    item, *others = (
        read_weights(trained(world) / name_of(case) / "checkpoints" / f"step-{STEPS}")
        for world in (1, 2, 4)
    )
    for other in others:
        assert relative(other, item) <= 1e-6
