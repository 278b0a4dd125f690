"""The planning command: what it proposes, simulates and refuses; a pass without storage."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_planning_recipes import RECIPES, ROOT, planned
from torch import nn
from transformers import AutoConfig

from megamod.dist.scope import Sharing
from megamod.errors import UserError
from megamod.models.lm.configuration import DemixConfig
from megamod.models.lm.demix import DemixForCausalLM
from megamod.planning.activations import measure_pass
from megamod.planning.scaling import compute_gpu_days, compute_scaling_curves
from megamod.planning.search import propose_settings
from megamod.planning.speed import Links, compute_traffic, estimate_communication_seconds

LAUNCHER = ROOT / "launchers" / "plan.py"
ZERO2 = ("--deepspeed", str(ROOT / "ds_configs/zero2_bf16.json"))
DEMIX = ("--deepspeed", str(ROOT / "ds_configs/demix_zero2_bf16.json"))
ZERO3 = ("--deepspeed", str(ROOT / "ds_configs/zero3_bf16.json"))
DOMAINS = ("--domains", *"abcdefgh")


def command(monkeypatch, *argv: str) -> None:
    """The command in this process."""
    spec = importlib.util.spec_from_file_location("plan_launcher", LAUNCHER)
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    monkeypatch.setattr(sys, "argv", [str(LAUNCHER), *argv])
    launcher.main()


def tiny(layers: int, **more) -> DemixConfig:
    return DemixConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=16,
        **more,
    )


def loss_of(batch: int, module: nn.Module):
    ids = torch.zeros(batch, 16, dtype=torch.int64)
    return module(ids, position_ids=ids, shift_labels=ids, num_items_in_batch=1.0).loss


@pytest.mark.parametrize(("precision", "element"), [("fp32", 4), ("bf16", 2)])
def test_a_block_keeps_what_the_formula_says(precision, element):
    def peak(layers: int, checkpointing: bool) -> int:
        loss = partial(loss_of, 3)
        more = dict(precision=precision, checkpointing=checkpointing)
        return measure_pass(tiny(layers), DemixForCausalLM, loss, **more).peak

    tokens, width, heads = 3 * 16, 32, 4
    # LayerNorm keeps mean and deviation of a token in the precision of its input on processors.
    block = tokens * (16 * width * element + 4 * heads + 4 * element)
    assert peak(9, False) - peak(8, False) == block
    assert peak(9, True) - peak(8, True) == tokens * width * element


def test_operations_are_counted_as_by_the_formula():
    """6 N + 12 L D T, where N are the parameters that matrix products use."""
    layers, width, length = 7, 32, 16
    result = measure_pass(
        tiny(layers), DemixForCausalLM, partial(loss_of, 3), precision="fp32", checkpointing=False
    )
    used = layers * 12 * width**2 + 64 * width
    assert result.flops == 3 * length * (6 * used + 12 * layers * width * length)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["mixtral", "demix_moe"])
def test_activations_of_a_mixture_do_not_grow_with_its_experts(tmp_path, kind, precision):
    """Two experts compute each token, of two or of eight: logits of the router alone are more."""

    def measure_peak(experts: int) -> int:
        sizes = dict(vocab_size=320, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
        count = {"mixtral": "num_local_experts", "demix_moe": "num_experts"}[kind]
        more = {"intermediate_size": 64, count: experts, "num_experts_per_tok": 2}
        more |= {"num_key_value_heads": 4} if kind == "mixtral" else {}
        folder = tmp_path / f"{kind}-{experts}"
        AutoConfig.for_model(kind, **sizes, **more).save_pretrained(folder)
        (plan,) = planned(
            *("--model", str(folder), "--max_seq_length", "32", "--precision", precision),
            *("--per_device_train_batch_size", "64", "--world_size", "1"),
        )
        return plan.network.measure_pass(64, checkpointing=False).peak

    two, eight = measure_peak(2), measure_peak(8)
    assert two < eight < 1.06 * two


def test_the_best_proposal_is_the_fastest_and_all_fit():
    (plan,) = planned(
        str(RECIPES / "quickstart.yaml"), "--world_size", "4", "--gpu_memory_gb", "1",
        "--precision", "bf16", "--vocab_size", "1000",
    )  # fmt: skip
    result = propose_settings(plan, shown=100)
    seconds = [proposal.step_seconds for proposal in result]
    assert all(later >= 0.98 * seconds[0] for later in seconds)
    assert all(plan.can_gpu_hold(proposal.memory) for proposal in result)
    assert {proposal.setting.stage for proposal in result} <= {1, 2}  # experts
    steps = {p.setting.micro_batch * p.setting.micro_steps for p in result}
    assert steps == {plan.job.setting.micro_batch * plan.job.setting.micro_steps}
    assert all(p.setting.bucket == 50_000_000 for p in result)  # DeepSpeed's own are 2 GB
    assert {p.setting.offload for p in result} == {"none"}


def test_proposals_are_taken_by_a_run(tmp_path):
    """An optimizer on a disk needs stage 3."""
    file = tmp_path / "nvme.json"
    disk = {"device": "nvme", "nvme_path": "auto"}
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": disk}}))
    (plan,) = planned(
        "--model", "tiny", "--world_size", "2", "--gpu_memory_gb", "8", "--global_batch_size", "16",
        "--vocab_size", "1000", "--deepspeed", str(file),
    )  # fmt: skip
    result = propose_settings(plan, shown=100)
    assert {proposal.setting.stage for proposal in result} == {3}
    assert all("on the disk per rank" in "; ".join(p.reasons) for p in result)


def test_weights_that_cannot_be_where_they_shall(tmp_path):
    """As in a run: on a disk they cannot be, and proposals keep the stage that they need."""
    file, block = tmp_path / "host.json", {"device": "cpu"}
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": block}}))
    options = ("--model", "tiny", "--world_size", "2", "--vocab_size", "1000")
    (plan,) = planned(*options, "--deepspeed", str(file))
    assert plan.memory.host_weights > 0.9 * 4 * plan.network.parameters_per_rank // 2
    assert {proposal.setting.stage for proposal in propose_settings(plan, shown=100)} == {3}
    block |= {"device": "nvme", "nvme_path": str(tmp_path)}
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": block}}))
    with pytest.raises(UserError, match=r"offload_param\.device nvme is not supported; use cpu"):
        planned(*options, "--deepspeed", str(file))


def test_large_micro_batches_lie_on_a_line():
    sizes = ("--world_size", "1", "--hidden_size", "64", "--vocab_size", "8192")
    (plan,) = planned(*sizes, "--global_batch_size", "32", "--per_device_train_batch_size", "1")
    (large,) = planned(*sizes, "--global_batch_size", "32", "--per_device_train_batch_size", "32")
    guessed = plan.compute_memory_with_setting(
        replace(plan.job.setting, micro_batch=32)
    ).activations
    assert guessed == pytest.approx(large.memory.activations, rel=0.01)


def test_nothing_is_proposed_where_nothing_fits():
    (plan,) = planned(
        str(RECIPES / "quickstart.yaml"),
        "--world_size",
        "4",
        "--gpu_memory_gb",
        "0.001",
        "--vocab_size",
        "1000",
    )
    assert propose_settings(plan) == []
    assert plan.list_fitting_changes() == []


def test_rings_inside_and_between_machines():
    (plan,) = planned(
        *("--untie", "feedforward", "--world_size", "16", *DOMAINS, *DEMIX),
        *("--intra_gbs", "100", "--inter_gbs", "10"),
    )
    topology, traffic = plan.job.topology, plan.traffic
    expected = traffic.world / 10e9 + traffic.domain / 100e9  # two ranks a domain, side by side
    assert estimate_communication_seconds(traffic, topology, plan.links) == pytest.approx(expected)
    spread = Links(100e9, 10e9, ranks_per_node=3)
    assert estimate_communication_seconds(traffic, topology, spread) == pytest.approx(
        (traffic.world + traffic.domain) / 10e9
    )


def test_curves_go_through_what_was_measured():
    (plan,) = planned(
        "--model", "125m", "--world_size", "16", *DOMAINS, "--gradient_accumulation_steps", "4",
        *ZERO2,
    )  # fmt: skip
    curves = compute_scaling_curves(plan, step_seconds=0.9, step_ranks=None)
    (dense,) = [point for point in curves[Sharing.DENSE] if point.gpus == 16]
    assert dense.compute_seconds + dense.communication_seconds == pytest.approx(0.9)
    assert dense.tokens_per_second == pytest.approx(16 * 8 * 4 * 1024 / 0.9)
    # 16 GPUs for a thousand steps of 0.9 s, whatever the tokens of a step are.
    (days,) = compute_gpu_days([16], [dense.tokens_per_second], 1000 * dense.tokens)
    assert days == pytest.approx(16 * 900 / 86_400)
    for kind, points in curves.items():
        gpus = [point.gpus for point in points]
        assert gpus == [2**n for n in range(0 if kind is Sharing.DENSE else 3, 11)]
        assert all(
            point.overlapped_tokens_per_second >= point.tokens_per_second for point in points
        )
    last = {kind: points[-1].tokens_per_second for kind, points in curves.items()}
    assert last[Sharing.DENSE] < last[Sharing.DEMIX] < last[Sharing.BTM]
    alone = curves[Sharing.BTM][0]
    assert (alone.gpus, alone.communication_seconds) == (8, 0)  # an expert on one GPU sends nothing
    bytes_ = compute_traffic(plan.network, plan.job.topology, plan.job.setting).world
    assert dense.communication_seconds == pytest.approx(bytes_ / 25e9)


def test_a_step_shorter_than_its_communication_is_refused():
    (plan,) = planned("--model", "125m", "--world_size", "16", *DOMAINS, *ZERO2)
    with pytest.raises(UserError, match="sending the bytes of a step takes"):
        compute_scaling_curves(plan, 1e-4, None)


def test_the_whole_command(monkeypatch, tmp_path, capsys):
    (tmp_path / "hosts").write_text("a slots=4\nb slots=4\n")
    command(
        monkeypatch,
        *("--untie", "feedforward", "--hidden_size", "32", *DOMAINS),
        *("--hostfile", str(tmp_path / "hosts"), "--json", str(tmp_path / "plan.json")),
        *("--search", "true", "--simulate", str(tmp_path / "speed.png")),
        *("--vocab_size", "1000", "--max_seq_length", "128"),
    )
    output = capsys.readouterr().out
    assert "ranks 4-7: e, f, g, h" in output
    assert "best first" in output
    (job,) = json.loads((tmp_path / "plan.json").read_text())["jobs"]
    assert job["places"] == ["a:0,1,2,3@b:0,1,2,3"]
    assert job["parameters"]["total"] == (
        job["parameters"]["shared"] + 8 * job["parameters"]["per_expert"]
    )
    assert job["tokens_per_step"] == 8 * 8 * 128
    assert job["setting"]["precision"] == "fp32"
    assert math.isclose(job["days"]["30%"] * 0.3, job["days"]["50%"] * 0.5)
    assert job["simulation"]["demix"][0]["gpus"] == 8
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


def test_the_data_say_how_many_tokens_there_are(tmp_path):
    ids = dict(bos_id=None, pad_id=0, eos_id=1, unk_id=2)
    header = {"format": 1, "vocab_size": 1000, "domains": {"law": {}, "med": {}}, **ids}
    (tmp_path / "databin.json").write_text(json.dumps(header))
    (plan,) = planned("--data", str(tmp_path), "--untie", "feedforward", "--world_size", "2")
    assert plan.network.config.vocab_size == 1000
    assert plan.job.topology.domains == ("law", "med")
    assert not plan.job.vocabulary.assumed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "--world_size is missing"),
        (("--world_size", "6", "--untie", "all", *DOMAINS), "6 ranks cannot hold 8 experts"),
        (("--world_size", "2", "--untie", "feedforward"), "--domains is missing"),
        (("--world_size", "2", "--model", "2b"), "--model '2b' is no folder"),
        (("--world_size", "2", "--global_batch_size", "9"), "must be a multiple of 16"),
        (("--hostfile", "{tmp}/none"), "cannot be read"),
        (("--hostfile", "{tmp}/zero"), "line 2: 'b slots=0' is not"),
        (("--hostfile", "{tmp}/good", "--world_size", "3"), "has 4 slots"),
        (("{tmp}/odd.yaml", "--world_size", "2"), "line 2: unknown key 'hidden_sise'"),
        (("--world_size", "2", "--deepspeed", "{tmp}/odd.json"), "unknown key zero_optimisation"),
        (("--world_size", "2", "--simulate", "x.png"), "--simulate: compares"),
        (
            ("--world_size", "2", "--torch_compile", "true", *ZERO3),
            "--torch_compile with ZeRO stage 3",
        ),
        (("--world_size", "2", "--objective", "masked_lm", "--untie", "all"), "--untie all: goes"),
        (("--world_size", "2", "--objective", "masked_lm", "--model", "big"), "--model 'big'"),
    ],
)
def test_mistakes_are_told(monkeypatch, tmp_path, argv, message):
    (tmp_path / "zero").write_text("a slots=2\nb slots=0\n")
    (tmp_path / "good").write_text("a slots=4\n")
    (tmp_path / "odd.yaml").write_text("model: tiny\nhidden_sise: 8\n")
    (tmp_path / "odd.json").write_text('{"zero_optimisation": {"stage": 1}}')
    inputs = [part.format(tmp=tmp_path) for part in argv]
    with pytest.raises(UserError) as caught:
        command(monkeypatch, *inputs)
    assert message in str(caught.value)


def test_a_mistake_ends_with_2_and_one_message():
    done = subprocess.run(
        [sys.executable, str(LAUNCHER), "--world_size", "8", "--gpu_memory_gb", "-1"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--gpu_memory_gb: -1.0 is not allowed" in done.stderr


def test_what_only_runs_need_is_not_loaded():
    """Most of a plan's time are imports; those that are left are transformers' and DeepSpeed's."""
    script = (
        "import atexit, runpy, sys; atexit.register(lambda: print(*sys.modules));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], None, '__main__')"
    )
    recipe = RECIPES / "modern" / "demix_1.3b_d8.yaml"
    done = subprocess.run(
        [sys.executable, "-c", script, str(LAUNCHER), str(recipe), "--world_size", "128", *DEMIX],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "megamod.planning.plan" in loaded
    unwanted = {"datasets", "matplotlib", "tensorboard", "sklearn.metrics", "pandas"}
    assert not loaded & (unwanted | {"megamod.runs", "megamod.evaluation", "lm_eval"})
