"""Stock families on ranks: the steps of one process, and the folder that transformers reads."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from drills import stock_families
from drills.stock_families import (
    CLIP,
    LAYOUTS,
    TWO,
    find_weights,
    measure_deviation,
    name_case,
    train_in_one_process,
)
from models.tiny_hosts import tiny_stock
from ranks import on_ranks
from train.test_sharing import relative
from train.tiny_runs import masters, reference, run_tiny
from transformers import AutoModelForCausalLM

from megamod.models.lm.hosts import HOSTS
from megamod.states.weights import read_weights

STEPS = 3
# One family of each shape: transposed products, two attributes, softcap and tied head, two
# arguments, additions in place, persistent buffers.
SHAPES = ("llama", "gpt2", "opt", "gemma2", "bloom", "falcon", "apertus")
CASES = [
    *(("llama", "none", stage) for stage in (0, 1, 2, 3)),
    *(("gemma2", "none", stage) for stage in (3,)),
    *(("mixtral", "none", stage) for stage in (1,)),
    *((family, "feedforward", 2) for family in SHAPES),
    ("llama", "feedforward", 1),
    ("llama", "all", 1),
    ("gpt2", "all", 3),
]


def train_cases(rank: int, root: Path) -> None:
    for family, untie, stage in CASES:
        run_tiny(
            root / name_case((family, untie, stage)),
            untie,
            stage,
            STEPS,
            clip=CLIP,
            domains=TWO,
            family=family,
            save_steps=2 if (family, untie, stage) == RESUMED else 0,
        )
    # DeepSpeed refuses fp16 on processors without its instructions; torch computes it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    for precision, cases in HALF.items():
        for family, untie, stage in cases:
            folder = root / precision / name_case((family, untie, stage))
            options = dict(precision=precision, family=family, domains=TWO, clip=CLIP)
            run_tiny(folder, untie, stage, STEPS, **options)
    for stage in (0, 1, 2, 3):
        untie = "feedforward" if stage in (1, 2) else "none"
        run_tiny(root / f"bare-{stage}", untie, stage, STEPS, clip=CLIP, decay_vectors=False)
    # Cut after two steps: once as it was, once on other stages.
    family, untie, stage = RESUMED
    root = root / "resumed"
    run_tiny(root, untie, stage, 2, clip=CLIP, domains=TWO, family=family)
    run_tiny(root, untie, stage, STEPS, clip=CLIP, domains=TWO, family=family)


RESUMED = ("gemma2", "feedforward", 2)
HALF = {
    "bf16": [("gemma2", "feedforward", 2), ("llama", "none", 3)],
    "fp16": [("gemma2", "feedforward", 2), ("gpt2", "none", 1)],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hosts")
    on_ranks(2, train_cases, root)
    return root


expected = cache(train_in_one_process)


def folder_of(root: Path, *case: object) -> Path:
    return find_weights(root, case, STEPS)


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_steps_are_those_of_one_process(trained, case):
    family, untie, _ = case
    folder = folder_of(trained, *case)
    weights = expected(family, untie, STEPS)
    assert measure_deviation(folder, weights) <= 1e-6
    if untie != "all":
        # Apertus alone has buffers that belong to the state.
        buffers = {
            name.rsplit(".", 1)[1] for name in read_weights(folder).keys() - weights[""].keys()
        }
        assert buffers == ({"beta", "eps"} if family == "apertus" else set())


@pytest.mark.long
def test_five_steps_of_every_family(tmp_path):
    """Each with one layout; tests/drills/stock_families.py runs all of them on 2 and 4 ranks."""
    cases = [(name, *LAYOUTS[n % len(LAYOUTS)]) for n, name in enumerate(HOSTS)]
    for first in range(0, len(cases), 12):  # ranks have minutes to answer
        some = cases[first : first + 12]
        on_ranks(2, stock_families.train_cases, tmp_path, some, stock_families.STEPS)
    for family, untie, stage in cases:
        folder = find_weights(tmp_path, (family, untie, stage), stock_families.STEPS)
        weights = train_in_one_process(family, untie, stock_families.STEPS)
        assert measure_deviation(folder, weights) <= stock_families.LIMIT, family


@pytest.mark.parametrize("precision", HALF)
def test_half_precision_moves_the_masters_alike(trained, precision):
    """Up to 2 % of the movement (root mean square) from that of float32."""
    for case in HALF[precision]:
        family, untie, _ = case
        before, after = (reference(untie, steps, 2, CLIP, TWO, family)[0] for steps in (0, STEPS))
        folder = find_weights(trained / precision, case, STEPS)
        kinds = {tensor.dtype for tensor in read_weights(folder).values()}
        assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float16}
        error = moved = 0.0
        for name, master in masters(folder).items():
            movement = after[name] - before[name]
            start = before[name].to(next(iter(kinds))).float()
            error += float((master.view_as(start) - start - movement).square().sum())
            moved += float(movement.square().sum())
        assert (error / moved) ** 0.5 < 0.02


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_norms_and_biases_without_weight_decay(trained, stage):
    untie = "feedforward" if stage in (1, 2) else "none"
    weights, _ = reference(untie, STEPS, 2, CLIP, decay_vectors=False)
    assert relative(read_weights(trained / f"bare-{stage}/checkpoints/step-3"), weights) <= 1e-6
    decayed, _ = reference(untie, STEPS, 2, CLIP)
    assert relative(weights, decayed) > 1e-5


def test_folders_load_where_they_should(trained):
    dense = folder_of(trained, "llama", "none", 3)
    fields = json.loads((dense / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"] and fields["model_type"] == "llama"
    assert not {"domains", "untie", "host"} & fields.keys()
    stock = type(tiny_stock("llama"))
    for folder in (dense, folder_of(trained, "llama", "all", 1) / "law"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert type(model) is stock
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert "library_name: transformers" in (folder / "README.md").read_text()
    for family in SHAPES:
        folder = folder_of(trained, family, "feedforward", 2)
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert type(model).__name__.startswith("Demix") and model.config.domains == list(TWO)
        state = read_weights(folder)
        for name, tensor in model.state_dict().items():
            assert name not in state or torch.equal(tensor, state[name])
        names = {path.name for path in folder.glob("*.safetensors")}
        assert {"shared.safetensors", "expert_law.safetensors", "expert_med.safetensors"} <= names


def test_a_resumed_run_is_bitwise_that_which_was_not_cut(trained):
    whole = read_weights(folder_of(trained, *RESUMED))
    cut = read_weights(trained / "resumed" / "checkpoints" / f"step-{STEPS}")
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())
