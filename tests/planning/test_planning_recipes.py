"""Plans of the recipes that come with the code: parameters, operations, memory, machines."""

import re
import time
from pathlib import Path

import pytest
from test_planning_memory import settings

from megamod.args import (
    DataArgs,
    ModelArgs,
    MuxArgs,
    OptimArgs,
    RunArgs,
    SafetyArgs,
    parse_args,
)
from megamod.btm.recipe import BtmArgs
from megamod.dist.topology import DomainTopology
from megamod.planning.memory import memory
from megamod.planning.network import encoder_config
from megamod.planning.plan import plan_of
from megamod.planning.plan_args import PlanArgs
from megamod.planning.request import Vocabulary, jobs_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launchers" / "recipes"
V100, V100_TFLOPS = "32", "125"

# Gururangan et al. 2022: layers, width; the count follows from the architecture.
SIZES = {"125m": (12, 768), "350m": (24, 1024), "750m": (24, 1536), "1.3b": (24, 2048)}
DS = {
    "dense": "zero2_bf16.json",
    "demix": "demix_zero2_bf16.json",
    "btm": "zero1_bf16.json",
    "mux": "zero2_bf16.json",
}
STATED = [
    path for path in sorted(RECIPES.glob("*.yaml")) if path.stem.split("_")[0] in DS
]  # fmt: skip
STATED = [path for path in STATED if "# GPUs:" in path.read_text()]


def planned(*argv: str):
    kinds = (PlanArgs, BtmArgs, RunArgs, SafetyArgs, ModelArgs, OptimArgs, MuxArgs, DataArgs)
    parsed = parse_args(*kinds, argv=argv)
    return [plan_of(job, parsed[0]) for job in jobs_of(parsed)]


def of_recipe(path: Path, *more: str):
    ranks = re.search(r"# GPUs: (\d+)", path.read_text())[1]
    file = ROOT / "ds_configs" / DS[path.stem.split("_")[0]]
    return planned(str(path), "--world_size", ranks, "--deepspeed", str(file), *more)


def parameters(layers: int, width: int, vocabulary: int = 50264, length: int = 1024) -> int:
    block = 12 * width**2 + 13 * width
    return vocabulary * width + (length + 2) * width + layers * block + 2 * width


@pytest.mark.parametrize("path", STATED, ids=lambda path: path.stem)
def test_recipes_fit_the_gpus_of_their_headers(path):
    plans = of_recipe(path, "--gpu_memory_gb", V100)
    assert all(plan.fits for plan in plans)
    tokens = re.search(r"Tokens per update: (\d+)", path.read_text())
    if tokens:
        assert plans[0].job.tokens == int(tokens[1])
    if "batch" in path.read_text() and plans[0].job.mux.objective != "causal_lm":
        assert plans[0].job.sequences == 640


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_dense_and_demix_recipes(size):
    layers, width = SIZES[size]
    whole, expert = parameters(layers, width), layers * (8 * width**2 + 5 * width)
    (dense,) = of_recipe(RECIPES / f"dense_{size}.yaml")
    assert dense.network.per_rank == dense.network.total == whole
    assert dense.network.active == whole - 1026 * width
    assert dense.network.flops_per_token == 6 * dense.network.active + 12 * layers * width * 1024
    (demix,) = of_recipe(RECIPES / f"demix_{size}_d8.yaml")
    assert demix.network.per_expert == expert
    assert demix.network.shared == whole - expert
    assert demix.network.per_rank == whole
    assert demix.network.total == whole + 7 * expert
    assert demix.network.active == dense.network.active


def test_published_counts():
    published = {"125m": 124_446_720, "1.3b": 1_313_644_544}
    assert {size: parameters(*SIZES[size]) for size in published} == published


def test_btm_is_a_seed_and_experts_that_share_its_batch():
    seed, expert = of_recipe(RECIPES / "btm_125m.yaml")
    assert (seed.job.tokens, expert.job.tokens) == (1_048_576, 131_072)
    assert (seed.job.steps, expert.job.steps) == (40_000, 40_000)
    assert seed.network.total == expert.network.total == 124_446_720
    assert len(expert.job.alike) == 8
    slots = [(host.name, host.slots) for place in expert.job.places for host in place]
    assert len(set(slots)) == 8  # all at once, no slot twice
    assert all(len(owned) == 2 for _, owned in slots)


