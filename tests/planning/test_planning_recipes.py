"""Plans of the recipes that come with the code: parameters, operations, memory, machines."""

import re
import time
from pathlib import Path

import pytest
from test_planning_memory import settings

from megamod.args import DataArgs, LoraArgs, ModelArgs, MuxArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.btm.campaign import BtmArgs
from megamod.dist.topology import DomainTopology
from megamod.flags import parse_args
from megamod.planning.job import list_jobs
from megamod.planning.memory import compute_memory
from megamod.planning.plan import plan_job
from megamod.planning.plan_args import PlanArgs

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launchers" / "recipes"

# Gururangan et al. 2022: layers, width; the count follows from the architecture.
KINDS = {"dense": "", "demix": "_d8", "btm": ""}
ENCODERS = {"small": (4, 512), "base": (12, 768), "large": (24, 1024), "1.3b": (24, 2048)}
# Tokens of an update and updates; Gururangan et al. 2022 and Li et al. 2022.
PUBLISHED = {
    "dense": {
        "125m": (524_288, 300_000),
        "350m": (1_048_576, 120_000),
        "750m": (2_097_152, 65_000),
        "1.3b": (2_097_152, 50_000),
    },
    "btm": {
        "125m": (1_048_576, 80_000),
        "350m": (2_097_152, 32_000),
        "750m": (4_194_304, 24_000),
        "1.3b": (8_388_608, 12_000),
    },
}
PUBLISHED["demix"] = PUBLISHED["dense"]
SIZES = {"125m": (12, 768), "350m": (24, 1024), "750m": (24, 1536), "1.3b": (24, 2048)}
PAPER, MODERN = RECIPES / "paper", RECIPES / "modern"
STATED = [path for path in sorted(RECIPES.rglob("*.yaml")) if "# GPUs:" in path.read_text()]


def planned(*argv: str):
    kinds = (PlanArgs, BtmArgs, RunArgs, SafetyArgs, ModelArgs, LoraArgs)
    kinds += (OptimArgs, MuxArgs, DataArgs)
    parsed = parse_args(*kinds, argv=argv)
    return [plan_job(job, parsed[0]) for job in list_jobs(parsed)]


def of_recipe(path: Path, *more: str):
    """Plans on the GPUs that the recipe's header tells, with the DeepSpeed file that it tells."""
    text = path.read_text()
    ranks, memory_gb = re.search(r"# GPUs: (\d+) of (\d+) GB", text).groups()
    file = ROOT / re.search(r"ds_configs/\w+\.json", text)[0]
    gpus = ("--world_size", ranks, "--gpu_memory_gb", memory_gb)
    return planned(str(path), *gpus, "--deepspeed", str(file), *more)


def parameters(layers: int, width: int, vocabulary: int = 50264, length: int = 1024) -> int:
    block = 12 * width**2 + 13 * width
    return vocabulary * width + (length + 2) * width + layers * block + 2 * width


def test_every_size_has_its_recipes():
    names = [f"{kind}_{size}{end}.yaml" for size in SIZES for kind, end in KINDS.items()]
    for folder in (PAPER, MODERN):
        assert {path.name for path in folder.iterdir()} == set(names)
    assert len(STATED) == 2 * len(names) + 2 * (len(ENCODERS) + len(ENCODERS) - 1)


