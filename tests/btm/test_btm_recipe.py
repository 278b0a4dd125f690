"""Recipes: steps, batches and tokens, and invalid recipes."""

import json
from pathlib import Path

import numpy as np
import pytest

from megamod.args import DataArgs, LoraArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.btm.campaign import BtmArgs, build_campaign, check_campaign_data
from megamod.btm.tasks import make_expert_task, make_seed_task, make_world_task
from megamod.data.corpus.header import FORMAT
from megamod.data.corpus.indexed import IndexedWriter, format_split_prefix
from megamod.errors import UserError
from megamod.flags import parse_args

RECIPES = Path(__file__).resolve().parents[2] / "launchers" / "recipes"


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    split = {"items": 1, "tokens": 4, "bytes": 16, "max_id": 3}
    splits = {name: split for name in ("train", "valid", "test")}
    header = {"format": FORMAT, "domains": {key: splits for key in ("law", "med", "code", "art")}}
    header |= {"vocab_size": 8, "bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
    (folder / "databin.json").write_text(json.dumps(header))
    return folder


def parsed_of(data: Path, *flags: object) -> tuple:
    fixed = ("--data", data, "--output_dir", "out", "--max_steps", 100, "--max_seq_length", 10)
    argv = [str(word) for word in (*fixed, "--per_device_train_batch_size", 2, *flags)]
    return parse_args(
        BtmArgs, RunArgs, SafetyArgs, ModelArgs, LoraArgs, OptimArgs, DataArgs, argv=argv
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("rounds", [["law med code art"], ["law med", "code art"]])
def test_tokens_are_those_of_the_dense_run(data, share, rounds):
    parsed = parsed_of(data, "--global_batch_size", 16, "--seed_share", share, "--rounds", *rounds)
    campaign = build_campaign(parsed)
    tokens = campaign.seed_steps * 16 * 10
    for number, round_ in enumerate(campaign.rounds):
        for _ in round_:
            steps = campaign.get_last_step(number) - campaign.get_first_step(number)
            tokens += steps * campaign.expert_batch * 10
    assert tokens == 100 * 16 * 10
    assert "16,000 tokens; a dense run of 100 steps x 16 sequences has 16,000" in (
        campaign.format_token_counts()
    )


def test_later_rounds_begin_a_schedule_of_their_own(data):
    parsed = parsed_of(
        *(data, "--global_batch_size", 16, "--seed_share", 0.3, "--topk", 1),
        *("--rounds", "law med", "code art"),
    )
    campaign = build_campaign(parsed)
    first, later = (make_expert_task(campaign, parsed, n, d) for n, d in ((0, "law"), (1, "art")))
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
    campaign = build_campaign(parsed)
    task = make_expert_task(campaign, parsed, 0, "law")
    assert [stage.title for stage in task.stages] == ["train"]
    assert "--init_from model" in " ".join(task.stages[0].arguments)
    assert [stage.title for stage in make_world_task(campaign, parsed).stages] == ["train"]


def test_adapters_start_from_the_seed_that_is_trained_whole(data):
    lora = ("--lora_rank", 4, "--lora_dropout", 0.1, "--hidden_size", 32)
    parsed = parsed_of(data, "--global_batch_size", 16, "--seed_share", 0.3, *lora)
    campaign = build_campaign(parsed)
    seed, task = make_seed_task(campaign, parsed, 1), make_expert_task(campaign, parsed, 0, "law")
    (arguments,) = (stage.arguments for stage in seed.stages)
    kinds = (RunArgs, ModelArgs, LoraArgs, DataArgs)
    _, model, adapter, _ = parse_args(*kinds, argv=list(arguments))
    assert adapter.lora_rank is None and model.hidden_size == 32
    for stage in (*task.stages, *make_world_task(campaign, parsed).stages):
        run, model, adapter, _ = parse_args(*kinds, argv=list(stage.arguments))
        assert (model.model, model.hidden_size) == ("out/seed/model", None)
        assert (adapter.lora_rank, adapter.lora_dropout, run.max_steps) == (4, 0.1, 70)
    assert [stage.title for stage in task.stages] == ["train"]
    assert "16,000 tokens; a dense run" in campaign.format_token_counts()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--global_batch_size is missing"),
        (("--global_batch_size", 6), "not a multiple of the 4 experts"),
        (("--global_batch_size", 20), "leaves each 5 sequences"),
        (("--global_batch_size", 8, "--gpus_per_expert", 2), "not a multiple of 4"),
        (("--global_batch_size", 8, "--rounds", "law tax"), "--rounds: 'tax' is not in"),
        (("--global_batch_size", 8, "--rounds", "law med", "code law"), "'law' is named twice"),
        (("--global_batch_size", 8, "--rounds", "law med", " "), "contains no domain"),
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
            ("--global_batch_size", 8, "--lora_rank", 2, "--rounds", "law med", "code art"),
            "adapters of one seed are trained in one round",
        ),
        (
            ("--global_batch_size", 8, "--domains", "law", "--rounds", "law med"),
            "name different domains",
        ),
    ],
)
def test_what_is_refused(data, flags, message):
    with pytest.raises(UserError) as error:
        build_campaign(parsed_of(data, *flags))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "domain", "split"),
    [
        ((), "art", "valid"),
        (("--eval_split", "test"), "art", "test"),
        (("--domains", "law", "med", "--seed_domains", "code"), "code", "train"),
        (("--rounds", "law med", "code art", "--eval_split", "test"), "art", "valid"),
        (("--eval_split", "train", "--evaluate"), "law", "test"),
    ],
)
def test_splits_are_opened_before_the_first_job(data, flags, domain, split):
    """All splits that some job reads exist but one; without it nothing starts."""
    parsed = parsed_of(data, "--global_batch_size", 8, *flags)
    campaign = build_campaign(parsed)
    for name in ("law", "med", "code", "art"):
        for kind in ("train", "valid", "test"):
            prefix = data / format_split_prefix(name, kind)
            prefix.parent.mkdir(exist_ok=True)
            with IndexedWriter(prefix, np.uint16) as writer:
                writer.add_item(np.arange(4))
    check_campaign_data(campaign, parsed)
    gone = data / format_split_prefix(domain, split)
    gone.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(UserError, match=f"{gone.name}.bin: ends at byte 0"):
        check_campaign_data(campaign, parsed)
    gone.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match=f"{gone.name}.idx"):
        check_campaign_data(campaign, parsed)


