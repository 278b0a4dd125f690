"""Stock folders in every command after training: forests, scores, mixtures, merges, plans."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launch import launch
from models.tiny_hosts import tiny_stock
from ranks import on_ranks
from runs.test_host_pretrain import LENGTH, save_tokenizer, stock_perplexity, words_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import megamod  # noqa: F401  (registers the models)
from megamod.btm.branch import write_branch_checkpoint
from megamod.btm.parents import find_parent
from megamod.data.corpus.binarize import binarize
from megamod.data.lm.text_blocks import read_text_blocks
from megamod.errors import UserError
from megamod.models.auto import make_lm_config
from megamod.models.lm.forest import ForestForCausalLM
from megamod.models.lm.load import build_lm
from megamod.states.forest import open_forest
from megamod.states.tokenizer_files import copy_tokenizer
from megamod.states.weights import extract_expert_weights, read_weights

DOMAINS = ("law", "med")
IDS = torch.tensor([[5, 9, 33, 70, 12, 8, 101, 44], [7, 7, 90, 3, 60, 61, 200, 2]])


def stock_folder(folder: Path, family: str, seed: int, tokenizer: Path | None, **more) -> Path:
    ids = dict(vocab_size=320, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    tiny_stock(family, seed, **ids | more).save_pretrained(folder)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Dense models of three families and one with experts; one tokenizer, and data made with it."""
    root = tmp_path_factory.mktemp("downstream")
    texts = {domain: words_of(domain) for domain in DOMAINS}
    save_tokenizer(root / "words", [text for some in texts.values() for text in some])
    binarize(texts, str(root / "words"), root / "bin")
    for number, (name, family) in enumerate(
        {"llama": "llama", "llama2": "llama", "gpt2": "gpt2", "bloom": "bloom"}.items()
    ):
        stock_folder(root / name, family, number, root / "words")
    stock_folder(root / "gpt2b", "gpt2", 5, root / "words")
    stock_folder(root / "wide", "olmo2", 4, root / "words", vocab_size=352)
    config = make_lm_config(
        str(root / "llama"),
        vocab_size=320,
        special_ids={"eos_token_id": 1},
        domains=DOMAINS,
        untie="feedforward",
        max_positions=LENGTH,
        attn_implementation=None,
        overrides={},
    )
    model = build_lm(config, seed=1, init_from=root / "llama")
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".experts.med." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(root / "demix")
    copy_tokenizer(root / "words", root / "demix")
    forest = root / "forest"
    for domain, name in {"law": "llama", "med": "gpt2", "art": "bloom", "tax": "wide"}.items():
        launch("forest", "add", "--forest", forest, "--path", root / name, "--domain", domain)
    add = ("add", "--forest", forest, "--path", root / "demix", "--member", "med")
    launch("forest", *add, "--domain", "new")
    return root


@torch.no_grad()
def stock_log_probs(folder: Path, size: int = 320) -> torch.Tensor:
    logits = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    return logits.float().log_softmax(-1)[..., :size]


WITHOUT_MEGAMOD = """
import sys
sys.modules["megamod"] = sys.modules["megamod_kernels"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
output, *folders = sys.argv[1:]
ids = torch.tensor(%s)
with torch.no_grad():
    save_file(
        {f: AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in folders}, output
    )
"""


def check_without_megamod(expected: dict[Path, torch.Tensor], output: Path) -> None:
    """Folders give these logits on `IDS` in a process that cannot import our packages."""
    program = WITHOUT_MEGAMOD % IDS.tolist()
    command = [sys.executable, "-W", "ignore", "-c", program, output, *expected]
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    logits = load_file(output)
    for folder, tensor in expected.items():
        assert torch.equal(logits[str(folder)], tensor), folder


