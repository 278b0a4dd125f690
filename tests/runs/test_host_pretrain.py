"""Runs that start from a folder of transformers: weights, files beside them, refusals."""

import json
import math
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from launch import launch
from models.tiny_hosts import tiny_stock
from ranks import on_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import megamod  # noqa: F401  (registers the models)
from megamod.args import DataArgs, LoraArgs, ModelArgs, MuxArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.data.batches import BatchDivision
from megamod.data.corpus.binarize import binarize
from megamod.data.lm.pretraining import LmData
from megamod.errors import UserError
from megamod.flags import parse_args
from megamod.states.weights import read_weights
from megamod.train.objectives import BatchScore, CausalLMObjective

DOMAINS = ("law", "med")
LENGTH = 16


def words_of(domain: str, documents: int = 60) -> list[str]:
    random_ = random.Random(domain)
    words = [f"{domain}{letter}" for letter in "abcdefgh"] + ["the", "of", "and"]
    return [" ".join(random_.choices(words, k=20)) + "." for _ in range(documents)]


def save_tokenizer(folder: Path, texts: list[str], size: int = 300) -> None:
    """A byte-level BPE as stock folders have it, with an end but no padding."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=LENGTH
    )
    fast.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    fast.save_pretrained(folder)


def seed_folder(folder: Path, family: str, texts: list[str], seed: int = 0) -> Path:
    """A stock model with a padded vocabulary, its tokenizer and generation configuration."""
    ids = dict(bos_token_id=0, eos_token_id=[1, 5], pad_token_id=None)
    model = tiny_stock(family, seed, vocab_size=320, **ids)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    save_tokenizer(folder, texts)
    return folder


def make_place(root: Path) -> Path:
    """Seeds of two families with one tokenizer, and data made with it."""
    texts = {domain: words_of(domain) for domain in DOMAINS}
    every = [text for some in texts.values() for text in some]
    for family in ("llama", "gpt2"):
        seed_folder(root / family, family, every)
    binarize(texts, str(root / "llama"), root / "bin")
    return root


@torch.no_grad()
def stock_perplexity(folder: Path, data_bin: Path, domain: str) -> float:
    """Perplexity of a model of transformers on a domain's test split, by its logits."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    data = LmData(str(data_bin), domains=None, block_size=LENGTH, domain_token=False)
    total, count = 0.0, 0
    for batch in data.iterate_eval_batches(domain, "test", 4, 0):
        mask, labels = batch.get("attention_mask"), batch["labels"]
        log_probs = model(batch["input_ids"], attention_mask=mask).logits.log_softmax(-1)
        scores = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        total, count = total - float(scores[labels >= 0].sum()), count + int((labels >= 0).sum())
    return math.exp(total / count)


def start(root: Path, output: str, *flags: object) -> None:
    """launchers/pretrain.py in this process."""
    from megamod.runs.pretrain.causal_lm import pretrain_causal_lm

    words = dict(data=root / "bin", output_dir=root / output, max_steps=3, logging_steps=1)
    words |= dict(per_device_train_batch_size=1, global_batch_size=4, max_seq_length=LENGTH)
    words |= dict(report_to="none", save_steps=2, max_grad_norm=1.0)
    argv = [f"--{name}={value}" for name, value in words.items()] + [str(flag) for flag in flags]
    kinds = (RunArgs, SafetyArgs, ModelArgs, LoraArgs, OptimArgs, MuxArgs, DataArgs)
    *common, _, data = parse_args(*kinds, argv=argv)
    pretrain_causal_lm(*common, data)


REFUSED = {
    "no tokenizer of the data": (("--model", "other"), "was made with another tokenizer"),
    "tokenizer of the start": (
        ("--model", "llama", "--init_from", "other"),
        "their tokenizers differ: .* --tokenizer .*other",
    ),
    "encoder": (("--model", "bert"), "model_type 'bert'; a causal language model is needed"),
    "shape": (("--model", "llama", "--hidden_size", 8), "--hidden_size cannot change the model"),
    "length": (("--model", "llama", "--max_seq_length", 33), "32 positions; the data need 300"),
    "no such folder": (("--model", "nowhere"), "is no folder with config.json"),
    "whole blocks": (("--model", "llama", "--untie", "transformer"), "layers of a llama cannot"),
    "half": (("--model", "half"), "the weight file model-2.safetensors is missing"),
    "other family": (("--model", "llama", "--init_from", "gpt2"), "is a gpt2, the model of this"),
    "unknown layers": (("--model", "mamba", "--untie", "feedforward"), "layers are not known"),
    "more data ids": (("--model", "short"), "a vocabulary of 290"),
    "longer than the weights": (("--model", "llama", "--vocab_multiple", 96), "would pad to 384"),
    "longer than ours": (("--model", "tiny", "--vocab_multiple", 96), "pads stock models"),
}


def make_wrong(root: Path) -> None:
    save_tokenizer(root / "other", ["quite other words"], 280)
    tiny_stock("llama", vocab_size=320, eos_token_id=1).save_pretrained(root / "other")
    tiny_stock("llama", vocab_size=290, eos_token_id=1).save_pretrained(root / "short")
    tiny_stock("mamba", vocab_size=320, eos_token_id=1).save_pretrained(root / "mamba")
    (root / "bert").mkdir()
    (root / "bert" / "config.json").write_text('{"model_type": "bert"}')
    tiny_stock("llama", vocab_size=320, eos_token_id=1).config.save_pretrained(root / "half")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (root / "half" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "half" / "model-1.safetensors").write_bytes(b"")


