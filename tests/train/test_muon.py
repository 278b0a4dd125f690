"""Muon: one step by hand, its groups, several ranks against one process, and resuming."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.tiny_hosts import tiny_stock
from ranks import on_ranks
from train.tiny_runs import (
    DOMAINS,
    MUON_SCALE,
    PEAK,
    RECIPE,
    WARMUP,
    make_batch,
    masters,
    model_of,
    run_tiny,
)

from megamod.args import OptimArgs
from megamod.errors import UserError
from megamod.states.weights import read_weights
from megamod.train.deepspeed_settings import apply_muon_rules
from megamod.train.hidden_matrices import mark_hidden_matrices
from megamod.train.optim import make_adamw, make_linear_schedule, set_learning_rate

PAIR, STEPS = DOMAINS[:2], 3
ON_TWO_RANKS = [
    *[("none", stage) for stage in (0, 1, 2, 3)],
    *[("feedforward", stage) for stage in (1, 2)],
    *[("all", stage) for stage in (1, 2, 3)],
]


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz of Jordan et al. 2024: five times x <- a x + (b x x' + c (x x')^2) x."""
    x = matrix.double()
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if transposed else x).float()


class MuonByHand:
    """Momentum 0.95 with look-ahead, orthogonalized; decoupled weight decay."""

    def __init__(self, matrices: list[torch.nn.Parameter]):
        self.matrices = matrices
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
            momentum.mul_(0.95).add_(0.05 * matrix.grad)
            ahead = 0.05 * matrix.grad + 0.95 * momentum
            rows, columns = matrix.shape
            matrix.mul_(1 - rate * RECIPE["weight_decay"])
            matrix.sub_(rate * max(1, rows / columns) ** 0.5 * orthogonal(ahead))