@torch.no_grad()
def test_a_forest_of_families_mixes_and_generates(root):
    forest = ForestForCausalLM.from_pretrained(root / "forest").eval()
    assert forest.config.vocab_size == 320
    whole = forest(IDS)
    probabilities = [stock_log_probs(root / name) for name in ("llama", "gpt2", "bloom", "wide")]
    demix = AutoModelForCausalLM.from_pretrained(root / "demix").eval()
    probabilities.append(demix(IDS, domain="med").logits.log_softmax(-1))
    # By hand: the weights of an expert are the probabilities it gave to the tokens so far.
    evidence, expected = torch.zeros(5, 2), []
    for at in range(IDS.shape[1]):
        weights = evidence.log_softmax(0)
        expected.append(
            torch.stack(
                [w[:, None] + p[:, at] for w, p in zip(weights, probabilities, strict=True)]
            ).logsumexp(0)
        )
        if at + 1 < IDS.shape[1]:
            new = [p[:, at].gather(-1, IDS[:, at + 1, None])[:, 0] for p in probabilities]
            evidence = evidence + torch.stack(new)
    torch.testing.assert_close(whole.logits, torch.stack(expected, 1), rtol=0, atol=1e-4)

    past, rows = None, []
    for part in IDS.split(3, dim=1):
        output = forest(part, past_key_values=past, use_cache=True)
        past = output.past_key_values
        rows.append(output.logits)
    torch.testing.assert_close(torch.cat(rows, 1), whole.logits, rtol=0, atol=1e-5)
    arguments = dict(max_new_tokens=5, do_sample=False, pad_token_id=1)
    cached = forest.generate(IDS, use_cache=True, **arguments)
    assert torch.equal(cached, forest.generate(IDS, use_cache=False, **arguments))


@torch.no_grad()
def test_families_without_a_row_are_experts_too(root, tmp_path):
    """A recurrent model is generated from without a cache, which would not hold its state."""
    recurrent = dict(state_size=4, intermediate_size=32)
    stock_folder(tmp_path / "mamba", "mamba", 5, root / "words", **recurrent)
    stock_folder(tmp_path / "mixtral", "mixtral", 6, root / "words")
    arguments = dict(max_new_tokens=4, do_sample=False, pad_token_id=1)
    for name in ("mamba", "mixtral"):
        for domain, path in (("law", root / "llama"), ("med", tmp_path / name)):
            add = ("add", "--forest", tmp_path / f"{name}-forest", "--path", path)
            launch("forest", *add, "--domain", domain)
        forest = ForestForCausalLM.from_pretrained(tmp_path / f"{name}-forest")
        forest.set_prior({"med": 1.0})
        expected = stock_log_probs(tmp_path / name)
        torch.testing.assert_close(forest(IDS).logits, expected, rtol=0, atol=1e-5)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        words = stock.generate(IDS, use_cache=False, eos_token_id=None, **arguments)
        assert torch.equal(forest.generate(IDS, eos_token_id=None, **arguments), words)
        assert forest.generation_config.use_cache == (name == "mixtral")
        if name == "mamba":
            with pytest.raises(ValueError, match="the recurrent state of a mamba"):
                forest.generate(IDS, use_cache=True, **arguments)


def test_scores_and_mixtures(root, capsys):
    common = ("--data", root / "bin", "--max_seq_length", LENGTH)
    launch("eval_lm", "--model", root / "llama", *common, "--output", root / "one.json")
    result = json.loads((root / "one.json").read_text())
    (scored,) = result["models"].values()
    expected = stock_perplexity(root / "llama", root / "bin", "law")
    assert scored["own"]["law"] == pytest.approx(expected, rel=1e-4)
    launch("eval_lm", "--model", root / "demix", *common)
    launch("eval_lm", "--model", root / "forest", *common)
    prior = ("--prior_output", root / "prior_{domain}.json")
    launch("eval_ensemble", "--forest", root / "forest", *common, "--domain", *DOMAINS, *prior)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("law", "med", "art", "tax", "new"))


