"""LoRA experts: runs that train an adapter of a stock seed, alone and several in one world."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from ranks import on_ranks
from runs.test_host_pretrain import DOMAINS, make_place, start
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import megamod  # noqa: F401  (registers the models)
from megamod.errors import UserError
from megamod.models.lm.load import load_lm
from megamod.runs import training
from megamod.states.forest import Expert, check_new_expert
from megamod.states.verify import check_model_files
from megamod.train.compiled import compile_blocks

IDS = torch.tensor([[5, 9, 33, 70, 12, 8, 101, 44], [7, 7, 90, 3, 60, 61, 200, 2]])
LORA = ("--lora_rank", 2, "--learning_rate", 0.02)
REFUSED = {
    "preset": (("--model", "tiny", *LORA), "adapts the weights of a seed"),
    "from scratch": (("--model", "llama", "--from_scratch", *LORA), "adapts the weights of a seed"),
    "rank": (("--model", "llama", "--lora_rank", 0), "--lora_rank: 0 is not allowed"),
    "demix": (("--model", "llama", "--untie", "feedforward", *LORA), "give --untie none or all"),
    "targets": (("--model", "llama", *LORA, "--lora_targets", "c_fc"), "they have down_proj"),
    "head": (("--model", "llama", *LORA, "--lora_targets", "lm_head"), "lm_head: is no linear"),
    "no rank": (("--model", "llama", "--lora_alpha", 4), "there is no --lora_rank"),
    "adapter": (("--model", "dense/model", *LORA), "is a LoRA adapter of"),
}


def ds_file(root: Path, stage: int) -> Path:
    file = root / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return file


def make_hub_cache(root: Path) -> str:
    """Put the llama into a cache of the hub, which this process then uses; return its hub name."""
    repository, revision = root / "hub-cache" / "models--maker--llama", "0" * 40
    shutil.copytree(root / "llama", repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    constants.HF_HUB_CACHE = str(root / "hub-cache")
    return "maker/llama"


def start_compiled(root: Path, *flags: object) -> None:
    """A run with --torch_compile; blocks are traced and cut as by inductor, without its C++."""
    plain = training.compile_blocks, training.check_compiler
    training.compile_blocks = partial(compile_blocks, backend="aot_eager")
    training.check_compiler = lambda device: None
    start(root, "compiled", *flags, "--torch_compile")
    training.compile_blocks, training.check_compiler = plain


def alone(rank: int, root: Path) -> None:
    """All runs of one rank."""
    llama = ("--model", root / "llama", *LORA)
    start(root, "dense", *llama)
    for name, (flags, text) in REFUSED.items():
        words = [root / str(flag) if (root / str(flag)).exists() else flag for flag in flags]
        with pytest.raises(UserError, match=text):
            start(root, "refused", *words)
        assert not (root / "refused").exists(), name
    start(root, "cut", *llama, "--stop_step", 2)
    start(root, "cut", *llama)
    for domain in DOMAINS:
        start(root, f"only-{domain}", *llama, "--domains", domain, "--global_batch_size", 2)
    start(root, "hub", "--model", make_hub_cache(root), *LORA)
    start_compiled(root, *llama)
    gpt2 = ("--model", root / "gpt2", *LORA, "--lora_dropout", 0.5, "--lora_targets", "c_fc")
    start(root, "gpt2", *gpt2, "--gradient_checkpointing", True, "--max_steps", 1)


def together(rank: int, root: Path) -> None:
    """All runs of two ranks."""
    llama = ("--model", root / "llama", *LORA)
    start(root, "btm", *llama, "--untie", "all")
    # The order of a domain's data depends on its index, which is 0 in a run of one domain.
    start(root, "btm-med", *llama, "--untie", "all", "--domains", "med", "law")
    for stage in (2, 3):  # the default is 1, and 0 for one rank
        start(root, f"zero{stage}", *llama, "--deepspeed", ds_file(root, stage))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The runs of one rank and of two, done."""
    root = make_place(tmp_path_factory.mktemp("lora"))
    on_ranks(1, alone, root)
    on_ranks(2, together, root)
    return root


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@torch.no_grad()
def ours(folder: Path) -> torch.Tensor:
    return load_lm(folder).eval()(IDS).logits


@torch.no_grad()
def peft_logits(folder: Path) -> torch.Tensor:
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