@pytest.mark.parametrize("path", STATED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_are_what_their_headers_tell(path):
    """They fit the GPUs, and sequences, micro-batches, tokens and groups are those told."""
    text = path.read_text()
    plans = of_recipe(path)
    assert all(plan.fits for plan in plans)
    first = plans[0].job
    precision = {"paper": "fp16", "modern": "bf16", "mux": "bf16"}[path.parent.name]
    assert {plan.job.setting.precision for plan in plans} == {precision}
    assert {plan.job.setting.stage for plan in plans} <= {1, 2}
    if path.parent.name == "mux":
        assert first.sequences_per_step == 640 and first.setting.micro_batch == 80
        return
    output = " ".join(text.replace("\n#", " ").split())
    sequences, steps = re.search(r"(\d+) sequences each, (\d+) micro-batch", output).groups()
    for plan in plans:
        assert plan.job.setting.micro_batch == int(sequences)
        assert plan.job.setting.micro_steps == int(steps)
    assert first.tokens_per_step == int(re.search(r"Tokens per update: (\d+)", output)[1])
    size = path.stem.split("_")[1]
    each = PUBLISHED[path.stem.split("_")[0]][size]
    assert (first.tokens_per_step, sum(p.job.steps for p in plans) // len(plans)) == (
        each[0], each[1] // len(plans),
    )  # fmt: skip
    if path.stem.startswith("demix"):
        gpus = first.topology.world_size
        assert first.topology.ranks_per_domain == gpus // 8
    if path.stem.startswith("btm"):
        assert plans[1].job.tokens_per_step == each[0] // 8
        assert len(plans[1].job.job_names) == 8 and all(plans[1].job.placements)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("folder", [PAPER, MODERN], ids=["paper", "modern"])
def test_parameters_of_dense_and_demix_recipes(size, folder):
    layers, width = SIZES[size]
    whole, expert = parameters(layers, width), layers * (8 * width**2 + 5 * width)
    (dense,) = of_recipe(folder / f"dense_{size}.yaml")
    assert dense.network.parameters_per_rank == dense.network.total_parameters == whole
    assert dense.network.parameters_per_token == whole - 1026 * width
    assert (
        dense.network.flops_per_token
        == 6 * dense.network.parameters_per_token + 12 * layers * width * 1024
    )
    (demix,) = of_recipe(folder / f"demix_{size}_d8.yaml")
    assert demix.network.parameters_per_expert == expert
    assert demix.network.shared_parameters == whole - expert
    assert demix.network.parameters_per_rank == whole
    assert demix.network.total_parameters == whole + 7 * expert
    assert demix.network.parameters_per_token == dense.network.parameters_per_token


@pytest.mark.parametrize("size", ENCODERS)
def test_parameters_of_encoder_recipes(size):
    """Closed forms: BERT and ELECTRA with the keys and the demultiplexer of MUX-PLM, N = 5."""
    tokens, places, number = 30522, 512, 5

    def encoder(layers: int, width: int, embedded: int) -> int:
        demux = number * width + (2 * width**2 + width) + 2 * (width**2 + width) + 3 * 2 * width
        project = embedded * width + width if embedded != width else 0
        embeddings = (tokens + places + 2) * embedded + (2 + number) * embedded
        return embeddings + project + layers * (12 * width**2 + 13 * width) + demux

    layers, width = ENCODERS[size]
    (bert,) = of_recipe(RECIPES / "mux" / f"mux_bert_{size}_mlm.yaml")
    head = width**2 + width + 2 * width + tokens
    assert bert.network.total_parameters == encoder(layers, width, width) + head
    if size == "1.3b":
        return
    layers, width, embedded = (12, 256, 128) if size == "small" else (layers, width, width)
    (electra,) = of_recipe(RECIPES / "mux" / f"mux_electra_{size}_pretrain.yaml")
    own_values = width**2 + 3 * width  # a dense layer and its norm, before a head
    head = 2 * own_values + (tokens * width + tokens) + (width**2 + width) + (width + 1)
    assert electra.network.total_parameters == encoder(layers, width, embedded) + head


def test_published_counts():
    published = {"125m": 124_446_720, "1.3b": 1_313_644_544}
    assert {size: parameters(*SIZES[size]) for size in published} == published


def test_btm_is_a_seed_and_experts_that_share_its_batch():
    seed, expert = of_recipe(PAPER / "btm_125m.yaml")
    assert (seed.job.tokens_per_step, expert.job.tokens_per_step) == (1_048_576, 131_072)
    assert (seed.job.steps, expert.job.steps) == (40_000, 40_000)
    assert seed.network.total_parameters == expert.network.total_parameters == 124_446_720
    assert len(expert.job.job_names) == 8
    slots = [(host.name, host.slots) for folder in expert.job.placements for host in folder]
    assert len(set(slots)) == 8  # all at once, no slot twice
    assert all(len(owned) == 2 for _, owned in slots)


def test_experts_that_find_no_slots_wait():
    _, expert = planned(
        str(PAPER / "btm_125m.yaml"), "--world_size", "4", "--seed_gpus", "4",
        "--deepspeed", str(ROOT / "ds_configs/zero2_fp16.json"),
    )  # fmt: skip
    assert [bool(folder) for folder in expert.job.placements] == [True, True] + [False] * 6


def test_states_of_the_reference_shape():
    """2 bytes of weights, an eighth of 14 more: 4.9 GB for 1.3B on 8 ranks with stage 2."""
    size = 1_315_723_264
    dense = DomainTopology(8, ("text",), jobs_sharing("none"))
    needed = compute_memory({"w": size}, {}, dense, settings(2, "bf16"))
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
        needed = compute_memory({"w": size}, {}, dense, settings(0, "fp32"))
        assert needed.weights + needed.gradients + needed.optimizer == 16 * size
        return
    needed = compute_memory({"w": size}, {}, dense, settings(stage, "bf16"))
    states = needed.weights + needed.gradients + needed.optimizer
    assert states / 2**30 == pytest.approx(expected, abs=0.05)


def test_experts_are_cut_over_the_ranks_of_their_domain():
    topology = DomainTopology(8, tuple("abcd"), jobs_sharing("feedforward"))
    sizes = {"attention": 8000, "x.experts.a.fc1": 4000}
    needed = compute_memory(sizes, {}, topology, settings(1, "bf16"))
    assert needed.weights == 2 * 12_000
    assert needed.gradients == 2 * 12_000
    assert needed.optimizer == 12 * (8000 // 8 + 4000 // 2)


def test_an_offloaded_optimizer_is_on_the_host():
    from dataclasses import replace

    dense = DomainTopology(4, ("text",), jobs_sharing("none"))
    plain = compute_memory({"w": 8000}, {}, dense, settings(2, "bf16"))
    moved = compute_memory({"w": 8000}, {}, dense, replace(settings(2, "bf16"), offload="cpu"))
    assert (moved.optimizer, moved.gradients, moved.weights) == (0, 0, plain.weights)
    assert moved.host == 2000 * (12 + 4)


def test_offloaded_weights_are_on_the_host_but_for_small_ones():
    from dataclasses import replace

    dense = DomainTopology(4, ("text",), jobs_sharing("none"))
    inputs = replace(settings(3, "bf16"), persistent=100)
    moved = compute_memory(
        {"w": 8000, "bias": 100}, {}, dense, replace(inputs, offload_param="cpu")
    )
    assert moved.host_weights == 2 * (8000 + 100) // 4
    assert moved.weights == 2 * 100  # kept whole
    both = replace(inputs, offload_param="cpu", offload="nvme")
    assert compute_memory({"w": 8000}, {}, dense, both).host == 2000 * (12 + 4)


def jobs_sharing(untie: str):
    from megamod.dist.scope import parse_sharing

    return parse_sharing(untie)


def test_a_plan_of_1_3b_is_quick():
    before = time.process_time()
    (plan,) = of_recipe(PAPER / "demix_1.3b_d8.yaml")
    assert plan.make_record()["memory"]["peak"] > 0
    assert time.process_time() - before < 5


def test_what_fits_is_told_and_does_fit():
    (plan,) = of_recipe(PAPER / "dense_350m.yaml", "--gpu_memory_gb", "3.6")
    assert not plan.fits
    output = plan.list_fitting_changes()
    assert output[0].startswith("--per_device_train_batch_size 1")
    assert any(line.startswith("--gradient_checkpointing true") for line in output)
    (smaller,) = of_recipe(
        PAPER / "dense_350m.yaml", "--gpu_memory_gb", "3.6",
        "--per_device_train_batch_size", "1",
    )  # fmt: skip
    assert smaller.fits
    assert f"{smaller.memory.peak / 1e9:.2f} GB" in output[0]
