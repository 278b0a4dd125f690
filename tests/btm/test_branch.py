"""Branching: what a run goes on with, against what its parents were."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_models import make_model
from train.tiny_runs import DOMAINS, batches_of, masters, run_tiny

from megamod.btm.branch import write_branch_checkpoint
from megamod.btm.parents import (
    ParentModel,
    find_parent,
    resolve_parent_weights,
    select_checkpoint,
    select_forest_parents,
)
from megamod.errors import UserError
from megamod.states.forest import Expert, edit_forest
from megamod.states.manifest import find_file_faults, write_model_manifests
from megamod.states.weights import extract_expert_weights, read_weights

KINDS = ("master", "exp_avg", "exp_avg_sq")


def train_parents(rank: int, root: Path) -> None:
    """Checkpoints of a dense, a DEMix and a one-world BTM run, on two ranks."""
    for name, untie, stage in (
        ("dense", "none", 1),
        ("demix", "feedforward", 2),
        ("btm", "all", 1),
    ):
        domains = DOMAINS[:2] if untie == "all" else DOMAINS
        run_tiny(root / name, untie, stage, 3, save_steps=1, domains=domains)


def go_on(rank: int, root: Path) -> dict[str, object]:
    """Branch off step 2 of two dense runs, and make the steps after it by the real loop."""
    write_branch_checkpoint(
        [find_parent(root / "dense", step=2)], [1.0], [DOMAINS[0]], root / "same"
    )

    def same_data(topology):
        # A branch begins its data anew; here they go on where those of the parent did.
        return lambda step: batches_of(topology, 2)(step + 2)

    _, state, _ = run_tiny(root / "same", "none", 0, 3, save_steps=1, batches=same_data)
    run_tiny(root / "straight", "none", 1, 5, save_steps=1)
    write_branch_checkpoint([find_parent(root / "straight", step=2)], [1.0], ["law"], root / "bent")
    run_tiny(root / "bent", "none", 1, 5, save_steps=1, batches=same_data)
    return vars(state) | {"refused": refusals(root)}


def refusals(root: Path) -> dict[str, str]:
    """Return the loop's message on branched checkpoints that do not fit its run."""
    law = make_model(root / "model", domains=["law"])
    small = write_branch_checkpoint([ParentModel(law)], [1.0], ["law"], root / "small")
    scheduled = write_branch_checkpoint(
        [find_parent(root / "dense")], [1.0], ["law"], root / "scheduled"
    )
    output = {}
    for name, checkpoint, untie, settings in (
        ("shape", small, "none", {"seed": 7}),
        ("schedule", scheduled, "none", {"seed": 7, "max_steps": 20}),
        ("untie", scheduled, "all", {"seed": 7}),
    ):
        try:
            build = dict(settings=settings, domains=DOMAINS[:1])
            run_tiny(root / f"no-{name}", untie, 1, 4, resume=str(checkpoint), **build)
        except UserError as error:
            output[name] = str(error)
    return output


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    root = tmp_path_factory.mktemp("parents")
    on_ranks(2, train_parents, root)
    return root


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def state_of(checkpoint: Path) -> dict[str, object]:
    return json.loads((checkpoint / "state.json").read_text())


@pytest.mark.slow
def test_a_branch_goes_on_as_its_parent_did(parents):
    """Two ranks at stage 1 made the parent; one rank without ZeRO goes on, to rounding."""
    (state,) = on_ranks(1, go_on, parents)
    assert state["step"] == 3 and state["data_step"] == 1
    mine, straight = (parents / name / "checkpoints" / "step-3" for name in ("same", "dense"))
    for kind in KINDS:
        ours, theirs = masters(mine, kind), masters(straight, kind)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.allclose(ours[name], tensor, rtol=1e-4, atol=1e-7), (kind, name)
    # On as many ranks as its parent, and at its stage, a branch is the same to the bit.
    bent, straight = (parents / name / "checkpoints" / "step-5" for name in ("bent", "straight"))
    for kind in KINDS:
        ours, theirs = masters(bent, kind), masters(straight, kind)
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()), kind
    assert "vocab_size: 23 there, 40 now" in state["refused"]["shape"]
    # The seed may differ, but not where the schedule stands.
    assert "max_steps: None then, 20 now" in state["refused"]["schedule"]
    assert "seed" not in state["refused"]["schedule"]
    assert "another --untie" in state["refused"]["untie"]


