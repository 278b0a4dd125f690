"""Uncertainty sampling against the original program, and its rules by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamod.nn.task_heads import TaskHeads
from megamod.train.selection import (
    REGRESSION_RULES,
    average_entropy_by_task,
    score_uncertainty,
    select_most_uncertain,
)

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "camtl"
CASES = sorted(item.name for item in GOLDEN.glob("sampler_*"))
KINDS = {"sts-b": "regression"}


@pytest.mark.parametrize("case", CASES or ["none recorded"])
def test_every_recorded_step(case):
    if not CASES:
        pytest.skip(f"recorded tensors are not at {GOLDEN}")
    config = json.loads((GOLDEN / case / "config.json").read_text())
    io = load_file(GOLDEN / case / "io.safetensors")
    tasks, sizes = config["tasks"], config["num_labels"]
    kinds = [KINDS.get(task, "sequence") for task in tasks]
    heads = TaskHeads(1, sizes, kinds, 0.0)
    for step in range(config["steps"]):
        of = {k.split(".", 1)[1]: v for k, v in io.items() if k.startswith(f"step{step}.")}
        task_of = of["candidate_task"].long()
        rows = torch.full((len(task_of), max(sizes)), torch.finfo(torch.float32).min)
        for task, size in enumerate(sizes):
            if f"logits.task{task}" in of:
                rows[task_of == task, :size] = of[f"logits.task{task}"]
        entropy = heads.compute_entropy(rows, None, task_of)
        assert (entropy - of["entropy"]).abs().max() <= 1e-6
        means = average_entropy_by_task(entropy, task_of, len(tasks))
        assert (means[task_of] - of["entropy_task_mean"]).abs().max() <= 1e-6
        assert abs(means.max() - of["max_task_mean"]) <= 1e-6
        scores = score_uncertainty(entropy, task_of, tasks, kinds, regression="release")
        assert (scores - of["score"]).abs().max() <= 1e-6
        chosen = select_most_uncertain(scores, config["train_batch_size"])
        recorded = of["chosen_index"].long()
        assert torch.allclose(scores[chosen], of["score"][recorded], atol=1e-6)
        if len(of["score"].unique()) == len(of["score"]):
            assert torch.equal(chosen, recorded)


ENTROPY = torch.tensor([0.9, 0.5, 0.2, 0.4, 0.0, 0.0, 0.0])
TASK_OF = torch.tensor([0, 0, 1, 1, 2, 2, 2])
NAMES, OF_KIND = ("mrpc", "rte", "sts-b"), ("sequence", "sequence", "regression")


def test_release_rule_by_hand():
    result = score_uncertainty(ENTROPY, TASK_OF, NAMES, OF_KIND, regression="release")
    expected = [0.9, 0.5, 0.2 * 0.3 / 0.7, 0.4 * 0.3 / 0.7, 0.9, 0.5, 0.0]
    assert torch.allclose(result, torch.tensor(expected))
    assert select_most_uncertain(result, 3).tolist() == [0, 4, 1]


def test_paper_rule_ranks_by_entropy_alone():
    result = score_uncertainty(ENTROPY, TASK_OF, NAMES, OF_KIND, rule="paper", regression="release")
    assert torch.allclose(result[:4], ENTROPY[:4] / 0.7)


def test_a_regression_is_worth_the_mean_of_the_others():
    result = score_uncertainty(ENTROPY, TASK_OF, NAMES, OF_KIND, regression="mean")
    others = (0.9 + 0.5 + (0.2 + 0.4) * 0.3 / 0.7) / 4
    assert torch.allclose(result[4:], torch.full((3,), others))


def test_a_regression_borrows_from_all_classifications():
    names = ("mrpc", "rte", "other")
    result = score_uncertainty(ENTROPY, TASK_OF, names, OF_KIND)
    # The 1st, 2nd and 3rd of three rows stand for the 1st, 2nd and 3rd of four: 0 * 4 // 3, ...
    assert torch.allclose(result[4:], torch.tensor([0.9, 0.5, 0.2 * 0.3 / 0.7]))
    as_released = score_uncertainty(ENTROPY, TASK_OF, NAMES, OF_KIND)
    assert torch.allclose(as_released[4:], torch.tensor([0.9, 0.5, 0.0]))


def test_sure_of_everything():
    nothing = torch.zeros(3)
    only = torch.tensor([2, 2, 2])
    for regression in REGRESSION_RULES:
        result = score_uncertainty(nothing, only, NAMES, OF_KIND, regression=regression)
        assert torch.equal(result, nothing)
    assert select_most_uncertain(nothing, 2).tolist() == [0, 1]