def test_only_the_adapter_is_trained_and_published(root):
    folder = root / "dense" / "model"
    assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(root / "llama")
    assert (fields["r"], fields["lora_alpha"], fields["task_type"]) == (2, 4, "CAUSAL_LM")
    linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert fields["target_modules"] == linear
    tensors = adapter_of(folder)
    assert len(tensors) == 2 * 2 * len(linear)  # two matrices, two layers
    assert all(tensor.any() for tensor in tensors.values())
    # The optimizer has a state for these alone.
    state = root / "dense" / "checkpoints" / "step-3"
    with safe_open(state / "optimizer-0.safetensors", framework="pt") as file:
        names = {key.partition("/")[2] for key in file.keys()}  # noqa: SIM118
    assert len(names) == len(tensors) and all(".lora_" in name for name in names)
    assert "library_name: peft" in (folder / "README.md").read_text()
    tokenizer = (root / "llama" / "tokenizer.json").read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == tokenizer


@pytest.mark.slow  # imports transformers and peft anew
def test_a_plain_process_loads_it_with_equal_logits(root):
    """peft and transformers alone; importing megamod would raise."""
    folders = [root / "dense" / "model", root / "gpt2" / "model", root / "btm" / "model" / "law"]
    code = (
        "import sys, torch; sys.modules['megamod'] = None\n"
        "from peft import AutoPeftModelForCausalLM as Auto\n"
        f"ids = torch.tensor({IDS.tolist()})\n"
        f"for folder in {[str(folder) for folder in folders]!r}:\n"
        "    print(Auto.from_pretrained(folder).eval()(ids).logits.double().sum().item())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    sums = [float(line) for line in answer.stdout.split()]
    assert len(sums) == len(folders), answer.stderr
    for folder, total in zip(folders, sums, strict=True):
        assert total == pytest.approx(float(ours(folder).double().sum()), rel=1e-5)
    assert torch.equal(ours(folders[0]), peft_logits(folders[0]))


def test_a_world_of_two_domains_is_two_runs(root):
    for world, domain in {"btm": "law", "btm-med": "med"}.items():
        both = adapter_of(root / world / "model" / domain)
        alone = adapter_of(root / f"only-{domain}" / "model")
        assert both.keys() == alone.keys()
        for name, tensor in both.items():
            torch.testing.assert_close(alone[name], tensor, rtol=0, atol=1e-6)
    law, med = (adapter_of(root / "btm" / "model" / domain) for domain in DOMAINS)
    assert any(not torch.allclose(law[name], med[name], atol=1e-3) for name in law)


def test_stages_agree_and_resumed_runs_are_bitwise_equal(root):
    whole = adapter_of(root / "dense" / "model")
    cut = adapter_of(root / "cut" / "model")
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())
    for stage in (2, 3):
        staged = adapter_of(root / f"zero{stage}" / "model")
        for name, tensor in whole.items():
            torch.testing.assert_close(staged[name], tensor, rtol=0, atol=1e-5)


def test_a_seed_of_the_hub(root, monkeypatch):
    """Its name, not the path of the cache, is in the adapter's folder."""
    folder = root / "hub" / "model"
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "maker/llama"
    dense = adapter_of(root / "dense" / "model")
    assert all(torch.equal(dense[n], tensor) for n, tensor in adapter_of(folder).items())
    with pytest.raises(UserError, match="there is no model at its base_model_name_or_path 'maker"):
        load_lm(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "hub-cache"))
    assert torch.equal(ours(folder), ours(root / "dense" / "model"))
    assert check_model_files(folder)[1] == []


def test_compiled_blocks_train_the_same_adapter(root):
    compiled = adapter_of(root / "compiled" / "model")
    plain = adapter_of(root / "dense" / "model")
    assert compiled.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-5)


def test_another_seed_is_refused(root, tmp_path):
    """The weights of the seed are compared when an adapter joins a forest, and by verify."""
    seed, adapter = tmp_path / "seed", tmp_path / "adapter"
    shutil.copytree(root / "llama", seed)
    shutil.copytree(root / "dense" / "model", adapter)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = str(seed)
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    check_new_expert(tmp_path / "forest", Expert(domain="law", path=adapter))
    assert check_model_files(adapter)[1] == []
    AutoModelForCausalLM.from_pretrained(root / "gpt2").config.save_pretrained(seed)
    shutil.copy(root / "gpt2" / "model.safetensors", seed)
    with pytest.raises(UserError, match="was trained on other weights than those that are in"):
        check_new_expert(tmp_path / "forest", Expert(domain="law", path=adapter))
    assert "other weights" in check_model_files(adapter)[1][0]
    with pytest.raises(UserError, match="the adapter does not fit its seed"):
        load_lm(adapter)
    shutil.rmtree(seed)
    with pytest.raises(UserError, match="there is no model at its base_model_name_or_path"):
        load_lm(adapter)
    assert not (tmp_path / "forest").exists()