@pytest.mark.slow
def test_one_parent_keeps_optimizer_step_and_schedule(parents, tmp_path):
    parent = parents / "dense" / "checkpoints" / "step-2"
    folder = write_branch_checkpoint(
        [find_parent(parents / "dense", step=2)], [1.0], ["law"], tmp_path / "law"
    )
    assert folder == tmp_path / "law" / "checkpoints" / "step-2" and find_file_faults(folder) == []
    for kind in KINDS:
        ours, theirs = masters(folder, kind), masters(parent, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], t) for name, t in read_weights(parent).items())
    then, now = state_of(parent), state_of(folder)
    assert now["optimizer_steps"] == then["optimizer_steps"] == 2.0
    assert now["state"]["step"] == 2
    assert (now["state"]["data_step"], now["state"]["tokens"]) == (0, {})
    assert json.loads((folder / "config.json").read_text())["domains"] == ["law"]
    record = json.loads((tmp_path / "law" / "branch.json").read_text())
    assert record["start_update"] == 2 and record["parents"] == [
        {"path": str(parent), "weight": 1.0}
    ]
    source = [find_parent(parents / "dense", step=2)]
    faster = write_branch_checkpoint(source, [1.0], ["law"], tmp_path / "faster", learning_rate=0.5)
    assert state_of(faster)["settings"] == {**now["settings"], "learning_rate": 0.5}


@pytest.mark.slow
def test_weights_without_optimizer_are_named(parents, tmp_path):
    """A run that trained a part of its weights has no optimizer for the others."""
    copy = Path(shutil.copytree(parents / "dense" / "checkpoints" / "step-3", tmp_path / "best"))
    for file in copy.glob("optimizer-*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            starts = {n: start for n, start in tensors.metadata().items() if "fc1.bias" not in n}
        kept = {n: t for n, t in load_file(file).items() if n.split("/", 1)[1] in starts}
        save_file(kept, file, starts)
    with pytest.raises(UserError, match=r"holds 0 of the 64 elements of .*fc1\.bias"):
        write_branch_checkpoint(
            [ParentModel(copy, None, 3)], [1.0], ["law"], tmp_path / "runs" / "law"
        )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_member_becomes_a_whole_model(parents, tmp_path):
    parent = parents / "demix" / "checkpoints" / "step-3"
    folder = write_branch_checkpoint(
        [find_parent(parents / "demix", member="code")], [1.0], ["code"], tmp_path / "a"
    )
    assert find_file_faults(folder) == []
    target_value = extract_expert_weights(read_weights(parent), "code")
    got = load_file(folder / "model.safetensors")
    assert got.keys() == target_value.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in target_value.items())
    for kind in KINDS:
        expected = extract_expert_weights(masters(parent, kind), "code")
        ours = masters(folder, kind)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert json.loads((folder / "config.json").read_text())["untie"] == "none"


@pytest.mark.slow
def test_worlds_are_left_and_entered(parents, tmp_path):
    """From one of the independent models of a job to a model of its own, and back into a job."""
    parent = parents / "btm" / "checkpoints" / "step-3"
    name = DOMAINS[1]
    alone = write_branch_checkpoint(
        [find_parent(parents / "btm", member=name)], [1.0], [name], tmp_path / "alone"
    )
    prefix = f"{name}:"
    for kind in KINDS:
        theirs = {n: t for n, t in masters(parent, kind).items() if n.startswith(prefix)}
        ours = masters(alone, kind)
        assert {prefix + n for n in ours} == theirs.keys()
        assert all(torch.equal(ours[n.removeprefix(prefix)], t) for n, t in theirs.items())
    source = ParentModel(alone, None, 3)
    world = write_branch_checkpoint(
        [source], [1.0], ["x", "y"], tmp_path / "world", in_one_job=True
    )
    assert find_file_faults(world) == []
    for kind in KINDS:
        ours, theirs = masters(world, kind), masters(alone, kind)
        assert ours.keys() == {f"{d}:{n}" for d in "xy" for n in theirs}
        assert all(torch.equal(t, theirs[n.split(":")[1]]) for n, t in ours.items())
    for domain in "xy":
        assert json.loads((world / domain / "config.json").read_text())["domains"] == [domain]
        assert state_of(world / domain)["state"]["step"] == 3


def test_an_average_begins_afresh(tmp_path):
    models = [make_model(tmp_path / name, domains=[name]) for name in ("law", "med")]
    folder = write_branch_checkpoint(
        [ParentModel(m) for m in models], [0.25, 0.75], ["tax"], tmp_path / "tax"
    )
    assert folder.name == "step-0" and find_file_faults(folder) == []
    law, med = (read_weights(model) for model in models)
    expected = {name: 0.25 * law[name].double() + 0.75 * med[name].double() for name in law}
    got, start = load_file(folder / "model.safetensors"), masters(folder)
    assert got.keys() == expected.keys() == start.keys()
    for name, tensor in expected.items():
        assert torch.allclose(got[name].double(), tensor, atol=1e-7)
        assert torch.equal(start[name], got[name].flatten())
    assert not masters(folder, "exp_avg")  # a run takes moments that are missing as zero
    assert state_of(folder)["optimizer_steps"] == 0.0


