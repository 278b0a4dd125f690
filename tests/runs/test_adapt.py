"""Adaptation to a new domain: what changes, what must not, and what becomes of the forest."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from failures import failing
from ranks import on_ranks
from saved_models import DOMAINS, LENGTH, TOKENS, VOCAB, make_data, make_model

from megamod.args import RunArgs, SafetyArgs
from megamod.data.corpus.indexed import IndexedWriter, format_split_prefix
from megamod.data.lm.pretraining import LmData
from megamod.errors import UserError
from megamod.evaluation.held_out_data import HeldOut
from megamod.evaluation.model_folders import find_saved_models, score_models
from megamod.evaluation.perplexity import DENSE
from megamod.models.lm.demix import DemixForCausalLM
from megamod.runs.pretrain import causal_lm
from megamod.runs.pretrain.adapt_args import AdaptArgs, AdaptOptimArgs
from megamod.runs.pretrain.adapt_start import (
    AdaptationStart,
    estimate_expert_weights,
    make_start_record,
    select_start_expert,
)
from megamod.states.forest import open_forest
from megamod.states.grow import add_expert
from megamod.states.weights import extract_expert_weights, read_weights

NEW, OLD = "art", ("law", "code")
FEED_FORWARD = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


PRIOR = """{"format": 1, "domains": ["code", "law"], "prior": [0.25, 0.75], "rule": "last_token",
    "text": {"data_digest": "?", "domain": "art", "split": "valid", "sequences": 100}}"""


def start(root: Path, output: Path, *, stage: int | None = None, **changes) -> None:
    """One adaptation in this process or on these ranks."""
    from megamod.runs.pretrain.adapt import adapt

    run = dict(max_steps=4, per_device_train_batch_size=1, global_batch_size=2, save_steps=2)
    run |= dict(logging_steps=2, report_to="none", output_dir=str(output))
    arguments = dict(forest=str(root / "demix"), data=str(root / "bin"), domain=NEW, start="law")
    if "model" in changes:
        arguments |= dict(forest=None, start=None)
    run |= {name: changes.pop(name) for name in list(changes) if name in RunArgs.__annotations__}
    safety = SafetyArgs()
    if stage is not None:
        file = root / f"zero{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        safety = SafetyArgs(deepspeed=str(file))
    optim = AdaptOptimArgs(learning_rate=0.03, max_grad_norm=1.0, warmup_ratio=0.0)
    adapt(RunArgs(**run), safety, optim, AdaptArgs(**arguments | changes))


def learnable(databin: Path) -> None:
    """Make the new domain one that a few steps can learn: five words in turn."""
    for split in ("train", "valid", "test"):
        tokens = 4 + np.arange(TOKENS[NEW]) % 5
        tokens[6::7], tokens[-1] = 2, 2
        with IndexedWriter(databin / format_split_prefix(NEW, split), np.uint16) as writer:
            for item in np.split(tokens, range(7, len(tokens), 7)):
                writer.add_item(item)


def make_place(root: Path) -> Path:
    """A data-bin, a model with experts of all its domains but one, whole models, and a forest."""
    make_data(root / "bin")
    learnable(root / "bin")
    make_model(root / "demix", untie="feedforward", domains=list(OLD))
    make_model(root / "whole", domains=["code"])
    forest = root / "forest"
    forest.mkdir()
    entries = [
        {"domain": "law", "path": "../demix", "member": "law"},
        {"domain": "code", "path": "../whole", "member": None},
    ]
    rest = {"parents": [], "seed": None, "start_update": 0, "updates": 0, "tokens": 0, "gpus": 1}
    rest |= {"data_digest": None, "config_digest": None}
    text = json.dumps({"format": 1, "experts": [entry | rest for entry in entries]})
    (forest / "forest.json").write_text(text)
    return root


def scores(root: Path, model: Path):
    held_out = HeldOut(str(root / "bin"), DOMAINS, "test", None, 2, "auto", False)
    return score_models(find_saved_models(model, held_out), held_out, torch.device("cpu"))


def changed(first: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert first.keys() == other.keys()
    return {name for name in first if not torch.equal(first[name], other[name])}


def feed_forward(state: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in state if name.endswith(FEED_FORWARD)}


def adapt_alone(rank: int, root: Path) -> None:
    """All runs of one rank."""
    start(root, root / "grown")
    start(root, root / "resumed", stop_step=2)
    with pytest.raises(UserError, match="start: 'law' then, 'code' now"):
        start(root, root / "resumed", start="code")
    start(root, root / "resumed")
    with (
        failing(causal_lm, "select_own_scores", call=2),
        pytest.raises(UserError, match="after step 1"),
    ):
        start(root, root / "failed", eval_steps=1)  # the first call is that of step 0
    assert (root / "failed" / "checkpoints" / "step-1").is_dir()
    start(root, root / "failed", eval_steps=1)
    start(root, root / "whole-new", method="full", start="code")
    start(root, root / "dense", model=str(root / "whole"), gradient_checkpointing=True)
    forest = root / "forest"
    start(root, root / "joined", forest=str(forest))
    before = (forest / "forest.json").read_bytes()
    start(root, root / "joined", forest=str(forest))
    assert (forest / "forest.json").read_bytes() == before
    estimated(root, "one.json")
    start(root, root / "zero3", stage=3, stop_step=2)
    start(root, root / "zero3", stage=3)


def adapt_together(rank: int, root: Path) -> None:
    """All runs of two ranks."""
    start(root, root / "two", stage=2)
    start(root, root / "two-zero3", stage=3)
    estimated(root, "two.json")


def estimated(root: Path, name: str) -> None:
    data = LmData(str(root / "bin"), domains=[NEW], block_size=LENGTH, domain_token=False)
    result = estimate_expert_weights(open_forest(root / "demix"), data, 3, 1, torch.device("cpu"))
    if dist.get_rank() == 0:
        (root / name).write_text(json.dumps(result))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The runs of one rank and of two, done."""
    root = make_place(tmp_path_factory.mktemp("adapt"))
    on_ranks(1, adapt_alone, root)
    on_ranks(2, adapt_together, root)
    return root


