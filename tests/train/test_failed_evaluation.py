"""An evaluation that fails, on all ranks or on one, loses no step and leaves no rank waiting."""

import logging
import warnings
from pathlib import Path

import pytest
import torch
from failures import disk_full
from ranks import on_ranks
from safetensors.torch import load_file
from train.tiny_runs import DOMAINS, run_tiny

from megamod.dist.process import get_rank, sum_over_ranks
from megamod.errors import PeerError, UserError

CASES = {
    "dense-zero1": ("none", 1, 4),
    "dense-zero3": ("none", 3, 4),
    "demix-zero2": ("feedforward", 2, 4),
    "btm-zero1": ("all", 1, 2),
}
FAULTS = {"disk": disk_full, "memory": MemoryError, "bug": lambda: KeyError("score")}
FAILING = {"rank 0": (0,), "rank 1": (1,), "both": (0, 1)}
PATTERNS = {
    "dense-zero1": [
        *(("rank 0", kind, after) for kind in FAULTS for after in (False, True)),
        *(("rank 1", "disk", False), ("rank 1", "disk", True), ("both", "disk", False)),
    ],
    "dense-zero3": [("both", "disk", False)],  # of one rank alone: the others end when it exits
    "demix-zero2": [("rank 1", "bug", True), ("rank 1", "disk", False)],
    "btm-zero1": [("rank 0", "memory", False), ("rank 1", "disk", True)],
}
LAST, AT = 5, 3  # steps of a run; evaluations at AT and LAST


class Evaluation:
    """Remembers the steps of evaluations that ended; can fail before or after its collective."""

    def __init__(self, fault=None, after: bool = False):
        self.fault, self.after, self.steps = fault, after, []

    def __call__(self, step: int) -> None:
        if self.fault is not None and not self.after:
            raise self.fault()
        ranks = torch.ones(1)
        sum_over_ranks(ranks)
        assert ranks.item() == 2
        if self.fault is not None and self.after:
            raise self.fault()
        self.steps.append(step)


def attempt(root: Path, name: str, evaluation: Evaluation, **options) -> tuple[str, str]:
    """Type and message of the error that a run ends with, if any."""
    untie, stage, domains = CASES[name.split("/")[0]]
    # One domain for each rank in BTM, twice the micro-batches then.
    options |= dict(domains=DOMAINS[:domains], per_domain=4 // domains, eval_steps=AT)
    try:
        run_tiny(root / name, untie, stage, LAST, evaluate=evaluation, **options)
    except (UserError, PeerError, KeyError) as error:
        return type(error).__name__, str(error)
    return "", ""


def drill(_: int, root: Path) -> dict[str, tuple]:
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    seen = {}
    for case in CASES:
        calm = Evaluation()
        assert attempt(root, f"{case}/calm", calm) == ("", "")
        assert calm.steps == [AT, LAST]
        for failing, kind, after in PATTERNS[case]:
            name = f"{case}/{failing}-{kind}-{after}"
            first = Evaluation(FAULTS[kind] if get_rank() in FAILING[failing] else None, after)
            error = attempt(root, name, first)
            saved = sorted(p.name for p in (root / name / "checkpoints").glob("step-*"))
            second = Evaluation()
            seen[name] = error, saved, attempt(root, name, second), second.steps
    return seen


@pytest.fixture(scope="module")
def drilled(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluations")
    return root, on_ranks(2, drill, root)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    folder = folder / "checkpoints" / f"step-{LAST}"
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{file.relative_to(folder)}/{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def test_every_rank_ends_with_the_error_and_a_checkpoint(drilled):
    _, seen = drilled
    for of_rank, (number, others) in zip(seen, ((0, seen[1]), (1, seen[0])), strict=True):
        for name, ((kind, message), saved, *_) in of_rank.items():
            assert saved == [f"step-{AT}"], name
            if "-bug-" in name:
                failed = number in FAILING[name.split("/")[1].split("-")[0]]
                assert kind == ("KeyError" if failed else "PeerError"), name
                continue
            assert kind == "UserError" and others[name][0][0] == "UserError", name
            assert message.startswith(f"the evaluation after step {AT} failed: "), message
            assert f"{name}/checkpoints" in message, message
            if "-disk-" in name:
                assert "No space left on device" in message


def test_the_same_command_repeats_the_evaluation_and_goes_on_bit_for_bit(drilled):
    root, seen = drilled
    for name, (*_, resumed, steps) in seen[0].items():
        assert (resumed, steps) == (("", ""), [AT, LAST]), name
        calm, went = tensors(root / name.split("/")[0] / "calm"), tensors(root / name)
        assert calm and calm.keys() == went.keys()
        assert all(torch.equal(tensor, went[key]) for key, tensor in calm.items()), name
    assert not list(root.rglob("evaluating"))


def test_shared_forward_passes_are_saved_before(drilled):
    """With ZeRO 3 a checkpoint is written before an evaluation, as none can be written after."""
    root, _ = drilled
    for case, steps in (("dense-zero3", [AT, LAST]), ("dense-zero1", [LAST])):
        folder = root / case / "calm" / "checkpoints"
        assert sorted(p.name for p in folder.glob("step-*")) == [f"step-{s}" for s in steps]
