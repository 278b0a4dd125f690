import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from saved_models import (
    BYTES,
    DOMAINS,
    LENGTH,
    TOKENS,
    VOCAB,
    make_data,
    make_model,
    plain_perplexity,
)

from megamod.data.corpus.indexed import IndexedDataset, format_split_prefix
from megamod.errors import UserError
from megamod.evaluation.held_out_data import HeldOut
from megamod.evaluation.model_folders import find_saved_models, score_models
from megamod.evaluation.perplexity import DENSE, compute_perplexities
from megamod.models.lm.demix import DemixForCausalLM
from megamod.states.weights import read_weights, write_weights

SORTED_PLACE = {"art": 0, "code": 1, "law": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data-bin, and models of every kind in folders named after their kind."""
    folder = tmp_path_factory.mktemp("saved")
    make_data(folder / "bin")
    make_model(folder / "dense")
    make_model(folder / "demix", untie="feedforward")
    make_model(folder / "token", vocab_size=VOCAB + len(DOMAINS))
    for domain in DOMAINS:
        make_model(folder / "btm" / domain, domains=[domain])
    return folder


def held_out(root: Path, **changes) -> HeldOut:
    settings = dict(
        path=str(root / "bin"),
        domains=DOMAINS,
        split="test",
        block_size=None,
        batch_size=2,
        domain_token="auto",
        own_only=False,
    )
    return HeldOut(**settings | changes)


def scores(root: Path, kind: str, **changes):
    expected = held_out(root, **changes)
    return score_models(find_saved_models(root / kind, expected), expected, torch.device("cpu"))


def model_in(folder: Path) -> DemixForCausalLM:
    return DemixForCausalLM.from_pretrained(folder)


def write_forest(folder: Path, entries: list[dict[str, object]]) -> None:
    """A forest.json of experts that nothing more is known of."""
    unknown = {"parents": [], "seed": None, "start_update": 0, "updates": 0, "tokens": 0, "gpus": 1}
    unknown |= {"data_digest": None, "config_digest": None}
    text = json.dumps({"format": 1, "experts": [entry | unknown for entry in entries]})
    (folder / "forest.json").write_text(text)


def test_dense_model(root):
    matrix, model = scores(root, "dense"), model_in(root / "dense")
    expected = {d: plain_perplexity(model, root / "bin", d, None) for d in DOMAINS}
    assert compute_perplexities(matrix) == {DENSE: pytest.approx(expected, rel=1e-5)}
    for domain, score in matrix[DENSE].items():
        bits = math.log2(expected[domain]) * TOKENS[domain] / BYTES[domain]
        assert score.bits_per_byte == pytest.approx(bits, rel=1e-5)


def test_experts(root):
    matrix, model = scores(root, "demix"), model_in(root / "demix")
    for expert in DOMAINS:
        expected = {d: plain_perplexity(model, root / "bin", d, expert) for d in DOMAINS}
        assert compute_perplexities(matrix)[expert] == pytest.approx(expected, rel=1e-5)
    own_values = scores(root, "demix", own_only=True, domains=("art", "code"))
    assert {expert: list(row) for expert, row in own_values.items()} == {
        "law": [],
        "code": ["code"],
        "art": ["art"],
    }
    assert own_values["art"]["art"].nll == pytest.approx(matrix["art"]["art"].nll)


def test_independent_models(root):
    matrix = scores(root, "btm")
    assert list(matrix) == ["art", "code", "law"]
    for expert in DOMAINS:
        model = model_in(root / "btm" / expert)
        expected = {d: plain_perplexity(model, root / "bin", d, None) for d in DOMAINS}
        assert compute_perplexities(matrix)[expert] == pytest.approx(expected, rel=1e-5)
    assert list(scores(root, "btm/law")) == [DENSE]


def test_domain_tokens_are_those_of_the_training_whatever_is_scored(root):
    """The token of a domain follows the vocabulary, in sorted order of all domains of the model."""
    model = model_in(root / "token")
    matrix = scores(root, "token", domains=("law",))
    token = VOCAB + SORTED_PLACE["law"]
    expected = plain_perplexity(model, root / "bin", "law", None, token)
    assert compute_perplexities(matrix) == {DENSE: {"law": pytest.approx(expected, rel=1e-5)}}
    assert matrix[DENSE]["law"].tokens == TOKENS["law"]
    without = scores(root, "token", domains=("law",), domain_token="false")
    expected = plain_perplexity(model, root / "bin", "law", None)
    assert compute_perplexities(without)[DENSE]["law"] == pytest.approx(expected, rel=1e-5)


def test_experts_that_are_asked_for(root, caplog):
    whole = scores(root, "demix")
    matrix = scores(root, "demix", experts=("art", "law"))
    assert matrix == {expert: whole[expert] for expert in ("law", "art")}
    assert list(scores(root, "btm", experts=("code",))) == ["code"]
    assert list(scores(root, "dense", experts=("code",))) == [DENSE]
    assert caplog.text == ""


def test_a_forest_of_members_and_whole_models(root, tmp_path):
    entries = [
        {"domain": "rules", "path": str(root / "demix"), "member": "law"},
        {"domain": "code", "path": str(root / "btm" / "code"), "member": None},
    ]
    write_forest(tmp_path, entries)
    demix, btm = scores(root, "demix"), scores(root, "btm")
    for inputs in (tmp_path, tmp_path / "forest.json"):
        assert scores(root, inputs) == {"rules": demix["law"], "code": btm["code"]}


def source_stream(root: Path, domain: str) -> tuple[list[int], list[int]]:
    """Every target of a test split, and the input token before each."""
    dataset = IndexedDataset(root / "bin" / format_split_prefix(domain, "test"))
    tokens = [int(token) for item in range(len(dataset)) for token in dataset[item]]
    return tokens, [2, *tokens[:-1]]


@pytest.mark.parametrize("window", [1, 3, 5, 7])
@torch.no_grad()
def test_context_window_is_a_plain_loop_over_tokens(root, window):
    """Each token on its own, read with the block's beginning and the window before that."""
    model, span = model_in(root / "demix").eval(), LENGTH - window
    for domain in ("law", "art"):
        tokens, inputs = source_stream(root, domain)
        expected = 0.0
        for position, target in enumerate(tokens):
            first = max(0, position // span * span - window)
            logits = model(torch.tensor([inputs[first : position + 1]]), domain="law").logits[0, -1]
            expected -= float(logits.double().log_softmax(-1)[target])
        for batch_size in (1, 4):
            changes = dict(context_window=window, experts=("law",), batch_size=batch_size)
            score = scores(root, "demix", domains=(domain,), **changes)["law"][domain]
            assert score.tokens == len(tokens)
            assert score.nll == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_context_window_behind_a_domain_token(root):
    model, window = model_in(root / "token").eval(), 3
    span, token = LENGTH - 1 - window, VOCAB + SORTED_PLACE["law"]
    tokens, inputs = source_stream(root, "law")
    expected = 0.0
    for position, target in enumerate(tokens):
        first = max(0, position // span * span - window)
        logits = model(torch.tensor([[token, *inputs[first : position + 1]]])).logits[0, -1]
        expected -= float(logits.double().log_softmax(-1)[target])
    score = scores(root, "token", domains=("law",), context_window=window)[DENSE]["law"]
    assert (score.nll, score.tokens) == (pytest.approx(expected, rel=1e-5), len(tokens))


def test_another_domains_token_for_text_the_model_never_saw(root, tmp_path):
    fields = dict(vocab_size=VOCAB + 2, domains=["law", "art"])
    model = model_in(make_model(tmp_path / "model", **fields))
    target_value = dict(domains=("code", "law"), force_domain_token="law")
    matrix = scores(root, tmp_path / "model", **target_value)[DENSE]
    for domain in ("code", "law"):  # sorted, art comes first
        expected = plain_perplexity(model, root / "bin", domain, None, VOCAB + 1)
        assert matrix[domain].perplexity == pytest.approx(expected, rel=1e-5)


def test_sequence_length_cuts_the_context(root):
    short = scores(root, "dense", block_size=LENGTH // 2)[DENSE]["law"]
    assert short.tokens == TOKENS["law"]
    assert short.nll != pytest.approx(scores(root, "dense")[DENSE]["law"].nll, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("nowhere", {}, "nowhere: is no folder and no repository of the hub"),
        ("bin", {}, "no config.json in it or in its subfolders"),
        ("dense", {"block_size": 9}, "--max_seq_length 9: the model in .* has 8 positions"),
        ("dense", {"domain_token": "true"}, "has no domain tokens"),
        ("dense", {"context_window": 8}, "sequences of 8 tokens leave room for 7 at most"),
        ("token", {"context_window": 7}, "sequences of 8 tokens leave room for 6 at most"),
        ("dense", {"force_domain_token": "law"}, "_token law: the model in .* has no domain tok"),
        ("token", {"force_domain_token": "lore"}, "lore: .* has tokens for law, code, art"),
        (
            "token",
            {"force_domain_token": "law", "domain_token": "false"},
            "--force_domain_token law: --domain_token is false",
        ),
        ("demix", {"experts": ("lore",)}, "no expert 'lore'; its experts are law, code, art"),
        ("dense", {"domains": ("law", "lore")}, "no domain 'lore'; its domains are law, code, art"),
        ("dense", {"split": "dev"}, "split 'dev': allowed are train, valid, test"),
        ("dense", {"path": "nowhere"}, "is not a data-bin"),
    ],
)
def test_what_does_not_fit_is_refused(root, kind, changes, message):
    with pytest.raises(UserError, match=message):
        scores(root, kind, **changes)


def test_a_vocabulary_of_other_data_is_refused(root, tmp_path):
    make_model(tmp_path / "model", vocab_size=VOCAB + 1)
    with pytest.raises(UserError, match=r"vocabulary of 24; .* needs 23, or 26 with a token"):
        find_saved_models(tmp_path / "model", held_out(root))


def test_a_tokenizer_with_other_ids_of_the_same_number_is_refused(root, tmp_path):
    data = shutil.copytree(root / "bin", tmp_path / "bin")
    make_model(tmp_path / "model", vocab_size=VOCAB)

    def write_ids(folder: Path, words: list[str], added: dict[str, int]) -> None:
        folder.mkdir(exist_ok=True)
        vocab = {word: number for number, word in enumerate(words)}
        tokens = [{"content": word, "id": number} for word, number in added.items()]
        text = json.dumps({"model": {"vocab": vocab}, "added_tokens": tokens})
        (folder / "tokenizer.json").write_text(text)

    words = [f"w{number}" for number in range(VOCAB - 1)]
    write_ids(data / "tokenizer", words, {"[PAD]": VOCAB - 1})
    find_saved_models(tmp_path / "model", held_out(tmp_path))  # a model without tokenizer
    write_ids(tmp_path / "model", words, {"[PAD]": VOCAB - 1})
    find_saved_models(tmp_path / "model", held_out(tmp_path))
    for content in ((words[::-1], {"[PAD]": VOCAB - 1}), (words, {"<|im_start|>": VOCAB - 1})):
        write_ids(tmp_path / "model", *content)
        with pytest.raises(UserError, match=r"tokenizers differ: .* preprocess the text with"):
            find_saved_models(tmp_path / "model", held_out(tmp_path))


def test_a_domain_without_token_is_refused(root, tmp_path):
    make_model(tmp_path / "model", vocab_size=VOCAB + 2, domains=["law", "art"])
    with pytest.raises(UserError, match="has no token for 'code'; it has law, art"):
        find_saved_models(tmp_path / "model", held_out(root))


@pytest.mark.parametrize("kind", ["folders", "experts"])
def test_an_expert_named_like_the_row_of_dense_models_is_refused(root, tmp_path, kind):
    names = ["law", DENSE]
    if kind == "folders":
        for name in names:
            make_model(tmp_path / name, domains=[name])
    else:
        make_model(tmp_path, untie="feedforward", domains=names)
    with pytest.raises(UserError, match="has an expert named 'dense'"):
        find_saved_models(tmp_path, held_out(root))


@pytest.mark.parametrize("weights", [None, b"half a file", "nan"])
def test_weights_that_cannot_be_scored_are_refused(root, tmp_path, weights):
    folder = make_model(tmp_path / "law", domains=["law"])
    file, message = folder / "model.safetensors", "law: cannot be read as a model"
    state = {name: tensor.clone() for name, tensor in read_weights(folder).items()}
    file.unlink()
    if weights == "nan":
        message = "holds values that are not finite"
        write_weights(folder, {k: t.fill_(torch.nan) for k, t in state.items()}, has_experts=False)
    elif weights is not None:
        file.write_bytes(weights * 1000)  # large enough for what config.json describes
    with pytest.raises(UserError, match=message):
        score_models(find_saved_models(folder, held_out(root)), held_out(root), torch.device("cpu"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"model_type": "bert"}), "model_type 'bert'; a causal language model"),
        ("{", "config.json cannot be used"),
        (json.dumps({"model_type": "demix", "untie": "all"}), "untie 'all' is unknown"),
        (
            json.dumps({"model_type": "demix", "domains": [1]}),
            "config.json cannot be used: .*domains",
        ),
        ("[]", "config.json cannot be used"),
    ],
)
def test_other_models_are_refused(root, tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        find_saved_models(tmp_path, held_out(root))