def test_other_experts_are_left_alone_to_the_bit(root):
    old, new = scores(root, root / "demix"), scores(root, root / "grown" / "model")
    assert list(new) == [*OLD, NEW]
    assert {domain: new[domain] for domain in OLD} == old
    before, after = (read_weights(root / f) for f in ("demix", "grown/model"))
    assert all(torch.equal(after[name], before[name]) for name in before)
    config = json.loads((root / "grown" / "model" / "config.json").read_text())
    assert config["domains"] == [*OLD, NEW] and config["untie"] == "feedforward"


def test_new_expert_is_better_and_only_its_feed_forward_differs(root):
    matrix = scores(root, root / "grown" / "model")
    assert matrix[NEW][NEW].perplexity < 0.9 * matrix["law"][NEW].perplexity
    state = read_weights(root / "grown" / "model")
    law, new = extract_expert_weights(state, "law"), extract_expert_weights(state, NEW)
    assert changed(law, new) == feed_forward(law)
    trained = read_weights(root / "grown" / "checkpoints" / "step-4")
    assert changed(trained, new) == set()


def test_weight_files_of_the_source_are_linked(root):
    first = root / "resumed" / "model"
    start_from = root / "linked"
    start_from.mkdir()
    add_expert(first, start_from, "new", "law", extract_expert_weights(read_weights(first), "code"))
    for name in ("shared.safetensors", "expert_law.safetensors", f"expert_{NEW}.safetensors"):
        assert (start_from / name).samefile(first / name)
    model = DemixForCausalLM.from_pretrained(start_from)
    assert model.config.domains == [*OLD, NEW, "new"]
    tokens = torch.arange(4, 10)[None]
    assert torch.equal(model(tokens, domain="new").logits, model(tokens, domain="code").logits)
    with pytest.raises(UserError, match=r"its experts are .*; 'new' must be new"):
        add_expert(start_from, start_from, "new", "law", {})
    with pytest.raises(UserError, match=r"needs .*fc1.* of shape .*, but its weights have none"):
        add_expert(first, start_from, "newer", "law", {})