def test_experts_that_find_no_slots_wait():
    _, expert = planned(
        str(RECIPES / "btm_125m.yaml"), "--world_size", "4", "--seed_gpus", "4",
        "--deepspeed", str(ROOT / "ds_configs/zero1_bf16.json"),
    )  # fmt: skip
    assert [bool(place) for place in expert.job.places] == [True, True] + [False] * 6


def test_states_of_the_reference_shape():
    """2 bytes of weights, an eighth of 14 more: 4.9 GB for 1.3B on 8 ranks with stage 2."""
    size = 1_315_723_264
    dense = DomainTopology(8, ("text",), jobs_sharing("none"))
    needed = memory({"w": size}, 0, dense, settings(2, "bf16"))
    states = needed.weights + needed.gradients + needed.optimizer
    assert states == pytest.approx(size * (2 + 14 / 8), rel=1e-6)
    assert states / 2**30 == pytest.approx(4.6, abs=0.05)


@pytest.mark.parametrize(
    ("stage", "expected"), [(0, 19.6), (1, 6.7), (2, 4.6), (3, 2.45)]
)  # fmt: skip
def test_states_by_stage(stage, expected):
    """GiB of 1.3B on 8 ranks: bf16, and float32 masters and moments."""
    size = 1_315_723_264
    dense = DomainTopology(8, ("text",), jobs_sharing("none"))
    if stage == 0:  # no masters in float32 there: the same bytes, spelled otherwise
        needed = memory({"w": size}, 0, dense, settings(0, "fp32"))
        assert needed.weights + needed.gradients + needed.optimizer == 16 * size
        return
    needed = memory({"w": size}, 0, dense, settings(stage, "bf16"))
    states = needed.weights + needed.gradients + needed.optimizer
    assert states / 2**30 == pytest.approx(expected, abs=0.05)


def test_experts_are_cut_over_the_ranks_of_their_domain():
    topology = DomainTopology(8, tuple("abcd"), jobs_sharing("feedforward"))
    sizes = {"attention": 8000, "x.experts.a.fc1": 4000}
    needed = memory(sizes, 0, topology, settings(1, "bf16"))
    assert needed.weights == 2 * 12_000
    assert needed.gradients == 2 * 12_000
    assert needed.optimizer == 12 * (8000 // 8 + 4000 // 2)


def test_an_offloaded_optimizer_is_on_the_host():
    from dataclasses import replace

    dense = DomainTopology(4, ("text",), jobs_sharing("none"))
    plain = memory({"w": 8000}, 0, dense, settings(2, "bf16"))
    moved = memory({"w": 8000}, 0, dense, replace(settings(2, "bf16"), offload=True))
    assert (moved.optimizer, moved.gradients, moved.weights) == (0, 0, plain.weights)
    assert moved.host == 2000 * (12 + 4)


def jobs_sharing(untie: str):
    from megamod.dist.scope import sharing_of

    return sharing_of(untie)


def test_a_plan_of_1_3b_is_quick():
    before = time.process_time()
    (plan,) = of_recipe(RECIPES / "demix_1.3b_d8.yaml")
    assert plan.record()["memory"]["peak"] > 0
    assert time.process_time() - before < 5


def test_what_fits_is_told_and_does_fit():
    (plan,) = of_recipe(RECIPES / "dense_350m.yaml", "--gpu_memory_gb", "3.6")
    assert not plan.fits
    told = plan.what_fits()
    assert told[0].startswith("--per_device_train_batch_size 1")
    assert any(line.startswith("--gradient_checkpointing true") for line in told)
    (smaller,) = of_recipe(
        RECIPES / "dense_350m.yaml", "--gpu_memory_gb", "3.6",
        "--per_device_train_batch_size", "1",
    )  # fmt: skip
    assert smaller.fits
    assert f"{smaller.memory.peak / 1e9:.2f} GB" in told[0]


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("objective", ["masked_lm", "replaced_token"])
def test_encoders_are_those_that_pretraining_makes(objective, number):
    """The configuration is made by other code there, from a data-bin."""
    from types import SimpleNamespace

    from megamod.runs import encoder_lm

    data = SimpleNamespace(vocab_size=30522, pad_id=0, bos_id=101)
    mux = MuxArgs(objective=objective, num_instances=number)
    model = ModelArgs(model="base", hidden_size=384, num_attention_heads=6)
    mask = pytest.MonkeyPatch()
    mask.setattr(encoder_lm, "mask_id_of", lambda data: 103)
    theirs = encoder_lm.encoder_config(model, mux, data, 512)
    mask.undo()
    ours = encoder_config(model, mux, Vocabulary(30522, 101, 0, 102), 512)
    assert ours.to_dict() == theirs.to_dict()