def test_other_models_do_not_join(root, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert", "vocab_size": 320}')
    empty = tmp_path / "forest"
    with pytest.raises(UserError, match="a causal language model is needed"):
        launch("forest", "add", "--forest", empty, "--path", tmp_path / "bert", "--domain", "x")
    assert not (empty / "forest.json").exists()
    save_tokenizer(tmp_path / "other words", ["something else"], 290)
    stock_folder(tmp_path / "other", "llama", 9, tmp_path / "other words")
    before = (root / "forest" / "forest.json").read_bytes()
    add = ("add", "--forest", root / "forest", "--path", tmp_path / "other", "--domain", "x")
    with pytest.raises(UserError, match="their tokenizers differ"):
        launch("forest", *add)
    assert (root / "forest" / "forest.json").read_bytes() == before


@torch.no_grad()
def test_an_expert_is_taken_out_as_a_stock_folder(root, tmp_path):
    out = tmp_path / "med"
    arguments = ("--format", "expert", "--input", root / "demix", "--output_dir", out)
    with pytest.raises(UserError, match=r"name one expert of .*; there are law, med"):
        launch("convert", *arguments, "--domains", "tax")
    launch("convert", *arguments, "--domains", "med")
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(model) is type(tiny_stock("llama")) and not report["missing_keys"]
    demix = AutoModelForCausalLM.from_pretrained(root / "demix").eval()
    assert torch.equal(model.eval()(IDS).logits, demix(IDS, domain="med").logits)
    fields = json.loads((out / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert not {"host", "domains", "untie"} & fields.keys() and (out / "tokenizer.json").is_file()


def test_merges_leave_stock_folders(root, tmp_path):
    models = (root / "llama", root / "llama2")
    launch(
        "merge", "--merge_method", "linear", "--models", *models, "--output_dir", tmp_path / "two"
    )
    first, other, both = (read_weights(folder) for folder in (*models, tmp_path / "two"))
    for name, tensor in both.items():
        torch.testing.assert_close(tensor, (first[name] + other[name]) / 2)
    AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    forest = tmp_path / "forest"
    for domain, path, member in (("a", "llama2", ()), ("b", "demix", ("--member", "med"))):
        add = ("add", "--forest", forest, "--path", root / path, *member)
        launch("forest", *add, "--domain", domain)
    flags = ("--merge_method", "linear", "--output_dir", tmp_path / "mixed")
    launch("merge", "--forest", forest, *flags)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    assert type(model) is type(tiny_stock("llama"))
    med = extract_expert_weights(read_weights(root / "demix"), "med")
    for name, tensor in read_weights(tmp_path / "mixed").items():
        torch.testing.assert_close(tensor, (other[name] + med[name]) / 2)


def grow_and_branch(rank: int, root: Path) -> None:
    from runs.test_host_pretrain import start

    from megamod.args import RunArgs, SafetyArgs
    from megamod.runs.pretrain.adapt import adapt
    from megamod.runs.pretrain.adapt_args import AdaptArgs, AdaptOptimArgs

    write_branch_checkpoint([find_parent(root / "gpt2")], [1.0], ["law"], root / "branched")
    start(root, "branched", "--model", root / "gpt2", "--domains", "law", "--max_steps", 2)
    run = dict(max_steps=2, per_device_train_batch_size=1, global_batch_size=2, save_steps=0)
    for name, method, forest, first in (
        ("grown", "feedforward", "demix", "med"),
        ("whole", "full", "forest", "art"),
    ):
        output = str(root / name)
        arguments = AdaptArgs(
            forest=str(root / forest),
            data=str(root / "new bin"),
            domain="zoo",
            start=first,
            method=method,
            max_seq_length=LENGTH,
        )
        optim = AdaptOptimArgs(learning_rate=0.01, warmup_ratio=0.0)
        run_args = RunArgs(**run, output_dir=output, report_to="none")
        adapt(run_args, SafetyArgs(), optim, arguments)


def check_mixture_of_adapted(root: Path, new: dict[str, torch.Tensor]) -> None:
    """All experts of the grown model become one mixture; its router is calibrated and attributed.

    Args:
        new: weights of the dense model with the third expert, of the domain zoo.
    """
    text = root / "zoo.txt"
    text.write_text("\n".join(words_of("zoo")))
    texts = [f"{domain}={text}" for domain in (*DOMAINS, "zoo")]
    moe = ("--forest", root / "grown" / "model", "--output_dir", root / "moe")
    launch("to_moe", *moe, "--calibration", *texts, "--no_centre", "--max_seq_length", LENGTH)
    launch("attribute", "--model", root / "moe", text, "--max_documents", 2)
    model = AutoModelForCausalLM.from_pretrained(root / "moe")
    assert type(model).__name__ == "MixtralForCausalLM"
    stored = read_weights(root / "moe")
    for layer in range(2):
        expert = stored[f"model.layers.{layer}.block_sparse_moe.experts.2.w2.weight"]
        assert torch.equal(expert, new[f"model.layers.{layer}.mlp.down_proj.weight"])
    assert torch.equal(stored["model.norm.weight"], new["model.norm.weight"])


@pytest.mark.slow  # a process of its own imports transformers
def test_branching_and_adapting(root):
    binarize({"zoo": words_of("zoo")}, str(root / "words"), root / "new bin")
    on_ranks(1, grow_and_branch, root)
    law = root / "branched" / "model"
    assert "domains" not in json.loads((law / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(law).eval()
    expert = ("--input", root / "demix", "--output_dir", root / "expert", "--domains", "med")
    launch("convert", "--format", "expert", *expert)
    demix = AutoModelForCausalLM.from_pretrained(root / "demix").eval()
    with torch.no_grad():
        expected = {law: model(IDS).logits, root / "expert": demix(IDS, domain="med").logits}
    check_without_megamod(expected, root / "logits.safetensors")
    grown = read_weights(root / "grown" / "model")
    before, med, new = (
        read_weights(root / "demix"),
        *(extract_expert_weights(grown, d) for d in ("med", "zoo")),
    )
    assert all(torch.equal(grown[name], tensor) for name, tensor in before.items())
    changed = {name for name in new if not torch.equal(new[name], med[name])}
    assert changed and all(".mlp." in name for name in changed)
    check_mixture_of_adapted(root, new)
    whole = AutoModelForCausalLM.from_pretrained(root / "whole" / "model")
    assert type(whole) is type(tiny_stock("bloom"))
    assert "zoo" in open_forest(root / "forest").domains


def test_plans_hold_the_parameters_of_the_model(root, capsys):
    flags = ("--world_size", 2, "--max_seq_length", LENGTH, "--max_steps", 10)
    muon = ("--optim", "muon", "--max_grad_norm", 0)
    for name, more in (
        ("gpt2", ()),
        ("llama", ("--untie", "feedforward", "--domains", "a", "b")),
        ("llama", muon),
    ):
        launch("plan", "--model", root / name, *flags, *more, "--json", root / "plan.json")
        text = (root / "plan.json").read_text() + capsys.readouterr().out
        model = AutoModelForCausalLM.from_pretrained(root / name)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert f"{count:,}" in text or str(count) in text
    # Weights, masters and two moments are 16 bytes; of a hidden matrix one moment is missing.
    hidden = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1)
    (job,) = json.loads((root / "plan.json").read_text())["jobs"]
    assert job["checkpoint_bytes"] == 16 * count - 4 * hidden


@pytest.mark.parametrize("names", [("llama", "llama2"), ("gpt2", "gpt2b")], ids=lambda n: n[0])
def test_barriers_between_stock_models(root, tmp_path, names):
    lines = [text for domain in DOMAINS for text in words_of(domain, 6)]
    (tmp_path / "valid.txt").write_text("\n".join(lines) + "\n")
    calibration = {"path": str(tmp_path / "valid.txt")}
    variants = {"vanilla": {"method": "identity"}, "permutations": {"calibration": calibration}}
    variants["maps"] = {"method": "orthogonal", "calibration": calibration}
    variants["maps of weights"] = {"method": "orthogonal"}
    study = {
        "models": [str(root / name) for name in names],
        "task": "clm",
        "data": str(tmp_path / "valid.txt"),
        "tokenizer": str(root / "words"),
        "max_seq_length": LENGTH,
        "points": 3,
        "variants": variants,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    launch("eval_barrier", tmp_path / "study.yaml", "--output_dir", tmp_path / "out")

    def read_losses(variant: str) -> list[float]:
        curve = json.loads((tmp_path / f"out/curves/clm/{variant}/1-2.json").read_text())
        (losses,) = curve["losses"].values()
        return losses

    mean = ("merge", "--merge_method", "linear", "--output_dir", tmp_path / "mean")
    launch(*mean, "--models", *(root / name for name in names))
    encode = AutoTokenizer.from_pretrained(root / "words").encode
    blocks = torch.from_numpy(read_text_blocks(tmp_path / "valid.txt", encode, LENGTH))
    plain = []
    for folder in (root / names[1], tmp_path / "mean", root / names[0]):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            plain.append(float(model(blocks, labels=blocks).loss))
    assert read_losses("vanilla") == pytest.approx(plain, rel=1e-4)
    for variant in variants:  # aligned ends compute what they did, and the middle moves
        second, middle, first = read_losses(variant)
        assert [second, first] == pytest.approx([plain[0], plain[2]], rel=1e-5)
        assert variant == "vanilla" or abs(middle - plain[1]) > 1e-6
    (results,) = json.loads((tmp_path / "out/results.json").read_text()).values()
    assert results.keys() == variants.keys()
    for plot in ("clm.png", "barriers.png"):
        assert (tmp_path / "out" / plot).read_bytes()[:4] == b"\x89PNG"


def test_verify(root, capsys):
    for name in ("demix", "forest", "bin"):
        launch("verify", root / name)
    assert "fault" not in capsys.readouterr().out
