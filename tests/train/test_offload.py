"""An optimizer outside the accelerator makes the same steps, and its state is saved and resharded.

The state on a disk (ZeRO-Infinity) needs DeepSpeed's async_io operation, and so libaio.
"""

import logging
import os
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from ranks import on_ranks
from train.test_resume import tensors_of
from train.test_sharing import CLIP, STEPS, relative
from train.tiny_runs import DOMAINS, masters, reference, run_tiny

from megamod.states.weights import read_weights

OPTIMIZER = {"offload_optimizer": {"device": "cpu"}}
BOTH = {**OPTIMIZER, "offload_param": {"device": "cpu"}}
CASES = [("none", stage, OPTIMIZER) for stage in (1, 2, 3)]
CASES += [("none", 3, BOTH), ("feedforward", 1, OPTIMIZER), ("feedforward", 2, OPTIMIZER)]
CASES += [("all", 2, OPTIMIZER)]


def name_of(case: tuple[str, int, dict]) -> str:
    untie, stage, offload = case
    return f"{untie}-zero{stage}-{'-'.join(offload)}"


def train_cases(rank: int, root: Path) -> None:
    """Straight runs; runs cut after two steps; and runs that offload in their second half only."""
    logging.disable(logging.WARNING)
    for case in CASES:
        untie, stage, offload = case
        if untie == "all":
            options = dict(clip=CLIP, per_domain=2, domains=DOMAINS[:2])
        else:
            options = dict(clip=CLIP, per_domain=2)
        existing = dict(options, offload=offload)
        run_tiny(root / name_of(case), untie, stage, STEPS, **existing)
        run_tiny(root / f"{name_of(case)}-cut", untie, stage, 2, **existing)
        run_tiny(root / f"{name_of(case)}-cut", untie, stage, STEPS, **existing)
        run_tiny(root / f"{name_of(case)}-moved", untie, 1, 2, **options)
        run_tiny(root / f"{name_of(case)}-moved", untie, stage, STEPS, **existing)
    for stage in (2, 3):
        half = dict(clip=CLIP, per_domain=2, precision="bf16")
        run_tiny(root / f"half-{stage}", "none", stage, STEPS, **half)
        run_tiny(root / f"half-{stage}-off", "none", stage, STEPS, **half, offload=OPTIMIZER)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("offload")
    on_ranks(2, train_cases, root)
    return root


def last(folder: Path) -> Path:
    return folder / "checkpoints" / f"step-{STEPS}"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=map(name_of, CASES))
@pytest.mark.parametrize("way", ["", "-moved"])
def test_steps_are_those_of_the_joint_objective(trained, case, way):
    checkpoint = last(trained / (name_of(case) + way))
    if case[0] == "all":
        expected = reference("all", STEPS, 2, CLIP, DOMAINS[:2])
        for domain, (weights, _) in expected.items():
            assert relative(read_weights(checkpoint / domain), weights) <= 1e-6
    else:
        expected, _ = reference(case[0], STEPS, 2, CLIP)
        assert relative(read_weights(checkpoint), expected) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=map(name_of, CASES))
def test_a_resumed_run_has_equal_bits(trained, case):
    item = tensors_of(last(trained / name_of(case)))
    other = tensors_of(last(trained / f"{name_of(case)}-cut"))
    assert item.keys() == other.keys() and len(item) > 50
    assert [name for name, tensor in item.items() if not torch.equal(tensor, other[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_in_bf16_masters_are_those_of_a_run_without(trained, stage):
    first, other = (masters(last(trained / f"half-{stage}{end}")) for end in ("", "-off"))
    assert relative(other, first) <= 1e-6


def swap(rank: int, root: Path) -> None:
    """Runs with groups of parameters large enough to be swapped; the first one is not."""
    logging.disable(logging.WARNING)
    options = dict(clip=CLIP, per_domain=2, width=256, domains=DOMAINS[:2])
    disk = {"device": "nvme", "nvme_path": str(root / "disk")}
    existing = {"sub_group_size": 300_000, "offload_optimizer": disk}
    run_tiny(root / "memory", "none", 3, STEPS, **options)
    run_tiny(root / "disk-straight", "none", 3, STEPS, **options, offload=existing)
    assert list((root / "disk").rglob("*.swp"))
    run_tiny(root / "disk-cut", "none", 3, 2, **options, offload=existing)
    run_tiny(root / "disk-cut", "none", 3, STEPS, **options, offload=existing)
    run_tiny(root / "moved", "none", 3, 2, **options, offload=existing)
    run_tiny(root / "moved", "none", 1, STEPS, **options)


@pytest.mark.slow
def test_an_optimizer_on_a_disk(tmp_path):
    if not (installed_ops.get("async_io") or os.environ.get("MEGAMOD_BUILD_OPS")):
        pytest.skip(
            "DeepSpeed was installed without its async_io operation (DS_BUILD_AIO=1); where libaio "
            "is installed, MEGAMOD_BUILD_OPS=1 lets this test build it, which takes minutes"
        )
    get_accelerator().create_op_builder("AsyncIOBuilder").load()  # no rank waits for a compiler
    on_ranks(2, swap, tmp_path)
    straight = tensors_of(last(tmp_path / "disk-straight"))
    cut = tensors_of(last(tmp_path / "disk-cut"))
    files = {name.partition("/")[0] for name in straight}
    assert {"optimizer-0.safetensors", "optimizer-0-1.safetensors"} <= files
    assert [name for name, tensor in straight.items() if not torch.equal(tensor, cut[name])] == []
    for other in ("disk-straight", "moved"):
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            expected, got = (masters(last(tmp_path / run), kind) for run in ("memory", other))
            for values in (expected, got):
                for layer in (0, 1):  # its gradient is zero but for rounding
                    del values[f"model.layers.{layer}.attention.k_proj.bias"]
            assert relative(got, expected) <= 1e-5
