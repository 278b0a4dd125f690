"""Failures in the middle of a run, on two ranks."""

import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from train.tiny_runs import DOMAINS, batches_of, run_tiny

from megamod.errors import Interrupted, PolicyStop
from megamod.states.checkpoint_folder import TrainState
from megamod.train import loop as module

STEPS = 4  # micro-batches of a rank in a step, in all runs
CASES = {
    "dense-zero0": ("none", 0, "fp32", 4),
    "dense-zero1": ("none", 1, "fp32", 4),
    "dense-zero3": ("none", 3, "fp32", 4),
    "dense-zero1-bf16": ("none", 1, "bf16", 4),
    "dense-zero2-bf16": ("none", 2, "bf16", 4),
    "demix-zero1": ("feedforward", 1, "fp32", 4),
    "demix-zero2": ("feedforward", 2, "fp32", 4),
    "btm-zero1": ("all", 1, "fp32", 2),
}
COUPLED = [name for name in CASES if not name.startswith("btm")]
SPIKES = ("dense-zero0", "dense-zero3", "demix-zero1", "btm-zero1")


class Faulty:
    """An objective that does something in one micro-batch, counted from 0 over a process's run."""

    def __init__(self, objective, number: int, fault):
        self.objective, self.left, self.fault = objective, number, fault
        self.count_items = objective.count_items

    def compute_loss(self, *arguments):
        scored = self.objective.compute_loss(*arguments)
        self.left -= 1
        return self.fault(scored) if self.left == -1 else scored


def times(factor: float):
    """A fault that scales the loss and what is reported of it."""
    return lambda s: replace(s, loss=s.loss * factor, total=s.total * factor)


def terminate(scored):
    os.kill(os.getpid(), signal.SIGTERM)
    return scored


def skipping_data(topology):
    """Batches of data steps 0, 1, 4, 5, ..."""
    from_step = batches_of(topology, 2)

    def batches_from(step: int):
        assert step == 0
        first = from_step(0)
        for _ in range(2 * STEPS):
            yield next(first)
        yield from from_step(4)

    return batches_from