@pytest.mark.parametrize("run", ["resumed", "failed"])
def test_resumed_run_is_the_same_to_the_bit(root, run):
    for folder in ("model", "checkpoints/step-4"):
        first, other = (read_weights(root / name / folder) for name in ("grown", run))
        assert changed(first, other) == set()


def test_the_start_is_the_expert_of_the_highest_posterior(root):
    """The prior follows the posteriors of the sequences before; a plain loop over tokens."""
    data = LmData(str(root / "bin"), domains=[NEW], block_size=LENGTH, domain_token=False)
    model, prior, average = DemixForCausalLM.from_pretrained(root / "demix"), [0.5, 0.5], None
    for batch in data.iterate_eval_batches(NEW, "valid", 2, 2):
        posteriors = []
        for ids, targets in zip(batch["input_ids"], batch["labels"].tolist(), strict=True):
            weights = []
            for expert, share in zip(OLD, prior, strict=True):
                with torch.no_grad():
                    logits = model(ids[None], domain=expert).logits[0, -2].double()
                weights.append(share * float(logits.softmax(-1)[targets[-2]]))
            posteriors.append([weight / sum(weights) for weight in weights])
        means = [sum(column) / len(posteriors) for column in zip(*posteriors, strict=True)]
        if average is not None:
            means = [0.7 * a + 0.3 * m for a, m in zip(average, means, strict=True)]
        prior = average = means
    first, two = (json.loads((root / f"{name}.json").read_text()) for name in ("one", "two"))
    assert first == pytest.approx(average, abs=1e-5) and two == pytest.approx(first, abs=1e-6)


def never() -> list[float]:
    raise AssertionError("nothing needs to be estimated")


def test_the_start_that_is_chosen(tmp_path):
    root = make_place(tmp_path)
    forest, args = open_forest(root / "demix"), AdaptArgs(forest="F", domain=NEW)
    result = select_start_expert(forest, args, root, "auto", lambda: [0.25, 0.75])
    assert result.expert.domain == "code" and result.posterior == {"law": 0.25, "code": 0.75}
    (root / "prior.json").write_text(PRIOR)
    by_file = AdaptArgs(forest="F", domain=NEW, prior=str(root / "prior.json"))
    assert select_start_expert(forest, by_file, root, "auto", never).posterior == {
        "law": 0.75,
        "code": 0.25,
    }
    named = AdaptArgs(forest="F", domain=NEW, start="code")
    assert select_start_expert(forest, named, root, "auto", never).expert == forest.experts[1]
    # A run that goes on keeps to its choice, unless it is told otherwise.
    (root / "start.json").write_text(json.dumps(make_start_record(forest, result, "digest")))
    assert select_start_expert(forest, args, root, "auto", never) == result
    assert (
        select_start_expert(forest, args, root, "none", lambda: [0.75, 0.25]).expert.domain == "law"
    )
    other = replace(forest, path=root / "other")
    assert (
        select_start_expert(other, args, root, "auto", lambda: [0.75, 0.25]).expert.domain == "law"
    )
    (root / "start.json").write_text("{}")
    with pytest.raises(UserError, match="remove it to choose anew"):
        select_start_expert(forest, args, root, "auto", never)
    alone = replace(forest, experts=forest.experts[:1])
    assert select_start_expert(alone, args, root, "auto", never) == AdaptationStart(
        forest.experts[0], "the only one"
    )


