"""Training of a mixture of experts: whole, the router alone, and the folder that comes out."""

import json
from pathlib import Path

import pytest
import torch
from launch import launch
from models.tiny_hosts import tiny_stock
from ranks import on_ranks
from runs.test_host_pretrain import (
    DOMAINS,
    LENGTH,
    save_tokenizer,
    seed_folder,
    start,
    stock_perplexity,
    words_of,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamod.data.corpus.binarize import binarize
from megamod.errors import UserError
from megamod.merging.moe.record import read_moe_record
from megamod.runs.attribution import attribute_texts
from megamod.runs.attribution_args import AttributionArgs
from megamod.runs.edit_moe import EditArgs, run_edit
from megamod.runs.to_moe import MoeArgs, run_to_moe

pytestmark = pytest.mark.slow  # two ranks that start DeepSpeed three times

ROW = "model.layers.{}.block_sparse_moe.gate.weight"


def make_folder(root: Path) -> Path:
    """Two experts with a tokenizer, their mixture, the same of the project's GPT, and data."""
    texts = {domain: words_of(domain) for domain in DOMAINS}
    every = [text for some in texts.values() for text in some]
    for seed, domain in enumerate(DOMAINS):
        seed_folder(root / domain, "llama", every, seed)
        ids = dict(bos_token_id=0, eos_token_id=1, pad_token_id=319)
        tiny_stock("demix", seed, vocab_size=320, **ids).save_pretrained(root / "gpt" / domain)
        save_tokenizer(root / "gpt" / domain, every)
    binarize(texts, str(root / "law"), root / "bin")
    for folder, output in ((root, "moe"), (root / "gpt", "gpt-moe")):
        models = [str(folder / domain) for domain in DOMAINS]
        run_to_moe(MoeArgs(models=models, output_dir=str(root / output), quiet=True))
    for name, stage in (("two.json", 2), ("three.json", 3)):
        (root / name).write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return root


def train(rank: int, root: Path) -> None:
    """All runs of one rank."""
    common = ("--model", root / "moe", "--learning_rate", 0.01)
    with pytest.raises(UserError, match="--train router has no effect"):
        start(root, "refused", "--model", root / "law", "--train", "router")
    start(root, "whole", *common, "--deepspeed", root / "three.json")
    start(root, "router", *common, "--train", "router", "--deepspeed", root / "two.json")
    more = ("--train", "router", "--gradient_checkpointing", "--deepspeed", root / "three.json")
    start(root, "recomputed", *common, *more)
    start(root, "gpt-trained", "--model", root / "gpt-moe", "--deepspeed", root / "two.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("mixture"))
    on_ranks(2, train, root)
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_router_alone_changes(trained):
    """With ZeRO 2, and with ZeRO 3 and recomputed layers, all other bits stay."""
    before, after = weights(trained / "moe"), weights(trained / "router" / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {ROW.format(0), ROW.format(1)}
    again = weights(trained / "recomputed" / "model")
    for name in changed:
        assert float((again[name] - after[name]).abs().max()) <= 1e-6


def test_whole_mixture_is_trained_and_saved_as_a_stock_folder(trained):
    folder = trained / "whole" / "model"
    before, after = weights(trained / "moe"), weights(folder)
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 20
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(model).__name__ == "MixtralForCausalLM"
    assert torch.equal(model.model.layers[1].mlp.gate.weight, after[ROW.format(1)])


def test_mixture_of_the_projects_gpt_is_trained(trained):
    folder = trained / "gpt-trained" / "model"
    before, after = weights(trained / "gpt-moe"), weights(folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    block = "model.layers.1.feed_forward"
    assert {f"{block}.gate.weight", f"{block}.experts.1.fc1.weight"} <= changed
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(model).__name__ == "DemixMoeForCausalLM"
    assert read_moe_record(folder).router["trained"] == "all"
    assert "import megamod" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["moe", "gpt-moe"])
def test_mixtures_are_scored_and_planned_and_write_text(trained, tmp_path, name, capsys):
    folder, json_file = trained / name, tmp_path / "result.json"
    common = ("--max_seq_length", LENGTH)
    launch("eval_lm", "--model", folder, "--data", trained / "bin", *common, "--output", json_file)
    (scored,) = json.loads(json_file.read_text())["models"].values()
    for domain in DOMAINS:
        expected = stock_perplexity(folder, trained / "bin", domain)
        assert scored["own"][domain] == pytest.approx(expected, rel=1e-4)
    capsys.readouterr()
    prompt, greedy = words_of("law", 1)[0][:20], ("--temperature", 0)
    launch("generate", "--model", folder, "--prompt", prompt, "--max_new_tokens", 5, *greedy)
    text = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    words = model.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :]
    assert tokenizer.decode(words, skip_special_tokens=True).strip() in text
    flags = ("--world_size", 2, "--max_steps", 10, "--json", json_file)
    launch("plan", "--model", folder, *common, *flags)
    plan = json_file.read_text() + capsys.readouterr().out
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,}" in plan or str(count) in plan


def test_balance_and_loads_are_logged_apart(trained):
    lines = (trained / "whole" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    layers = [record[f"balance_loss/layer{number}"] for number in range(2)]
    assert record["balance_loss"] == pytest.approx(sum(layers) / 2)
    assert 1.9 < record["balance_loss"] < 2.1  # two of two experts: always 2
    for domain in DOMAINS:
        loads = [record[f"load/{domain}/{expert}"] for expert in DOMAINS]
        assert sum(loads) == pytest.approx(1.0)
    assert record["loss"] == pytest.approx(sum(record["loss_by_domain"].values()) / 2, rel=0.1)


def test_trained_mixture_says_so(trained, tmp_path):
    record = read_moe_record(trained / "whole" / "model")
    assert record.router["trained"] == "all" and record.domains == list(DOMAINS)
    args = MoeArgs(output_dir=str(tmp_path / "dropped"), quiet=True)
    with pytest.raises(UserError, match="it was trained with the others"):
        run_edit(args, EditArgs(base=str(trained / "whole" / "model"), drop="law"))
    edit = EditArgs(base=str(trained / "whole" / "model"), drop="law", keep_influence=True)
    run_edit(args, edit)
    AutoModelForCausalLM.from_pretrained(tmp_path / "dropped")


def test_attribution_names_experts(trained, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(words_of("law", 2)))
    args = AttributionArgs(
        model=str(trained / "moe"), text=str(text), output_dir=str(tmp_path / "who")
    )
    attribute_texts(args)
    printed = capsys.readouterr().out
    record = read_moe_record(trained / "moe")
    assert record.experts[0].digest.rpartition(":")[2][:16] in printed
    result = json.loads((tmp_path / "who" / "attribution.json").read_text())
    assert len(result["documents"]) == 2
    assert result["experts"][1]["domain"] == "med"
    shares = torch.tensor(result["documents"][0]["token_shares"])
    assert len(result["documents"][0]["tokens"]) == len(shares) <= LENGTH * 2
    assert torch.allclose(shares.sum(1), torch.ones(len(shares)), atol=1e-5)
    assert torch.allclose(shares.mean(0), torch.tensor(result["documents"][0]["shares"]))
    assert (tmp_path / "who" / "attribution.png").read_bytes()[1:4] == b"PNG"
    first = (tmp_path / "who" / "tokens.txt").read_text().splitlines()[0].split()
    assert first == ["document", "token", "law", "med", "first", "text"]
    with pytest.raises(UserError, match=r"there is no moe\.json|is a llama"):
        attribute_texts(AttributionArgs(model=str(trained / "law"), text=str(text)))
    text.write_text("\n")
    with pytest.raises(UserError, match=r"^--text: .*text\.txt holds no text"):
        attribute_texts(AttributionArgs(model=str(trained / "moe"), text=str(text)))
