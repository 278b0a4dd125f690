"""Continuations of a dense model, an expert and mixtures, against plain loops over logits."""

import json
import math
import re

import pytest
import torch
from launch import launch
from models.tiny_hosts import tiny_stock
from runs.test_host_pretrain import save_tokenizer, words_of
from saved_models import make_model
from transformers import AutoTokenizer

from megamod.errors import UserError
from megamod.evaluation.generate import Sampling, load_text_generator
from megamod.models.lm.demix import DemixForCausalLM

VOCAB, LENGTH, NEW = 300, 32, 6
GREEDY = Sampling(NEW, temperature=0)
PROMPT = "lawa the"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """DEMix models with a tokenizer, a forest of two experts, and a stock model."""
    root = tmp_path_factory.mktemp("text_generators")
    fields = dict(vocab_size=VOCAB, max_position_embeddings=LENGTH, eos_token_id=1)
    texts = words_of("law")
    for name in ("law", "art"):
        save_tokenizer(make_model(root / name, **fields), texts)
    make_model(root / "demix", "feedforward", **fields)
    save_tokenizer(root / "demix", texts)
    for name in ("law", "art"):
        launch(
            "forest", "add", "--forest", root / "forest", "--path", root / name, "--domain", name
        )
    tiny_stock("gpt2", vocab_size=VOCAB, eos_token_id=1).save_pretrained(root / "gpt2")
    save_tokenizer(root / "gpt2", texts)
    return root


def continue_greedily(models, ids: list[int], prior: list[float] | None = None):
    """Ids and weights of the best next tokens, the models mixed by Bayes' rule at every token."""
    length = len(ids)
    weights = [math.log(p) for p in prior or [1 / len(models)] * len(models)]
    first = weights
    while True:
        log_probs = [model(torch.tensor([ids])).logits[0].log_softmax(-1) for model in models]
        if len(models) > 1:  # the rule "history"
            scores = [float(r[range(len(ids) - 1), ids[1:]].sum()) for r in log_probs]
            weights = [a + b for a, b in zip(first, scores, strict=True)]
        total = torch.tensor(weights).logsumexp(0)
        shares = [weight - float(total) for weight in weights]
        if len(ids) == length + NEW:
            return ids, [math.exp(share) for share in shares]
        mixed = torch.stack([r[-1] + s for r, s in zip(log_probs, shares, strict=True)]).logsumexp(
            0
        )
        ids = [*ids, int(mixed.argmax())]
        if ids[-1] == 1:
            return ids[:-1], None


@torch.no_grad()
def test_greedy_text_is_that_of_a_loop_over_logits(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "law")
    start = tokenizer(PROMPT).input_ids
    models = [DemixForCausalLM.from_pretrained(root / name).eval() for name in ("law", "art")]
    (text,) = load_text_generator(str(root / "law")).generate(PROMPT, GREEDY)
    assert text.text == tokenizer.decode(continue_greedily(models[:1], start)[0])
    assert text.text.startswith(PROMPT) and text.weights is None
    (only,) = load_text_generator(str(root / "forest"), "law").generate(PROMPT, GREEDY)
    assert only == text
    (mixed,) = load_text_generator(str(root / "forest")).generate(PROMPT, GREEDY)
    ids, weights = continue_greedily(models, start)
    assert mixed.text == tokenizer.decode(ids)
    assert list(mixed.weights) == ["law", "art"] and sum(mixed.weights.values()) == pytest.approx(1)
    if weights is not None:
        assert list(mixed.weights.values()) == pytest.approx(weights, abs=1e-4)


def test_experts_of_one_model(root):
    text_generator = load_text_generator(str(root / "demix"))
    (mixed,) = text_generator.generate(PROMPT, GREEDY)
    assert list(mixed.weights) == ["law", "code", "art"]
    (alone,) = load_text_generator(str(root / "demix"), "code").generate(PROMPT, GREEDY)
    assert alone.weights is None
    prior = {"domains": ["law", "code", "art"], "prior": [0.0, 1.0, 0.0], "rule": "last_token"}
    (root / "prior.json").write_text(json.dumps({"format": 1, **prior}))
    (certain,) = load_text_generator(str(root / "demix"), prior=root / "prior.json").generate(
        PROMPT, GREEDY
    )
    assert certain.text == alone.text


def test_samples_depend_on_the_seed_alone(root):
    text_generator = load_text_generator(str(root / "gpt2"))
    state = torch.random.get_rng_state()
    several = text_generator.generate("", Sampling(NEW, sequences=3, seed=5))
    assert several == text_generator.generate("", Sampling(NEW, sequences=3, seed=5))
    assert several != text_generator.generate("", Sampling(NEW, sequences=3, seed=6))
    assert len({text.text for text in several}) > 1
    assert torch.equal(state, torch.random.get_rng_state())


def test_length_is_bounded_by_the_positions(root):
    text_generator = load_text_generator(str(root / "law"))
    (text,) = text_generator.generate(PROMPT, Sampling(10**6, temperature=0))
    assert len(text_generator.tokenizer(text.text).input_ids) <= LENGTH
    with pytest.raises(UserError, match=r"prompt of \d+ tokens: the model has 32 positions"):
        text_generator.generate("lawa " * 40, GREEDY)


def test_the_command(root, capsys):
    launch("generate", "--model", root / "forest", "--prompt", PROMPT, "the", "--max_new_tokens", 4)
    output = capsys.readouterr().out
    assert output.startswith(PROMPT) and "\nthe" in output
    assert len(re.findall(r"^\[law \d\.\d\d  art \d\.\d\d\]$", output, re.M)) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "gpt2", "--domain", "law"), "is one model, without experts to select"),
        (("--model", "forest", "--domain", "tax"), "no expert of domain 'tax'"),
        (("--model", "absent"), "is no folder and no repository of the hub"),
        (("--model", "gpt2", "--temperature", "0", "--num_return_sequences", "2"), "all would be"),
        (("--model", "gpt2", "--domain", "a", "--prior", "b"), "give one of the two"),
    ],
)
def test_refusals(root, monkeypatch, words, message):
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=message):
        launch("generate", *words)