@pytest.mark.parametrize("run", ["zero3", "two", "two-zero3"])
def test_stages_and_ranks_make_the_same_model(root, run):
    first, other = (read_weights(root / f / "model") for f in ("grown", run))
    for name, tensor in first.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


def test_full_adaptation_of_an_expert_is_a_whole_model_beside_the_others(root):
    output = root / "whole-new"
    forest = open_forest(output)
    assert forest.domains == (*OLD, NEW)
    assert [expert.member for expert in forest.experts] == [*OLD, None]
    built = forest.experts[-1]
    assert built.path == output / "model" and built.updates == 4 and built.start_update == 0
    assert [Path(parent.path).name for parent in built.parents] == ["demix"]
    started, state = (
        extract_expert_weights(read_weights(root / "demix"), "code"),
        read_weights(built.path),
    )
    assert changed(started, state) == set(state)
    matrix = scores(root, output)
    assert {domain: matrix[domain] for domain in OLD} == scores(root, root / "demix")
    assert matrix[NEW][NEW].perplexity < matrix["code"][NEW].perplexity


def test_dense_model_alone(root):
    state, started = read_weights(root / "dense" / "model"), read_weights(root / "whole")
    assert changed(started, state) == feed_forward(state)
    assert not (root / "dense" / "forest.json").exists()
    better, before = scores(root, root / "dense" / "model"), scores(root, root / "whole")
    assert better[DENSE][NEW].perplexity < before[DENSE][NEW].perplexity
    log = (root / "dense" / "metrics.jsonl").read_text().splitlines()
    first = next(record for record in map(json.loads, log) if "perplexity" in record)
    assert first["step"] == 0 and first["split"] == "valid"


def test_forest_is_joined_and_its_members_move_to_the_grown_folder(root):
    forest = open_forest(root / "forest" / "forest.json")
    grown = root / "joined" / "model"
    assert [(e.domain, e.path.resolve(), e.member) for e in forest.experts] == [
        ("law", grown, "law"),
        ("code", root / "whole", None),
        (NEW, grown, NEW),
    ]
    built = forest.experts[-1]
    assert built.tokens > 0 and built.gpus == 1 and built.seed == 1
    assert built.data_digest and built.config_digest


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "lore"}, "--start lore: .* has no such expert; choose of law, code"),
        ({"domain": "lore"}, "--domain lore is not in the data-bin .*; it holds law, code, art"),
        ({"domain": "law"}, "--domain law: .*demix has an expert of that name already"),
        ({"max_seq_length": 9}, "--max_seq_length 9: the experts have 8 positions"),
        ({"forest": "other"}, "other has vocab_size 24, --data .* has 23"),
        ({"model": "demix"}, "--model .*demix has experts: give it as --forest"),
        ({"model": "nowhere"}, "nowhere"),
        ({"forest": "nowhere"}, "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, changes, message):
    make_place(tmp_path)
    make_model(tmp_path / "other", untie="feedforward", vocab_size=VOCAB + 1, domains=list(OLD))
    changes = {
        name: str(tmp_path / value) if name in ("forest", "model") else value
        for name, value in changes.items()
    }
    before = tree(tmp_path)
    with pytest.raises(UserError, match=message):
        start(tmp_path, tmp_path / "out", **changes)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"forest": "F", "model": "M"}, "--forest F and --model M: give one of the two"),
        ({"start": "law", "prior": "P"}, "--start law and --prior P: give one of the two"),
        ({"model": "M", "prior": "P"}, "--prior P: --model M is a single model"),
        ({"domain": "a.b"}, "'a.b' is not made of letters, digits, _ and -"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(UserError, match=message):
        AdaptArgs(**flags)


def test_defaults_are_those_of_the_paper():
    optim = AdaptOptimArgs()
    assert (optim.learning_rate, optim.warmup_ratio, optim.max_grad_norm) == (5e-5, 0.08, 0.1)
    assert optim.lr_scheduler_type == "linear"
