"""Experts of a mixture spread over ranks by DeepSpeed: the numbers of a run that spreads none."""

import json
from pathlib import Path

import pytest
import torch
from models.tiny_hosts import tiny_stock_config
from ranks import on_ranks
from runs.test_host_pretrain import DOMAINS, die_at_call, seed_folder, start, words_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megamod.data.corpus.binarize import binarize
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.runs.to_moe import MoeArgs, run_to_moe

SIZES = {"plain": None, "one": 1, "two": 2}
FAMILIES = {
    "llama": "mixtral",
    "olmo2": "flex_olmo",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
}


def make_folder(root: Path) -> Path:
    """Mixtures of four experts of each family, data, and DeepSpeed files."""
    texts = {domain: words_of(domain) for domain in DOMAINS}
    every = [text for some in texts.values() for text in some]
    for family in FAMILIES:
        models = [seed_folder(root / f"{family}{n}", family, every, n) for n in range(4)]
        args = MoeArgs(models=list(map(str, models)), output_dir=str(root / family), quiet=True)
        run_to_moe(args)
    binarize(texts, str(root / "llama0"), root / "bin")
    for name, size in SIZES.items():
        for stage in (1, 2):
            block = {"expert_parallel": {"enabled": True, "autoep_size": size}} if size else {}
            config = {"zero_optimization": {"stage": stage}, **block}
            (root / f"{name}{stage}.json").write_text(json.dumps(config))
    return root


def run(root: Path, output: str, file: str, *flags: object, family: str = "llama") -> None:
    """Three steps with plain gradients of a mixture."""
    common = ("--model", root / family, "--learning_rate", 0.01, "--adam_epsilon", 1.0)
    start(root, output, *common, "--deepspeed", root / f"{file}.json", *flags)


def train_alone(rank: int, root: Path) -> None:
    for family in FAMILIES:
        run(root, f"alone-{family}", "plain1", family=family)


def die(rank: int, root: Path) -> None:
    """A run of two ranks that are killed in the third step; the checkpoint is of the second."""
    die_at_call(2 * 2 + 1)  # two micro-batches of each rank are a step
    run(root, "killed", "two1")


def train(rank: int, root: Path) -> None:
    """All runs of one of two ranks."""
    for family in FAMILIES:
        run(root, f"spread-{family}", "two1", family=family)
    run(root, "spread-stage2", "two2", "--gradient_checkpointing", "true")
    run(root, "killed", "two1")
    for name, before, after in (
        ("joined", "two1", "plain2"),
        ("divided", "plain1", "two2"),
        ("spread", "one1", "two1"),
    ):
        run(root, name, before, "--stop_step", 2)
        run(root, name, after)
    run(root, "shrunk", "two1", "--stop_step", 2)


def finish_alone(rank: int, root: Path) -> None:
    run(root, "shrunk", "one1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("spread"))
    on_ranks(1, train_alone, root)
    with pytest.raises(AssertionError, match=r"ended without an answer|failed"):
        on_ranks(2, die, root)
    assert (root / "killed" / "checkpoints" / "step-2").is_dir()
    assert not (root / "killed" / "model").exists()
    on_ranks(2, train, root)
    on_ranks(1, finish_alone, root)
    return root


def weights(trained: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(trained / run / "model" / "model.safetensors")


def farthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def read_last_step(run: Path) -> dict:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "loss" in record][-1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_equal_one_process(trained, family):
    alone, spread = weights(trained, f"alone-{family}"), weights(trained, f"spread-{family}")
    assert farthest(alone, spread) <= 1e-6
    before = load_file(trained / family / "model.safetensors")
    assert farthest(alone, before) > 1e-4
    lines = [read_last_step(trained / f"{kind}-{family}") for kind in ("alone", "spread")]
    for name in ("loss", "grad_norm", "balance_loss"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-5), name
    model = AutoModelForCausalLM.from_pretrained(trained / f"spread-{family}" / "model")
    assert model.config.model_type == FAMILIES[family]


MOVED = ("joined", "divided", "spread", "shrunk")


@pytest.mark.slow
@pytest.mark.parametrize("run", ["spread-stage2", *MOVED])
def test_checkpoints_move_between_stages_sizes_and_ranks(trained, run):
    """Recomputed layers at stage 2; the others change stage, `autoep_size` or ranks on resuming."""
    assert farthest(weights(trained, run), weights(trained, "alone-llama")) <= 1e-6


@pytest.mark.slow
def test_killed_run_goes_on_to_the_same_bits(trained):
    assert farthest(weights(trained, "killed"), weights(trained, "spread-llama")) == 0.0
    log = map(json.loads, (trained / "killed" / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in log if "loss" in record] == [1, 2, 3]


REFUSED = {
    "divides": ({"autoep_size": 3}, {}, "must divide the 4 experts and the 2 ranks"),
    "stage": ({}, {"zero_optimization": {"stage": 3}}, "with ZeRO stage 3 is not supported"),
    "key": ({"comm_backend": "deepep"}, {}, "unknown key expert_parallel.comm_backend"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_files(tmp_path, case):
    from megamod.args import OptimArgs, RunArgs, SafetyArgs
    from megamod.train.deepspeed_settings import resolve_settings

    block, more, message = REFUSED[case]
    config = {"expert_parallel": {"enabled": True, "autoep_size": 2, **block}, **more}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config | ({} if more else {"zero_optimization": {"stage": 1}})))
    topology = DomainTopology(2, DOMAINS, Sharing.DENSE)
    args = (RunArgs(), OptimArgs(), SafetyArgs(deepspeed=str(file)), topology, 16)
    with pytest.raises(UserError, match=message):
        resolve_settings(*args, mixture=tiny_stock_config("mixtral", num_local_experts=4))
    if case == "divides":
        with pytest.raises(UserError, match="is no mixture of experts"):
            resolve_settings(*args)