def drill(rank: int, root: Path) -> dict[str, tuple[str, str, int, int, int]]:
    """All runs; by name: what was raised, its message, step, data_step and skipped steps."""
    logging.disable(logging.ERROR)
    output = {}

    def attempt(name, case, last=4, number=2 * STEPS + 1, fault=None, rank_of_fault=1, **options):
        untie, stage, precision, domains = CASES[case]
        # One domain for each rank in BTM, twice the micro-batches then.
        options |= dict(domains=DOMAINS[:domains], per_domain=8 // domains, precision=precision)
        if fault and rank == rank_of_fault:
            options["wrap_objective"] = lambda objective: Faulty(objective, number, fault)
        raised, message, seen = "", "", (0, 0, 0)
        try:
            _, state, _ = run_tiny(root / f"{case}-{name}", untie, stage, last, **options)
            seen = state.step, state.data_step, state.skipped
        except (PolicyStop, Interrupted) as error:
            raised, message = type(error).__name__, str(error)
        output[f"{case}-{name}"] = (raised, message, *seen)

    for case in CASES:
        # Micro-batch 1 of step 3 on rank 1.
        attempt("skip", case, fault=times(float("nan")), nonfinite="skip", save_steps=1)
        attempt("stop", case, fault=times(float("inf")), nonfinite="stop", save_steps=1)
        attempt("straight", case, last=6)
        attempt("signal", case, last=6, fault=terminate)
        attempt("signal", case, last=6)
    for case in COUPLED:
        options = dict(nonfinite="rollback", save_steps=2)
        attempt("rollback", case, number=3 * STEPS, fault=times(float("nan")), **options)
        attempt("jump", case, batches=skipping_data)
    for case in SPIKES:
        options = dict(nonfinite="skip", save_steps=1, spike_factor=1.5)
        attempt("spike", case, fault=times(20.0), **options)
        attempt("calm", case, **options)
    # A skipped step is remembered: cut after it and go on.
    for case in ("dense-zero1", "btm-zero1"):
        options = dict(fault=times(float("nan")), nonfinite="skip")
        attempt("skipped", case, last=3, **options)
        attempt("skipped", case)
    return output


@pytest.fixture(scope="module")
def drilled(tmp_path_factory):
    root = tmp_path_factory.mktemp("loop")
    return root, on_ranks(2, drill, root)


def tensors_of(root: Path, run: str, step: int, part: str = "") -> dict[str, torch.Tensor]:
    folder = root / run / "checkpoints" / f"step-{step}"
    return {
        f"{file.relative_to(folder)}/{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if part in f"{file.relative_to(folder)}/{name}"
    }


def same(first: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == other.keys() and first
    return all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def state_of(root: Path, run: str, step: int) -> dict[str, object]:
    """Return the state saved with the weights; of independent models that of rank 1."""
    folder = root / run / "checkpoints" / f"step-{step}"
    return json.loads((folder / ("med" if "btm" in run else "") / "state.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", COUPLED)
def test_skip_leaves_weights_and_optimizer_as_they_were(drilled, case):
    root, output = drilled
    run = f"{case}-skip"
    assert same(tensors_of(root, run, 2), tensors_of(root, run, 3))
    assert not same(tensors_of(root, run, 3), tensors_of(root, run, 4))
    assert all(tensor.isfinite().all() for tensor in tensors_of(root, run, 4).values())
    two, three = state_of(root, run, 2), state_of(root, run, 3)
    assert two["optimizer_steps"] == three["optimizer_steps"] == 2.0
    assert three["state"]["skipped"] == 1
    for rank in (0, 1):  # the fault was on rank 1
        assert output[rank][run] == ("", "", 4, 4, 1)
    last = json.loads((root / run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == 1


@pytest.mark.slow
def test_skip_stays_in_its_own_domain(drilled):
    """With independent models only the one whose loss was not finite leaves the step out."""
    root, output = drilled
    two, three = (tensors_of(root, "btm-zero1-skip", step) for step in (2, 3))
    med = {name for name in two if "med" in name}
    assert med and all(torch.equal(two[name], three[name]) for name in med)
    assert not all(torch.equal(two[name], three[name]) for name in two.keys() - med)
    assert [of["btm-zero1-skip"][-1] for of in output] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_stop_saves_and_ends_on_every_rank(drilled, case):
    root, output = drilled
    for rank in (0, 1):
        raised, message, *_ = output[rank][f"{case}-stop"]
        assert raised == "PolicyStop"
        assert "not finite at step 3" in message and "--nonfinite" in message
    two, three = (tensors_of(root, f"{case}-stop", step) for step in (2, 3))
    assert same(two, three) == (case in COUPLED)  # of independent models one went on
    assert not (root / f"{case}-stop" / "checkpoints" / "step-4").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", COUPLED)
def test_rollback_goes_on_from_the_checkpoint_with_later_data(drilled, case):
    """Step 4 failed, step 2 was saved: data steps 2 and 3 are left out, bit for bit."""
    root, output = drilled
    for rank in (0, 1):
        assert output[rank][f"{case}-rollback"] == ("", "", 4, 6, 1)
    assert same(tensors_of(root, f"{case}-rollback", 4), tensors_of(root, f"{case}-jump", 4))


@pytest.mark.slow
@pytest.mark.parametrize("case", SPIKES)
def test_a_spike_counts_as_not_finite(drilled, case):
    root, output = drilled
    part = "med" if case.startswith("btm") else ""  # the fault was on rank 1
    two, three = (tensors_of(root, f"{case}-spike", step, part) for step in (2, 3))
    assert same(two, three)
    assert output[1][f"{case}-spike"] == ("", "", 4, 4, 1)
    assert output[1][f"{case}-calm"] == ("", "", 4, 4, 0)
    spike, calm = (state_of(root, f"{case}-{name}", 3)["state"] for name in ("spike", "calm"))
    # The spike did not enter the mean.
    assert spike["mean_loss"] == state_of(root, f"{case}-spike", 2)["state"]["mean_loss"]
    assert calm["mean_loss"] != state_of(root, f"{case}-calm", 2)["state"]["mean_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_a_signal_to_one_rank_saves_and_ends_all(drilled, case):
    root, _ = drilled
    # The signal came in step 3, is heard by all before step 4 (independent models: at the
    # next line of the log, after it).
    step = 4 if case.startswith("btm") else 3
    saved = sorted(path.name for path in (root / f"{case}-signal" / "checkpoints").glob("step-*"))
    assert saved == [f"step-{step}", "step-6"]
    straight, went = (tensors_of(root, f"{case}-{name}", 6) for name in ("straight", "signal"))
    assert same(straight, went)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense-zero1", "btm-zero1"])
def test_a_skipped_step_is_remembered(drilled, case):
    root, output = drilled
    straight, cut = (tensors_of(root, f"{case}-{name}", 4) for name in ("skip", "skipped"))
    assert same(straight, cut)
    assert [of[f"{case}-skipped"] for of in output] == [of[f"{case}-skip"] for of in output]


class Checkpoints:
    """Checkpoints that are saved or not, as the test says, and never written."""

    folder = Path("run/checkpoints")

    def __init__(self, works: bool = True):
        self.works = works
        self.histories = []

    def save(self, state, history):
        self.histories.append(history)
        return self.works


def test_a_failure_long_ago_does_not_count_against_a_checkpoint(monkeypatch):
    monkeypatch.setattr(module, "is_true_on_all_ranks", bool)
    for failed, sound in ((3, 500), (450, None)):
        checkpoints = Checkpoints()
        state = TrainState(500, 500, nonfinite_steps=[failed])
        saver = module._Saver(checkpoints, "continue", state)
        saver.record_step(True)
        saver.record_step(False)
        saver.save(TrainState(502, 502, nonfinite_steps=[failed, 502]))
        assert checkpoints.histories[0].sound == sound


def test_messages_claim_a_checkpoint_only_if_it_was_written(monkeypatch):
    monkeypatch.setattr(module, "is_true_on_all_ranks", bool)
    for works, step, text in (
        (True, 0, "no step was taken, so nothing was saved"),
        (True, 3, "a checkpoint of that step is in run/checkpoints"),
        (False, 3, "a checkpoint could not be written to run/checkpoints"),
    ):
        saver = module._Saver(Checkpoints(works), "continue", TrainState())
        state = TrainState(step, step)
        saver.save(state)
        assert saver.describe_checkpoint(state) == text
