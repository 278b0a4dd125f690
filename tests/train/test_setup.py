import json
import logging

import pytest
import yaml
from ranks import on_ranks

from megamod.args import DataArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs, parse_args
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.train import setup

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
    assert setup.micro_steps(run, topology(world, sharing)) == steps


def test_micro_steps_must_serve_all_domains_of_a_rank():
    run = args("--global_batch_size", "48")[0]
    assert setup.micro_steps(run, topology(2, "dense")) == 3
    with pytest.raises(
        UserError, match=r"--global_batch_size 48 is not a multiple of 32 = .* 2 do"
    ):
        setup.micro_steps(run, topology(2, "demix"))


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
    config = setup.engine_config(run, safety, optim, topology(2, "demix"), hidden_size=64)
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
    setup.engine_config(run, safety, optim, topology(4, "demix"), hidden_size=64)
    assert (run.per_device_train_batch_size, optim.max_grad_norm) == (4, 2.0)
    run, safety, _, optim, _ = args("--deepspeed", str(path), "--max_grad_norm", "1")
    with pytest.raises(UserError, match=r"gradient_clipping.*max_grad_norm"):
        setup.engine_config(run, safety, optim, topology(4, "demix"), hidden_size=64)


def test_plan_follows_the_flags():
    run, safety, _, optim, _ = args(
        *("--max_steps", "200", "--stop_step", "50", "--learning_rate", "1", "--seed", "9"),
        *("--nonfinite", "skip", "--spike_factor", "3"),
    )
    plan = setup.make_plan(run, safety, optim, topology(4, "demix"))
    assert (plan.max_steps, plan.stop_step, plan.seed) == (200, 50, 9)
    assert (plan.nonfinite, plan.spike_factor) == ("skip", 3.0)
    # 8 % of 200 steps, then down to 0 at the end
    assert [plan.schedule(n) for n in (8, 16, 108, 200)] == [0.5, 1.0, 0.5, 0.0]


def test_rollback_is_not_for_independent_models():
    run, safety, _, optim, _ = args("--nonfinite", "rollback")
    with pytest.raises(UserError, match=r"--nonfinite rollback: independent models"):
        setup.make_plan(run, safety, optim, topology(4, "btm"))


def test_resumed_runs_keep_what_decides_their_numbers():
    one = setup.settings_to_keep(args("--seed", "1", "--output_dir", "a"), "digest", 64)
    other = setup.settings_to_keep(
        args(
            *("--seed", "1", "--output_dir", "b", "--per_device_train_batch_size", "4"),
            *("--save_steps", "7", "--precision", "bf16", "--stop_step", "3"),
        ),
        "digest",
        64,
    )
    assert one == other
    for flag, value in (("--seed", "2"), ("--learning_rate", "1"), ("--untie", "feedforward")):
        changed = setup.settings_to_keep(args(flag, value), "digest", 64)
        assert [key for key in one if one[key] != changed[key]] == [flag[2:]]
    assert setup.settings_to_keep(args(), "other", 64) != one
    assert setup.settings_to_keep(args(), "digest", 32) != one
    known = {name for cls in ALL for name in cls.__dataclass_fields__}
    assert known >= setup.FREE_ON_RESUME


def test_optimizer_maker_hands_the_flags_on():
    import torch

    optim = args("--adam_beta2", "0.5", "--weight_decay", "0.25", "--adam_epsilon", "0.125")[3]
    optimizer = setup.optimizer_maker(optim)([{"params": [torch.zeros(2, requires_grad=True)]}])
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.5), 0.25, 0.125)


def test_the_launcher_tells_rank_and_world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (setup.started_rank(), setup.started_world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (setup.started_rank(), setup.started_world_size()) == (3, 8)


def together(rank: int, root) -> dict[str, object]:
    import torch

    logging.disable(logging.CRITICAL)
    setup.check_agreement({"the run": "a", "the data": "b"})
    told: dict[str, object] = {}
    try:
        setup.check_agreement({"the run": "a", "the data": f"digest {rank}", "code": "c"})
    except UserError as error:
        told["disagree"] = str(error)
    told["table"] = setup.group_table(topology(2, "demix"), torch.device("cpu"))
    parsed = args("--seed", "7", "--output_dir", str(root / "out"))
    setup.record_run(root / "out", {"zero_optimization": {"stage": 1}}, parsed)
    (root / "file").touch()
    try:
        setup.record_run(root / "file" / "out", {}, parsed)
    except UserError as error:
        told["unwritable"] = str(error)
    return told


@pytest.mark.slow
def test_ranks_agree_or_all_of_them_stop(tmp_path):
    for told in on_ranks(2, together, tmp_path):
        assert told["disagree"].startswith("the ranks disagree about the data: start all of them")
        assert told["unwritable"] == f"--output_dir {tmp_path / 'file' / 'out'}: cannot be written"
        rows = [line.split() for line in told["table"].splitlines()]
        assert [row[0] for row in rows] == ["rank", "0", "1"]
        assert [row[3:] for row in rows[1:]] == [["law,med", "0-1", "0"], ["code,news", "0-1", "1"]]
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["seed"] == 7
    config = json.loads((tmp_path / "out" / "ds_config.resolved.json").read_text())
    assert config == {"zero_optimization": {"stage": 1}}
    assert json.loads((tmp_path / "out" / "env.json").read_text())["world_size"] == 2
