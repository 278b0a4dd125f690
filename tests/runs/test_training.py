"""Steps that all runs share: agreement of ranks, records, settings of a resumed run."""

import json
import logging

import pytest
import yaml
from ranks import on_ranks

from megamod.args import DataArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.dist.process import check_ranks_agree, read_launcher_rank, read_launcher_world_size
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.flags import parse_args
from megamod.runs.resume_settings import FREE_ON_RESUME, list_settings_to_repeat
from megamod.runs.training import format_group_table, write_run_records
from megamod.train.optim import make_optimizer_factory

DOMAINS = ("law", "med", "code", "news")
ALL = (RunArgs, SafetyArgs, ModelArgs, OptimArgs, DataArgs)


def topology(world: int, sharing: str) -> DomainTopology:
    return DomainTopology(world, DOMAINS, Sharing(sharing))


def args(*flags: str):
    return parse_args(*ALL, argv=list(flags))


def test_resumed_runs_keep_what_decides_their_numbers():
    item = list_settings_to_repeat(args("--seed", "1", "--output_dir", "a"), "digest", 64)
    other = list_settings_to_repeat(
        args(
            *("--seed", "1", "--output_dir", "b", "--per_device_train_batch_size", "4"),
            *("--save_steps", "7", "--precision", "bf16", "--stop_step", "3"),
        ),
        "digest",
        64,
    )
    assert item == other
    for flag, value in (("--seed", "2"), ("--learning_rate", "1"), ("--untie", "feedforward")):
        changed = list_settings_to_repeat(args(flag, value), "digest", 64)
        assert [key for key in item if item[key] != changed[key]] == [flag[2:]]
    assert list_settings_to_repeat(args(), "other", 64) != item
    assert list_settings_to_repeat(args(), "digest", 32) != item
    known = {name for cls in ALL for name in cls.__dataclass_fields__}
    assert known >= FREE_ON_RESUME


def test_optimizer_maker_hands_the_flags_on():
    import torch

    optim = args("--adam_beta2", "0.5", "--weight_decay", "0.25", "--adam_epsilon", "0.125")[3]
    optimizer = make_optimizer_factory(optim)([{"params": [torch.zeros(2, requires_grad=True)]}])
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.5), 0.25, 0.125)


def test_the_launcher_tells_rank_and_world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (read_launcher_rank(), read_launcher_world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (read_launcher_rank(), read_launcher_world_size()) == (3, 8)


def together(rank: int, root) -> dict[str, object]:
    import torch

    logging.disable(logging.CRITICAL)
    check_ranks_agree({"the run": "a", "the data": "b"})
    output: dict[str, object] = {}
    try:
        check_ranks_agree({"the run": "a", "the data": f"digest {rank}", "code": "c"})
    except UserError as error:
        output["disagree"] = str(error)
    output["table"] = format_group_table(topology(2, "demix"), torch.device("cpu"))
    parsed = args("--seed", "7", "--output_dir", str(root / "out"))
    write_run_records(root / "out", {"zero_optimization": {"stage": 1}}, parsed)
    (root / "file").touch()
    try:
        write_run_records(root / "file" / "out", {}, parsed)
    except UserError as error:
        output["unwritable"] = str(error)
    return output


@pytest.mark.slow
def test_ranks_agree_or_all_of_them_stop(tmp_path):
    for message in on_ranks(2, together, tmp_path):
        assert message["disagree"].startswith(
            "the ranks disagree about the data: start all of them"
        )
        assert (
            message["unwritable"] == f"--output_dir {tmp_path / 'file' / 'out'}: cannot be written"
        )
        rows = [line.split() for line in message["table"].splitlines()]
        assert [row[0] for row in rows] == ["rank", "0", "1"]
        assert [row[3:] for row in rows[1:]] == [["law,med", "0-1", "0"], ["code,news", "0-1", "1"]]
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["seed"] == 7
    config = json.loads((tmp_path / "out" / "ds_config.resolved.json").read_text())
    assert config == {"zero_optimization": {"stage": 1}}
    assert json.loads((tmp_path / "out" / "env.json").read_text())["world_size"] == 2
