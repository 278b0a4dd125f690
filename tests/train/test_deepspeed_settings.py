"""Batch sizes and settings that flags and a DeepSpeed file decide together."""

import json

import pytest

from megamod.args import DataArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.data.batches import BatchDivision
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.flags import find_origin, parse_args
from megamod.train.batch_size import count_micro_steps
from megamod.train.deepspeed_settings import make_loop_plan, resolve_settings

DOMAINS = ("law", "med", "code", "news")
ALL = (RunArgs, SafetyArgs, ModelArgs, OptimArgs, DataArgs)


def topology(world: int, sharing: str) -> DomainTopology:
    return DomainTopology(world, DOMAINS, Sharing(sharing))


def args(*flags: str):
    return parse_args(*ALL, argv=list(flags))


@pytest.mark.parametrize(
    ("world", "sharing", "flags", "steps"),
    [
        (1, "dense", ["--gradient_accumulation_steps", "3"], 3),
        (2, "demix", ["--gradient_accumulation_steps", "3"], 6),  # two domains a rank, three each
        (8, "demix", ["--gradient_accumulation_steps", "3"], 3),
        (2, "demix", ["--global_batch_size", "64"], 4),
        (4, "btm", ["--global_batch_size", "64"], 2),
    ],
)
def test_micro_steps(world, sharing, flags, steps):
    run = args(*flags)[0]
    assert count_micro_steps(run, topology(world, sharing)) == steps


def test_the_accumulation_follows_from_the_global_batch():
    run = args("--global_batch_size", "48", "--per_device_train_batch_size", "4")[0]
    steps = {
        world: count_micro_steps(run, topology(world, "dense")) for world in (1, 2, 3, 4, 6, 12)
    }
    assert steps == {1: 12, 2: 6, 3: 4, 4: 3, 6: 2, 12: 1}
    with pytest.raises(UserError, match=r"48: must be a multiple of 20 = 5 ranks x 4 .* 40 or 60"):
        count_micro_steps(run, topology(5, "dense"))


def test_micro_steps_must_serve_all_domains_of_a_rank():
    run = args("--global_batch_size", "48")[0]
    assert count_micro_steps(run, topology(2, "dense")) == 3
    with pytest.raises(
        UserError, match=r"--global_batch_size 48: must be a multiple of 32 = 2 ranks x .* 2 do"
    ):
        count_micro_steps(run, topology(2, "demix"))


def test_engine_config_fills_every_auto(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps(
            {
                "train_batch_size": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "bf16": {"enabled": "auto"},
                "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
            }
        )
    )
    run, safety, _, optim, _ = args("--deepspeed", str(path), "--precision", "bf16")
    config = resolve_settings(run, optim, safety, topology(2, "demix"), hidden_size=64).ds_config
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_accumulation_steps"] == 2  # one for each of two domains
    assert config["gradient_clipping"] == 0.1
    assert config["bf16"]["enabled"] is True
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 64 * 64}
    assert config["use_data_before_expert_parallelism"] is True


def test_the_file_has_its_way_with_defaults_but_not_with_flags(tmp_path):
    path = tmp_path / "ds.json"
    zero = '"zero_optimization": {"stage": 1}'
    path.write_text(f'{{"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 2.0, {zero}}}')
    run, safety, _, optim, _ = args("--deepspeed", str(path))
    settled = resolve_settings(run, optim, safety, topology(4, "demix"), hidden_size=64)
    assert (settled.run.per_device_train_batch_size, settled.optim.max_grad_norm) == (4, 2.0)
    assert settled.global_batch == 16
    assert settled.make_batch_division(3) == BatchDivision(
        micro_batch=4, global_batch=16, rank=3, ranks=4
    )
    origin = find_origin(settled.run, "per_device_train_batch_size")
    assert origin == f"DeepSpeed {path}"
    # The arguments themselves are left as they are.
    assert (run.per_device_train_batch_size, optim.max_grad_norm) == (8, 0.1)
    assert settled.replace_arguments((run, safety, optim)) == (settled.run, safety, settled.optim)
    run, safety, _, optim, _ = args("--deepspeed", str(path), "--max_grad_norm", "1")
    with pytest.raises(UserError, match=r"gradient_clipping.*max_grad_norm"):
        resolve_settings(run, optim, safety, topology(4, "demix"), hidden_size=64)


def test_plan_follows_the_flags():
    run, safety, _, optim, _ = args(
        *("--max_steps", "200", "--stop_step", "50", "--learning_rate", "1", "--seed", "9"),
        *("--nonfinite", "skip", "--spike_factor", "3"),
    )
    plan = make_loop_plan(run, optim, safety, topology(4, "demix"))
    assert (plan.max_steps, plan.stop_step, plan.seed) == (200, 50, 9)
    assert (plan.nonfinite, plan.spike_factor) == ("skip", 3.0)
    # 8 % of 200 steps, then down to 0 at the end
    assert [plan.schedule(n) for n in (8, 16, 108, 200)] == [0.5, 1.0, 0.5, 0.0]


def test_rollback_is_not_for_independent_models():
    run, safety, _, optim, _ = args("--nonfinite", "rollback")
    with pytest.raises(UserError, match=r"--nonfinite rollback: independent models"):
        make_loop_plan(run, optim, safety, topology(4, "btm"))


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_fp16_skips_whatever_the_policy(policy):
    run, safety, _, optim, _ = args("--nonfinite", policy, "--precision", "fp16")
    if policy == "rollback":
        with pytest.raises(UserError, match="--nonfinite rollback has no effect with fp16"):
            make_loop_plan(run, optim, safety, topology(4, "demix"))
    else:
        assert make_loop_plan(run, optim, safety, topology(4, "demix")).nonfinite == policy