def by_hand(untie: str, domains: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Weights after some steps of the joint objective, in one process without DeepSpeed."""
    _, model = model_of("none" if untie == "all" else untie, domains)
    model.train()
    mark_hidden_matrices(model)
    hidden = [p for p in model.parameters() if p.use_muon]
    muon, rest = (
        MuonByHand(hidden),
        make_adamw([p for p in model.parameters() if not p.use_muon], **RECIPE),
    )
    schedule = make_linear_schedule(PEAK, WARMUP, 10)
    for step in range(STEPS):
        batches = [make_batch(d, step, i) for d in domains for i in range(2)]
        items = sum(batch["tokens"] for batch in batches)
        for batch in batches:
            model(
                batch["input_ids"],
                attention_mask=batch["attention_mask"],
                shift_labels=batch["labels"],
                num_items_in_batch=items,
                domain=DOMAINS[batch["domain"]] if untie == "feedforward" else None,
            ).loss.backward()
        set_learning_rate(rest, schedule(step))
        rest.step()
        muon.step(MUON_SCALE * schedule(step))
        model.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def train(folder: Path, untie: str, stage: int, steps: int, **more):
    return run_tiny(folder, untie, stage, steps, domains=PAIR, clip=0.0, muon=True, **more)


def on_two(rank: int, base: Path) -> None:
    """Runs to the end, and runs that stop after the second step and go on."""
    for untie, stage in ON_TWO_RANKS:
        folder = base / f"{untie}-{stage}"
        train(folder / "whole", untie, stage, STEPS)
        train(folder / "cut", untie, stage, STEPS - 1)
        train(folder / "cut", untie, stage, STEPS)
    for stage in (1, 3):
        folder = base / f"bf16-{stage}"
        train(folder / "whole", "none", stage, STEPS, precision="bf16")
        train(folder / "cut", "none", stage, STEPS - 1, precision="bf16")
        train(folder / "cut", "none", stage, STEPS, precision="bf16")


class PoisonedObjective:
    """Losses of the third step are not finite."""

    def __init__(self, objective):
        self.objective, self.calls = objective, 0
        self.domains, self.count_items = objective.domains, objective.count_items

    def compute_loss(self, *arguments):
        scored = self.objective.compute_loss(*arguments)
        self.calls += 1
        step = (self.calls - 1) // (2 * len(PAIR))  # one rank has two micro-batches of each domain
        return replace(scored, loss=scored.loss * float("nan")) if step == 2 else scored


def on_one(rank: int, base: Path) -> None:
    """Checkpoints of two ranks go on, on one rank and at another stage; steps are skipped."""
    for stage in (0, 1, 3):
        poisoned = dict(wrap_objective=PoisonedObjective, nonfinite="skip", save_steps=1)
        train(base / f"skipped-{stage}", "none", stage, STEPS, **poisoned)
    for untie, stage, other in (("none", 1, 0), ("none", 3, 2), ("feedforward", 2, 1)):
        start = base / f"{untie}-{stage}" / "cut" / "checkpoints" / f"step-{STEPS - 1}"
        train(base / f"{untie}-{stage}" / "moved", untie, other, STEPS, resume=str(start))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("muon")
    on_ranks(2, on_two, base)
    on_ranks(1, on_one, base)
    return base


def weights_of(run: Path, untie: str, domain: str) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{STEPS}"
    return read_weights(folder / domain if untie == "all" else folder)


@pytest.mark.slow
@pytest.mark.parametrize(("untie", "stage"), ON_TWO_RANKS)
def test_two_ranks_train_as_one_process(runs, untie, stage):
    for domain in PAIR if untie == "all" else PAIR[:1]:
        expected = by_hand(untie, (domain,) if untie == "all" else PAIR)
        trained = weights_of(runs / f"{untie}-{stage}" / "whole", untie, domain)
        for name, tensor in trained.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"{u}-{s}" for u, s in ON_TWO_RANKS), "bf16-1", "bf16-3"])
def test_a_resumed_run_is_the_same_to_the_bit(runs, name):
    whole, cut = (runs / name / kind / "checkpoints" / f"step-{STEPS}" for kind in ("whole", "cut"))
    for kind in ("master", "exp_avg", "momentum"):
        ours, theirs = masters(cut, kind), masters(whole, kind)
        assert ours.keys() == theirs.keys() and ours
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items()), kind
    hidden, vectors = masters(whole, "momentum"), masters(whole, "exp_avg")
    assert not hidden.keys() & vectors.keys()
    assert hidden.keys() | vectors.keys() == masters(whole).keys()


@pytest.mark.slow
@pytest.mark.parametrize(("untie", "stage"), [("none", 1), ("none", 3), ("feedforward", 2)])
def test_a_run_goes_on_with_another_number_of_ranks(runs, untie, stage):
    moved, whole = (
        weights_of(runs / f"{untie}-{stage}" / kind, untie, "") for kind in ("moved", "whole")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(moved[name], tensor, rtol=0, atol=2e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_skipped_step_changes_nothing(runs, stage):
    before, after = (runs / f"skipped-{stage}" / "checkpoints" / f"step-{n}" for n in (2, 3))
    for kind in ("master", "exp_avg", "momentum"):
        ours, theirs = masters(after, kind), masters(before, kind)
        assert ours.keys() == theirs.keys() and ours
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()), kind


def test_hidden_matrices_are_those_between_embeddings_and_head():
    stock = {
        family: tiny_stock(family, tie_word_embeddings=False)
        for family in ("llama", "gpt2", "opt", "biogpt")
    }
    for model in (
        *stock.values(),
        model_of("feedforward", PAIR)[1],
        model_of("input_output", PAIR)[1],
    ):
        mark_hidden_matrices(model)
        for name, parameter in model.named_parameters():
            inside = ".layers." in name or ".h." in name
            assert parameter.use_muon == (inside and parameter.dim() == 2), name


def test_what_is_refused():
    config = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.0}
    apply_muon_rules(config)
    assert config["zero_optimization"]["reduce_scatter"] is False
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for change, text in (
        ({"gradient_clipping": 0.1}, "would scale down"),
        ({"fp16": {"enabled": True}}, "several loss scales"),
        ({"zero_optimization": offload}, "offload_optimizer is not supported"),
    ):
        with pytest.raises(UserError, match=text):
            apply_muon_rules(config | change)
    with pytest.raises(UserError, match="--learning_rate is 0"):
        OptimArgs(optim="muon", learning_rate=0.0)
    with pytest.raises(UserError, match=r"muon_learning_rate 0\.1 has no effect"):
        OptimArgs(muon_learning_rate=0.1)