def test_a_published_model_with_its_manifest_is_a_parent(tmp_path):
    seed = make_model(tmp_path / "run" / "model")
    write_model_manifests(seed)
    parent = find_parent(seed)
    assert parent == ParentModel(seed)
    folder = write_branch_checkpoint([parent], [1.0], ["law"], tmp_path / "law")
    assert folder.name == "step-0" and find_file_faults(folder) == []
    with pytest.raises(UserError, match="is a model folder"):
        find_parent(seed, step=1)


def test_the_checkpoint_is_the_nearest(tmp_path):
    for step in (10, 20, 40, 80):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)

    def chosen(**choice):
        return int(select_checkpoint(tmp_path, **choice).name[5:])

    assert [chosen(step=step) for step in (-1, 0, 14, 15, 16, 31, 1000)] == [
        80,
        10,
        10,
        10,
        20,
        40,
        80,
    ]
    # Shares of 80: 30 lies between 20 and 40, 60 between 40 and 80.
    assert [chosen(step_share=share) for share in (0.0, 0.375, 0.5, 0.75, 1.0)] == [
        10,
        20,
        40,
        80,
        80,
    ]
    assert chosen() == 80
    assert select_checkpoint(tmp_path / "other") is None


def test_experts_of_a_forest_are_parents(tmp_path):
    law = make_model(tmp_path / "law", domains=["law"])
    mixed = make_model(tmp_path / "mixed", "feedforward")
    with edit_forest(tmp_path) as experts:
        experts += [
            Expert(domain="law", path=law),
            Expert(domain="code", path=mixed, member="code"),
            Expert(domain="art", path=mixed, member="art"),
        ]
    sources, weights = select_forest_parents(tmp_path, weights=[0.2, 0.5, 0.3], topk=2)
    assert sources == [ParentModel(mixed, "code"), ParentModel(mixed, "art")] and weights == [
        0.5,
        0.3,
    ]
    prior = {"format": 1, "domains": ["art", "code", "law"], "prior": [0.75, 0.0, 0.25]}
    (tmp_path / "prior.json").write_text(json.dumps(prior | {"rule": "history", "text": {}}))
    sources, weights = select_forest_parents(tmp_path, prior=tmp_path / "prior.json")
    assert sources == [ParentModel(law), ParentModel(mixed, "art")] and weights == [0.25, 0.75]
    with edit_forest(tmp_path) as experts:
        experts.append(
            Expert(domain="new", path=mixed, member="law")
        )  # of whom the prior does not know
    known = select_forest_parents(
        tmp_path, only_domains=["art", "code", "law"], prior=tmp_path / "prior.json", topk=1
    )
    assert known == ([ParentModel(mixed, "art")], [0.75])


def test_bad_choices_are_refused_and_change_nothing(tmp_path):
    law = make_model(tmp_path / "law", domains=["law"])
    mixed = make_model(tmp_path / "mixed", "feedforward")
    wide = make_model(tmp_path / "wide", domains=["wide"], vocab_size=31)
    (tmp_path / "begun" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "state.json").write_text("{}")
    before = tree(tmp_path)
    cases = [
        (lambda: find_parent(law, step=3), "a model folder, so --step"),
        (lambda: find_parent(tmp_path / "best", step_share=0.5), "a single checkpoint, so --step"),
        (lambda: find_parent(tmp_path / "best"), "not a complete checkpoint"),
        (lambda: find_parent(tmp_path / "gone"), "no run, no checkpoint and no model"),
        (lambda: find_parent(tmp_path / "empty"), "no checkpoint yet"),
        (lambda: find_parent(tmp_path / "begun"), "not a complete checkpoint"),
        (lambda: find_parent(mixed), "--member must be one of law, code, art$"),
        (lambda: find_parent(law, member="law"), "one dense model"),
        (lambda: select_forest_parents(mixed, only_domains=["tax"]), "no expert of domain 'tax'"),
        (lambda: select_forest_parents(mixed, topk=9), "--topk 9: there are only 3 experts"),
        (lambda: resolve_parent_weights([1.0], 2), "1 weights for 2 parents"),
        (lambda: resolve_parent_weights([1.0, -1.0], 2), "sum not 0"),
        (lambda: resolve_parent_weights([float("nan")], 1), "finite"),
        (
            lambda: write_branch_checkpoint([ParentModel(law)], [1], ["a"], tmp_path / "begun"),
            "has checkpoints already",
        ),
        (
            lambda: write_branch_checkpoint([ParentModel(law)], [1], ["a", "b"], tmp_path / "new"),
            "one domain",
        ),
        (
            lambda: write_branch_checkpoint(
                [ParentModel(law)], [1], ["../a"], tmp_path / "new", in_one_job=True
            ),
            "--domain: '../a' is not made of letters",
        ),
        (
            lambda: write_branch_checkpoint(
                [ParentModel(law), ParentModel(wide)], [1, 1], ["a"], tmp_path / "new"
            ),
            "vocab_size",
        ),
    ]
    for attempt, message in cases:
        with pytest.raises(UserError, match=message):
            attempt()
    assert tree(tmp_path) == before and not (tmp_path / "new").exists()