def test_a_folder_without_data(tmp_path):
    with pytest.raises(UserError, match="is not a data-bin"):
        build_campaign(parsed_of(tmp_path, "--global_batch_size", 8))


def test_the_recipe_of_the_paper(data):
    """Li et al. 2022: 16 GPUs x 2 x 32 for the seed, of which each of 8 experts has 2 GPUs."""
    argv = [str(RECIPES / "paper" / "btm_125m.yaml"), "--output_dir", "out"]
    domains = parse_args(
        BtmArgs, RunArgs, SafetyArgs, ModelArgs, LoraArgs, OptimArgs, DataArgs, argv=argv
    )[-1].domains
    header = json.loads((data / "databin.json").read_text())
    header["domains"] = {key: {} for key in domains}
    (data / "databin.json").write_text(json.dumps(header))
    parsed = parse_args(
        *(BtmArgs, RunArgs, SafetyArgs, ModelArgs, LoraArgs, OptimArgs, DataArgs),
        argv=[*argv, "--data", str(data)],
    )
    campaign = build_campaign(parsed)
    assert domains == sorted(domains) and len(domains) == 8
    assert campaign.batch == parsed[0].seed_gpus * 2 * 32
    assert campaign.expert_batch == parsed[0].gpus_per_expert * 2 * 32
    assert (campaign.seed_steps, campaign.total_steps) == (40_000, 80_000)
    assert campaign.expert_batch * campaign.length == 131_072
