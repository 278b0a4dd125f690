"""What recipes mean: steps, batches and tokens; and those that mean nothing."""

import json
from pathlib import Path

import pytest

from megamod.args import DataArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs, parse_args
from megamod.btm.recipe import BtmArgs, make_campaign
from megamod.btm.tasks import expert_task, world_task
from megamod.errors import UserError

RECIPES = Path(__file__).resolve().parents[2] / "launchers" / "recipes"


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    header = {"domains": {key: {} for key in ("law", "med", "code", "art")}}
    (folder / "databin.json").write_text(json.dumps(header))
    return folder


def parsed_of(data: Path, *flags: object) -> tuple:
    fixed = ("--data", data, "--output_dir", "out", "--max_steps", 100, "--max_seq_length", 10)
    argv = [str(word) for word in (*fixed, "--per_device_train_batch_size", 2, *flags)]
    return parse_args(BtmArgs, RunArgs, SafetyArgs, ModelArgs, OptimArgs, DataArgs, argv=argv)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("rounds", [["law med code art"], ["law med", "code art"]])
def test_tokens_are_those_of_the_dense_run(data, share, rounds):
    parsed = parsed_of(data, "--global_batch_size", 16, "--seed_share", share, "--rounds", *rounds)
    campaign = make_campaign(parsed)
    tokens = campaign.seed_steps * 16 * 10
    for number, round_ in enumerate(campaign.rounds):
        for _ in round_:
            steps = campaign.last_step(number) - campaign.first_step(number)
            tokens += steps * campaign.expert_batch * 10
    assert tokens == 100 * 16 * 10
    assert "16,000 tokens; a dense run of 100 steps x 16 sequences has 16,000" in (
        campaign.accounting()
    )


def test_later_rounds_begin_a_schedule_of_their_own(data):
    parsed = parsed_of(
        *(data, "--global_batch_size", 16, "--seed_share", 0.3, "--topk", 1),
        *("--rounds", "law med", "code art"),
    )
    campaign = make_campaign(parsed)
    first, later = (expert_task(campaign, parsed, n, d) for n, d in ((0, "law"), (1, "art")))
    assert [stage.title for stage in first.stages] == ["branch", "train"]
    assert [stage.title for stage in later.stages] == ["prior", "branch", "train"]
    estimate, branch, train = (" ".join(stage.arguments) for stage in later.stages)
    assert "--experts law med --data" in estimate and "--domain art" in estimate
    assert "--prior out/priors/art.json --topk 1" in branch
    assert "--max_steps 70" in train and "--global_batch_size 4" in train
    assert "--max_steps 100" in " ".join(first.stages[-1].arguments)
    assert "--step 30" in " ".join(first.stages[0].arguments)


def test_without_a_seed_nothing_branches(data):
    parsed = parsed_of(data, "--global_batch_size", 16, "--seed_share", 0, "--init_from", "model")
    campaign = make_campaign(parsed)
    task = expert_task(campaign, parsed, 0, "law")
    assert [stage.title for stage in task.stages] == ["train"]
    assert "--init_from model" in " ".join(task.stages[0].arguments)
    assert [stage.title for stage in world_task(campaign, parsed).stages] == ["train"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "--global_batch_size is missing"),
        (("--global_batch_size", 6), "not a multiple of the 4 experts"),
        (("--global_batch_size", 20), "leaves each 5 sequences"),
        (("--global_batch_size", 8, "--gpus_per_expert", 2), "not a multiple of 4"),
        (("--global_batch_size", 8, "--rounds", "law tax"), "--rounds: 'tax' is not in"),
        (("--global_batch_size", 8, "--rounds", "law med", "code law"), "'law' is named twice"),
        (("--global_batch_size", 8, "--rounds", "law med", " "), "names no domain"),
        (("--global_batch_size", 8, "--domains", "tax"), "--domains: 'tax' is not in"),
        (("--global_batch_size", 8, "--seed_domains", "tax"), "--seed_domains: 'tax'"),
        (("--global_batch_size", 8, "--seed_share", 1), "leaves the experts no step"),
        (("--global_batch_size", 8, "--stop_step", 3), "--stop_step: is set by the driver"),
        (("--global_batch_size", 8, "--untie", "feedforward"), "--untie feedforward"),
        (("--global_batch_size", 8, "--domain_token"), "--domain_token"),
        (
            ("--global_batch_size", 8, "--in_one_world", "--rounds", "law med", "code art"),
            "--in_one_world: has one round",
        ),
        (
            ("--global_batch_size", 8, "--domains", "law", "--rounds", "law med"),
            "name different domains",
        ),
    ],
)
def test_what_is_refused(data, flags, told):
    with pytest.raises(UserError) as error:
        make_campaign(parsed_of(data, *flags))
    assert told in str(error.value)


def test_a_folder_without_data(tmp_path):
    with pytest.raises(UserError, match="is not a data-bin"):
        make_campaign(parsed_of(tmp_path, "--global_batch_size", 8))


def test_the_recipe_of_the_paper(data):
    """Li et al. 2022: 16 GPUs x 2 x 32 for the seed, of which each of 8 experts has 2 GPUs."""
    argv = [str(RECIPES / "paper" / "btm_125m.yaml"), "--output_dir", "out"]
    domains = parse_args(BtmArgs, RunArgs, SafetyArgs, ModelArgs, OptimArgs, DataArgs, argv=argv)[
        -1
    ].domains
    header = {"domains": {key: {} for key in domains}}
    (data / "databin.json").write_text(json.dumps(header))
    parsed = parse_args(
        *(BtmArgs, RunArgs, SafetyArgs, ModelArgs, OptimArgs, DataArgs),
        argv=[*argv, "--data", str(data)],
    )
    campaign = make_campaign(parsed)
    assert domains == sorted(domains) and len(domains) == 8
    assert campaign.batch == parsed[0].seed_gpus * 2 * 32
    assert campaign.expert_batch == parsed[0].gpus_per_expert * 2 * 32
    assert (campaign.seed_steps, campaign.total_steps) == (40_000, 80_000)
    assert campaign.expert_batch * campaign.length == 131_072
