import json
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from megamod.train.optim import (
    SCHEDULES,
    make_adamw,
    make_constant_schedule,
    make_cosine_schedule,
    make_linear_schedule,
    make_warmup_stable_decay_schedule,
    set_learning_rate,
)

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "demix_btm"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the recorded originals are not beside this folder")
def test_linear_is_the_recorded_schedule_of_the_demix_release():
    recorded = json.loads((GOLDEN / "lr_schedule" / "config.json").read_text())
    rate = make_linear_schedule(
        recorded["peak_lr"], recorded["warmup_updates"], recorded["total_num_update"]
    )
    assert [rate(step) for step in range(101)] == pytest.approx(recorded["lr"], rel=1e-12, abs=0)


def test_linear_goes_through_its_corners():
    rate = make_linear_schedule(1.0, 4, 20)
    assert [rate(n) for n in (0, 1, 4, 12, 20, 21)] == [0.0, 0.25, 1.0, 0.5, 0.0, 0.0]
    assert [make_linear_schedule(1.0, 0, 4)(n) for n in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert (
        make_linear_schedule(1.0, 4, 4)(4) == 1.0
    )  # a warm-up that fills the run ends at the peak


def test_constant_stays_at_its_peak():
    assert [make_constant_schedule(2.0, 4, 20)(n) for n in (0, 1, 4, 19)] == [0.0, 0.5, 2.0, 2.0]
    assert make_constant_schedule(2.0, 0, 20)(0) == 2.0
    assert set(SCHEDULES) == {"linear", "constant", "cosine", "warmup_stable_decay"}


def test_adamw_is_the_textbook_update():
    """Loshchilov and Hutter 2019, algorithm 2, in float64 by hand."""
    weight = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = make_adamw([weight], betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1)
    by_hand, first, second = weight.detach().clone(), torch.zeros(2), torch.zeros(2)
    for step, gradient in enumerate(([1.0, -0.5], [0.25, 0.0], [-3.0, 2.0]), start=1):
        gradient = torch.tensor(gradient, dtype=torch.float64)
        weight.grad = gradient.clone()
        rate = 0.01 * step
        set_learning_rate(optimizer, rate)
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        towards = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-7)
        by_hand = by_hand - rate * (towards + 0.1 * by_hand)
    assert torch.allclose(weight, by_hand, rtol=1e-10)


def test_rate_reaches_every_group():
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(3)]
    optimizer = make_adamw(groups, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * 3


def test_cosine_and_stable_decay_against_transformers():
    weight = torch.nn.Parameter(torch.zeros(1))
    for ours, theirs, more in (
        (make_cosine_schedule, "cosine", {}),
        (
            make_warmup_stable_decay_schedule,
            "warmup_stable_decay",
            {"num_decay_steps": 4, "num_stable_steps": 12, "decay_type": "linear"},
        ),
    ):
        optimizer = torch.optim.SGD([weight], lr=3.0)
        schedule = get_scheduler(theirs, optimizer, 4, 20, scheduler_specific_kwargs=more)
        rates = []
        for _ in range(21):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        rate = ours(3.0, 4, 20)
        assert [rate(n) for n in range(21)] == pytest.approx(rates, abs=1e-9)
