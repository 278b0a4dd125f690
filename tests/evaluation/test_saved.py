import json
import math
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

from megamod.errors import UserError
from megamod.evaluation.perplexity import DENSE, perplexities
from megamod.evaluation.saved import HeldOut, find_models, score_models
from megamod.models.demix_lm import DemixForCausalLM

SORTED_PLACE = {"art": 0, "code": 1, "law": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A data-bin, and models of every kind in folders named after their kind."""
    folder = tmp_path_factory.mktemp("saved")
    make_data(folder / "bin")
    make_model(folder / "dense")
    make_model(folder / "demix", untie="feedforward")
    make_model(folder / "token", vocab_size=VOCAB + len(DOMAINS))
    for domain in DOMAINS:
        make_model(folder / "btm" / domain, domains=[domain])
    return folder


def held_out(made: Path, **changes) -> HeldOut:
    settings = dict(
        path=str(made / "bin"),
        domains=DOMAINS,
        split="test",
        block_size=None,
        batch_size=2,
        domain_token="auto",
        own_only=False,
    )
    return HeldOut(**settings | changes)


def scores(made: Path, kind: str, **changes):
    wanted = held_out(made, **changes)
    return score_models(find_models(made / kind, wanted), wanted, torch.device("cpu"))


def model_in(folder: Path) -> DemixForCausalLM:
    return DemixForCausalLM.from_pretrained(folder)


def test_dense_model(made):
    matrix, model = scores(made, "dense"), model_in(made / "dense")
    expected = {d: plain_perplexity(model, made / "bin", d, None) for d in DOMAINS}
    assert perplexities(matrix) == {DENSE: pytest.approx(expected, rel=1e-5)}
    for domain, score in matrix[DENSE].items():
        bits = math.log2(expected[domain]) * TOKENS[domain] / BYTES[domain]
        assert score.bits_per_byte == pytest.approx(bits, rel=1e-5)


def test_experts(made):
    matrix, model = scores(made, "demix"), model_in(made / "demix")
    for expert in DOMAINS:
        expected = {d: plain_perplexity(model, made / "bin", d, expert) for d in DOMAINS}
        assert perplexities(matrix)[expert] == pytest.approx(expected, rel=1e-5)
    own = scores(made, "demix", own_only=True, domains=("art", "code"))
    assert {expert: list(row) for expert, row in own.items()} == {
        "law": [],
        "code": ["code"],
        "art": ["art"],
    }
    assert own["art"]["art"].nll == pytest.approx(matrix["art"]["art"].nll)


def test_independent_models(made):
    matrix = scores(made, "btm")
    assert list(matrix) == ["art", "code", "law"]
    for expert in DOMAINS:
        model = model_in(made / "btm" / expert)
        expected = {d: plain_perplexity(model, made / "bin", d, None) for d in DOMAINS}
        assert perplexities(matrix)[expert] == pytest.approx(expected, rel=1e-5)
    assert list(scores(made, "btm/law")) == [DENSE]


def test_domain_tokens_are_those_of_the_training_whatever_is_scored(made):
    """The token of a domain follows the vocabulary, in sorted order of all domains of the model."""
    model = model_in(made / "token")
    matrix = scores(made, "token", domains=("law",))
    token = VOCAB + SORTED_PLACE["law"]
    expected = plain_perplexity(model, made / "bin", "law", None, token)
    assert perplexities(matrix) == {DENSE: {"law": pytest.approx(expected, rel=1e-5)}}
    assert matrix[DENSE]["law"].tokens == TOKENS["law"]
    without = scores(made, "token", domains=("law",), domain_token="false")
    expected = plain_perplexity(model, made / "bin", "law", None)
    assert perplexities(without)[DENSE]["law"] == pytest.approx(expected, rel=1e-5)


def test_sequence_length_cuts_the_context(made):
    short = scores(made, "dense", block_size=LENGTH // 2)[DENSE]["law"]
    assert short.tokens == TOKENS["law"]
    assert short.nll != pytest.approx(scores(made, "dense")[DENSE]["law"].nll, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("nowhere", {}, "holds no config.json, and no folder in it does"),
        ("dense", {"block_size": 9}, "--max_seq_length 9: the model in .* has 8 positions"),
        ("dense", {"domain_token": "true"}, "has no domain tokens"),
        ("dense", {"domains": ("law", "lore")}, "'lore'; choose of law, code, art"),
        ("dense", {"split": "dev"}, "split 'dev': allowed are train, valid, test"),
        ("dense", {"path": "nowhere"}, "is not a data-bin"),
    ],
)
def test_what_does_not_fit_is_refused(made, kind, changes, told):
    with pytest.raises(UserError, match=told):
        scores(made, kind, **changes)


def test_a_vocabulary_of_other_data_is_refused(made, tmp_path):
    make_model(tmp_path / "model", vocab_size=VOCAB + 1)
    with pytest.raises(UserError, match=r"vocabulary of 24; .* needs 23, or 26 with a token"):
        find_models(tmp_path / "model", held_out(made))


def test_a_domain_without_token_is_refused(made, tmp_path):
    make_model(tmp_path / "model", vocab_size=VOCAB + 2, domains=["law", "art"])
    with pytest.raises(UserError, match="has no token for 'code'; choose of law, art"):
        find_models(tmp_path / "model", held_out(made))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (json.dumps({"model_type": "gpt2"}), "model_type 'gpt2'; allowed is 'demix'"),
        ("{", "config.json cannot be used"),
        (json.dumps({"model_type": "demix", "untie": "all"}), "untie 'all' is unknown"),
    ],
)
def test_other_models_are_refused(made, tmp_path, content, told):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=told):
        find_models(tmp_path, held_out(made))
