"""Adapters of one seed in every command after training: forests, scores, mixtures, merges."""

import json
from pathlib import Path

import peft
import pytest
import torch
from launchers.test_hosts_downstream import DOMAINS, IDS, LENGTH, launch, stock_folder
from runs.test_host_pretrain import save_tokenizer, words_of
from safetensors.torch import load_file
from saved_models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import megamod  # noqa: F401  (registers the models)
from megamod.btm.branch import write_branch_checkpoint
from megamod.btm.parents import find_parent
from megamod.data.corpus.binarize import binarize
from megamod.errors import UserError
from megamod.models.lm.forest import ForestForCausalLM
from megamod.models.lm.forest_experts import load_experts
from megamod.models.lm.load import load_lm
from megamod.states.forest import open_forest
from megamod.states.weights import read_weights


def save_adapter(folder: Path, seed: Path, number: int, **changes: object) -> Path:
    """An adapter as peft itself writes it, without tokenizer; no matrix of it is zero."""
    torch.manual_seed(number)
    settings = dict(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5) | changes
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(seed), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A seed, two adapters of it, their merged models, and a forest of the three."""
    root = tmp_path_factory.mktemp("adapters")
    texts = {domain: words_of(domain) for domain in DOMAINS}
    save_tokenizer(root / "words", [text for some in texts.values() for text in some])
    binarize(texts, str(root / "words"), root / "bin")
    seed = stock_folder(root / "seed", "llama", 0, root / "words")
    for number, domain in enumerate(DOMAINS):
        adapter = save_adapter(root / domain, seed, number)
        merge = ("--models", adapter, "--output_dir", root / f"merged-{domain}", "--quiet")
        launch("merge", *merge)
    for name, paths in {"forest": ("law", "med"), "merged": ("merged-law", "merged-med")}.items():
        for domain, path in zip((*DOMAINS, "base"), (*paths, "seed"), strict=True):
            add = ("--forest", root / name, "--path", root / path, "--domain", domain)
            launch("forest", "add", *add)
    return root


def storages(model: torch.nn.Module) -> int:
    """Bytes of the parameters, each storage counted once."""
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    return sum(held.values())


@torch.no_grad()
def test_a_mixture_is_that_of_the_merged_models(root):
    forest = ForestForCausalLM.from_pretrained(root / "forest")
    merged = ForestForCausalLM.from_pretrained(root / "merged")
    for domain in (None, *DOMAINS, "base"):
        prior = None if domain is None else {domain: 1.0}
        forest.set_prior(prior)
        merged.set_prior(prior)
        torch.testing.assert_close(forest(IDS).logits, merged(IDS).logits, rtol=0, atol=1e-5)
    forest.set_prior(None)
    merged.set_prior(None)
    past, rows = None, []
    for part in IDS.split(3, dim=1):
        output = forest(part, past_key_values=past, use_cache=True)
        past = output.past_key_values
        rows.append(output.logits)
    torch.testing.assert_close(torch.cat(rows, 1), merged(IDS).logits, rtol=0, atol=1e-5)
    arguments = dict(max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert torch.equal(forest.generate(IDS, **arguments), merged.generate(IDS, **arguments))
    assert AutoTokenizer.from_pretrained(root / "forest")("law").input_ids


def test_the_weights_of_the_seed_are_held_once(root):
    seed = storages(AutoModelForCausalLM.from_pretrained(root / "seed"))
    adapters = 2 * storages(torch.nn.ModuleList(
        module
        for module in load_lm(root / "law").modules()
        if isinstance(module, torch.nn.ModuleDict)
    ))  # fmt: skip
    forest = ForestForCausalLM.from_pretrained(root / "forest")
    assert len(forest.parts) == 1 and adapters > 0
    assert storages(forest) == seed + adapters
    held = list(load_experts(open_forest(root / "forest"), "cpu"))
    assert len({id(expert.model) for expert in held}) == 1
    assert storages(held[0].model) == seed + adapters


@torch.no_grad()
def test_a_forest_is_saved_as_one_folder(root, tmp_path):
    forest = ForestForCausalLM.from_pretrained(root / "forest")
    forest.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, forest(IDS).logits)
    assert storages(again) == storages(forest)


def test_scores_and_mixtures(root, capsys):
    common = ("--data", root / "bin", "--max_seq_length", LENGTH)
    scores = {}
    for name in ("forest", "merged"):
        output = root / f"scores-{name}.json"
        launch("eval_lm", "--model", root / name, *common, "--output", output)
        mixed = root / f"mixed-{name}.json"
        mix = ("--forest", root / name, "--domain", "law", "--prior_sequences", 4)
        launch("eval_ensemble", *mix, *common, "--output", mixed, "--cache_dir", root / "cache")
        scores[name] = [json.loads(file.read_text()) for file in (output, mixed)]
    rows = [next(iter(record["models"].values()))["perplexity"] for record, _ in scores.values()]
    assert list(rows[0]) == [*DOMAINS, "base"]
    mixed = [mixture["domains"]["law"] for _, mixture in scores.values()]
    for first, second in (rows, mixed):
        assert numbers(first) == pytest.approx(numbers(second), rel=1e-4)
    single = ("--model", root / "law", *common, "--output", root / "single.json")
    launch("eval_lm", *single)
    record = json.loads((root / "single.json").read_text())["models"][str(root / "law")]
    assert record["perplexity"]["dense"] == pytest.approx(rows[0]["law"])
    launch("verify", root / "forest")
    assert "adapter of" in capsys.readouterr().out


def numbers(record: object) -> list[float]:
    """All numbers of a JSON record, in order."""
    if isinstance(record, dict):
        return [number for value in record.values() for number in numbers(value)]
    if isinstance(record, list):
        return [number for value in record for number in numbers(value)]
    return [float(record)] if isinstance(record, (int, float)) else []


def test_averages_and_branches(root, tmp_path):
    average = tmp_path / "average"
    launch("merge", "--forest", root / "forest", "--experts", *DOMAINS, "--output_dir", average)
    halves = [read_weights(root / f"merged-{domain}") for domain in DOMAINS]
    for name, tensor in read_weights(average).items():
        torch.testing.assert_close(tensor, (halves[0][name] + halves[1][name]) / 2)
    assert type(AutoModelForCausalLM.from_pretrained(average)).__module__.startswith("transformers")
    write_branch_checkpoint([find_parent(root / "law")], [1.0], ["new"], tmp_path / "run")
    started = read_weights(tmp_path / "run" / "checkpoints" / "step-0")
    assert all(torch.equal(started[name], tensor) for name, tensor in halves[0].items())


REFUSED = {
    "no weights": ({}, "adapter_model.safetensors"),
    "kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "seed": ({"base_model_name_or_path": "nowhere"}, "there is no model at its base_model_name_or"),
    "nameless": ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_are_no_adapters(root, tmp_path, case):
    changes, message = REFUSED[case]
    folder = tmp_path / "adapter"
    folder.mkdir()
    fields = json.loads((root / "law" / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    if changes:
        weights = (root / "law" / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=message):
        load_lm(folder)


def test_what_cannot_share_a_seed_is_refused(root, tmp_path):
    head = save_adapter(tmp_path / "head", root / "seed", 3, target_modules=["lm_head"])
    norm = save_adapter(tmp_path / "norm", root / "seed", 4, modules_to_save=["norm"])
    for folder in (head, norm):
        with pytest.raises(UserError, match="beside other adapters of its seed; merge it first"):
            load_lm(folder)
    wide = save_adapter(tmp_path / "wide", stock_folder(tmp_path / "big", "llama", 1, None,
                        hidden_size=32), 5)  # fmt: skip
    fields = json.loads((wide / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = str(root / "seed")
    (wide / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="the adapter does not fit its seed"):
        load_lm(wide)


def test_another_tokenizer_is_refused(root, tmp_path):
    save_tokenizer(tmp_path / "words", ["quite other words"], 280)
    seed = stock_folder(tmp_path / "seed", "llama", 2, tmp_path / "words")
    add = ("add", "--path", save_adapter(tmp_path / "law", seed, 0), "--domain", "other")
    with pytest.raises(UserError, match="their tokenizers differ"):
        launch("forest", *add, "--forest", root / "forest")
    assert open_forest(root / "forest").domains == (*DOMAINS, "base")


@torch.no_grad()
def test_the_projects_own_decoder_is_a_seed(tmp_path):
    seed = make_model(tmp_path / "seed")
    ids = IDS % 23
    merged = []
    for number, domain in enumerate(DOMAINS):
        adapter = save_adapter(tmp_path / domain, seed, number, target_modules=["q_proj", "fc1"])
        launch("forest", "add", "--forest", tmp_path, "--path", adapter, "--domain", domain)
        merged.append(peft.AutoPeftModelForCausalLM.from_pretrained(adapter).eval()(ids).logits)
    forest = ForestForCausalLM.from_pretrained(tmp_path)
    assert len(forest.parts) == 1
    for domain, logits in zip(DOMAINS, merged, strict=True):
        forest.set_prior({domain: 1.0})
        torch.testing.assert_close(forest(ids).logits, logits.log_softmax(-1), rtol=0, atol=1e-5)


def test_a_plan_counts_states_of_the_adapter_alone(root, tmp_path):
    """Adam's moments and the float32 masters for the adapter; 4 operations per frozen weight."""
    common = ("--model", root / "seed", "--world_size", 1, "--max_seq_length", LENGTH)
    plans = []
    for flags in ((), ("--lora_rank", 2, "--lora_targets", "q_proj", "down_proj")):
        file = tmp_path / "plan.json"
        launch("plan", *common, *flags, "--json", file)
        (plan,) = json.loads(file.read_text())["jobs"]
        plans.append(plan)
    seed = AutoModelForCausalLM.from_pretrained(root / "seed")
    whole = sum(p.numel() for p in seed.parameters())
    adapter = sum(t.numel() for t in load_file(root / "law" / "adapter_model.safetensors").values())
    assert plans[1]["parameters"]["per_rank"] == whole + adapter
    states = [plan["memory"]["optimizer"] for plan in plans]
    assert states[0] % whole == 0 and states[1] == states[0] // whole * adapter
    matrices = whole - seed.get_input_embeddings().weight.numel()
    attention = plans[0]["flops_per_token"] - 6 * matrices
    assert plans[1]["flops_per_token"] == 6 * adapter + 4 * matrices + attention