def alone(rank: int, root: Path) -> None:
    """All runs of one rank."""
    for name, (flags, text) in REFUSED.items():
        words = [root / flag if (root / str(flag)).exists() else flag for flag in flags]
        with pytest.raises(UserError, match=text):
            start(root, "refused", *words)
        assert not (root / "refused").exists(), name
    llama = root / "llama"
    start(root, "dense", "--model", llama)
    padded = ("--from_scratch", "--vocab_multiple", 96)
    start(root, "drawn", "--model", llama, *padded, "--max_steps", 1)
    start(root, "masked", "--model", llama, "--mask_documents", "--max_steps", 1)
    start(root, "demix", "--model", llama, "--untie", "feedforward", "--gradient_checkpointing")
    start(root, "cut", "--model", llama, "--untie", "feedforward", "--stop_step", 2)
    start(root, "cut", "--model", llama, "--untie", "feedforward")
    demix = root / "demix" / "model"
    with pytest.raises(UserError, match="has experts of law, med: train it with --untie feedf"):
        start(root, "refused", "--model", demix)
    start(root, "again", "--model", demix, "--untie", "feedforward", "--max_steps", 1)
    start(root, "killed", "--model", llama)


def die_at_call(number: int) -> None:
    """Kill this process at the given call of the loss, counted from 1."""
    score, calls = CausalLMObjective.compute_loss, []

    def score_or_die(*arguments: object) -> BatchScore:
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(*arguments)

    CausalLMObjective.compute_loss = score_or_die


def killed(rank: int, root: Path) -> None:
    """A run whose process is killed in the third step; the checkpoint is that of the second."""
    die_at_call(2 * 4 + 2)  # four micro-batches are a step
    start(root, "killed", "--model", root / "llama")


def together(rank: int, root: Path) -> None:
    """All runs of two ranks."""
    start(root, "btm", "--model", root / "gpt2", "--untie", "all")
    start(root, "cut2", "--model", root / "llama", "--untie", "feedforward", "--stop_step", 1)
    start(root, "cut2", "--model", root / "llama", "--untie", "feedforward", "--stop_step", 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The runs of one rank and of two, done."""
    root = make_place(tmp_path_factory.mktemp("host_pretrain"))
    make_wrong(root)
    with pytest.raises(AssertionError, match="ended without an answer"):
        on_ranks(1, killed, root)
    assert not (root / "killed" / "model").exists()
    on_ranks(1, alone, root)
    on_ranks(2, together, root)
    return root


def first_loss(root: Path, run: str) -> float:
    return json.loads((root / run / "metrics.jsonl").read_text().splitlines()[0])["loss"]


@torch.no_grad()
def test_the_first_loss_is_that_of_the_stock_model(root):
    data = LmData(str(root / "bin"), domains=None, block_size=LENGTH, domain_token=False)
    batches = data.build_train_batches(
        BatchDivision(4, 4, 0, 1), sampler="balanced", alpha=1.0, seed=1
    )
    stock = AutoModelForCausalLM.from_pretrained(root / "llama")
    batch = batches[0]
    logits = stock(batch["input_ids"]).logits.log_softmax(-1)
    expected = -logits.gather(-1, batch["labels"][..., None]).mean()
    assert first_loss(root, "dense") == pytest.approx(float(expected), rel=1e-5)
    assert first_loss(root, "demix") == pytest.approx(float(expected), rel=1e-5)
    assert abs(first_loss(root, "drawn") - float(expected)) > 0.01
    assert abs(first_loss(root, "masked") - float(expected)) > 1e-5


def test_a_drawn_vocabulary_is_padded(root):
    model = AutoModelForCausalLM.from_pretrained(root / "drawn" / "model")
    assert model.config.vocab_size == 384 == len(model.get_output_embeddings().weight)


def test_a_killed_run_goes_on_to_the_same_bits(root):
    whole, resumed = (read_weights(root / run / "model") for run in ("dense", "killed"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    log = map(json.loads, (root / "killed" / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in log if "loss" in record] == [1, 2, 3]


def test_scores_of_a_folder_are_those_of_its_run(root):
    """Attention stops at the ends of documents in both, unless the user wants it otherwise."""
    ours = json.loads((root / "masked" / "perplexity.json").read_text())["mean_of_own"]
    folder, output = root / "masked" / "model", root / "scores.json"
    words = ("--data", root / "bin", "--split", "valid", "--max_seq_length", LENGTH)
    for more, same in (((), True), (("--mask_documents", "false"), False)):
        launch("eval_lm", "--model", folder, *words, "--output", output, *more)
        (scores,) = json.loads(output.read_text())["models"].values()
        mean = sum(scores["own"].values()) / len(DOMAINS)
        assert (mean == pytest.approx(ours, rel=1e-6)) == same


def test_a_dense_run_leaves_a_stock_folder(root):
    folder, seed = root / "dense" / "model", root / "llama"
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (seed / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is type(tiny_stock("llama"))
    assert model.config.eos_token_id == [1, 5] and model.generation_config.max_new_tokens == 7
    card = (folder / "README.md").read_text()
    assert "import megamod" not in card and "AutoModelForCausalLM.from_pretrained" in card
    item = root / "btm" / "model" / "law"
    assert type(AutoModelForCausalLM.from_pretrained(item)).__module__.startswith("transformers.")


def test_runs_go_on_from_where_they_were_cut(root):
    whole, cut = (read_weights(root / run / "model") for run in ("demix", "cut"))
    assert all(torch.allclose(cut[name], tensor, atol=1e-6) for name, tensor in whole.items())
    before = read_weights(root / "demix" / "checkpoints" / "step-2")
    two = read_weights(root / "cut2" / "checkpoints" / "step-2")
    assert all(torch.allclose(two[name], tensor, atol=1e-6) for name, tensor in before.items())
