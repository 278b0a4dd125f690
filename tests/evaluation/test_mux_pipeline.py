"""Answers in the order of the requests, those of plain model calls, with and without copies."""

import numpy as np
import pytest
import torch
from serving.tiny_services import LABELS, LENGTH, SIZE
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizerFast,
    pipeline,
)

import megamod
from megamod.errors import UserError
from megamod.evaluation.mux_pipeline import MuxPipeline
from megamod.models.mux.bert import (
    MuxBertForMaskedLM,
    MuxBertForSequenceClassification,
    MuxBertForTokenClassification,
)
from megamod.models.mux.configuration import MuxBertConfig

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(12)), "##s", "."]
POSITIONS = 12
TEXTS = ["w1 w2", "w3", "w4 w5 w6 .", "w1", "w7s w8", "w9 w0 w2s", "w11"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> BertTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return BertTokenizerFast(str(folder / "vocab.txt"))


def build_model(kind: type, instances: int = 1, **more: object):
    """A model with random weights; N = 1 is a stock one."""
    torch.manual_seed(instances)
    fields = SIZE | dict(vocab_size=len(VOCAB), max_position_embeddings=POSITIONS) | more
    if instances > 1:
        config = MuxBertConfig(**fields, num_instances=instances, cls_token_id=2)
    else:
        config = BertConfig(**fields)
    return kind(config).eval()


def ids_of(tokenizer, texts: list[str]) -> torch.Tensor:
    rows = tokenizer(texts, padding="max_length", max_length=LENGTH)["input_ids"]
    return torch.tensor(rows)


@pytest.mark.parametrize("requests", [1, 2, 3, 7])
def test_rows_are_answered_in_order_as_by_the_model_itself(tokenizer, requests):
    model = build_model(MuxBertForSequenceClassification, 3)
    classify = MuxPipeline(model, tokenizer, max_length=LENGTH, batch_size=1)
    texts = TEXTS[:requests]
    expected = []
    for start in range(0, requests, 3):
        group = texts[start : start + 3]
        filled = [group[n % len(group)] for n in range(3)]
        with torch.no_grad():
            logits = model(ids_of(tokenizer, filled)).logits[: len(group)]
        expected += logits.softmax(-1).tolist()
    answers = classify(texts)
    for answer, shares in zip(answers, expected, strict=True):
        assert answer["score"] == pytest.approx(max(shares), abs=1e-6)
        assert answer["label"] == LABELS[int(np.argmax(shares))]
    assert classify(texts) == answers  # nothing is drawn
    if requests == 1:
        assert classify(texts[0]) == answers


def test_copies_of_a_request_are_averaged_wherever_they_were(tokenizer):
    """Against a loop over what was fed: each line's row is known by its ids alone."""
    model = build_model(MuxBertForSequenceClassification, 3)
    ensemble = MuxPipeline(model, tokenizer, max_length=LENGTH, batch_size=5, ensemble=True, seed=4)
    fed, answered = [], []

    def keep(module, args, kwargs, output):
        fed.append(kwargs["input_ids"])
        answered.append(output.logits)

    handle = model.register_forward_hook(keep, with_kwargs=True)
    answers = ensemble(TEXTS)
    handle.remove()
    assert [len(ids) for ids in fed] == [15, 6]  # 5 requests and 2, three times each
    slots = set()
    for number, (text, answer) in enumerate(zip(TEXTS, answers, strict=True)):
        ids, batch = ids_of(tokenizer, [text])[0], fed[number // 5]
        lines = [line for line, row in enumerate(batch) if row.equal(ids)]
        assert len(lines) == 3
        slots.add(tuple(line % 3 for line in lines))
        mean = sum(answered[number // 5][line] for line in lines) / 3
        assert answer["score"] == pytest.approx(float(mean.softmax(-1).max()), abs=1e-6)
        assert answer["label"] == LABELS[int(mean.argmax())]
    assert len(slots) > 1  # permuted, not the same places for all
    for ids, logits in zip(fed, answered, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, logits)
    assert ensemble(TEXTS) == answers
    ensemble.seed = 5
    other = ensemble(TEXTS)
    assert any(a["score"] != b["score"] for a, b in zip(answers, other, strict=True))


def test_words_are_answered_by_their_first_tokens(tokenizer):
    model = build_model(MuxBertForTokenClassification, 2)
    tag = MuxPipeline(model, tokenizer, max_length=LENGTH, batch_size=2)
    sentences = [["w1", "w7s", "w2"], ["w3"], [f"w{n}" for n in range(9)]]
    heads = [[1, 2, 4], [1], [1, 2, 3, 4, 5, 6, 7]]  # [CLS] in front, w7s is two tokens
    rows = [[2, 6, 12, 17, 7, 3], [2, 8, 3], [2, *range(5, 12), 3], [2, 6, 12, 17, 7, 3]]
    ids = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
    with torch.no_grad():
        shares = model(ids).logits.softmax(-1)
    answers = tag(sentences)
    assert [len(answer) for answer in answers] == [3, 1, 9]
    for number, (words, places) in enumerate(zip(sentences, heads, strict=True)):
        for word, position, answered in zip(words, places, answers[number], strict=False):
            best = shares[number, position].max(-1)
            assert answered["word"] == word and answered["label"] == LABELS[int(best.indices)]
            assert answered["score"] == pytest.approx(float(best.values), abs=1e-6)
    cut = {"label": "O", "score": 0.0}
    assert answers[2][7:] == [{"word": "w7", **cut}, {"word": "w8", **cut}]
    assert tag("w1 w2") == tag([["w1", "w2"]])[0] == tag(["w1 w2"])[0]
    tag.ensemble = True
    averaged = tag(sentences)
    assert [[answered["word"] for answered in answer] for answer in averaged] == sentences
    assert averaged[0][0]["score"] != answers[0][0]["score"]


def test_stock_models_answer_as_in_a_pipeline_of_transformers(tokenizer):
    model = build_model(BertForSequenceClassification)
    theirs = pipeline("text-classification", model=model, tokenizer=tokenizer)
    ours = MuxPipeline(model, tokenizer, max_length=LENGTH)
    copies = MuxPipeline(model, tokenizer, max_length=LENGTH, ensemble=True)
    pairs = [("w1", "w2 w3"), {"text": "w4", "text_pair": "w5"}, ["w2", "w3"]]
    as_theirs = [{"text": "w1", "text_pair": "w2 w3"}, pairs[1], {"text": "w2", "text_pair": "w3"}]
    for mine, other in ((TEXTS, TEXTS), (pairs, as_theirs)):
        for single, copy, two in zip(ours(mine), copies(mine), theirs(other), strict=True):
            assert single["label"] == copy["label"] == two["label"]
            assert single["score"] == pytest.approx(two["score"], abs=1e-5)
            assert copy["score"] == pytest.approx(two["score"], abs=1e-5)
    words = MuxPipeline(build_model(BertForTokenClassification), tokenizer, max_length=LENGTH)
    assert [answer["word"] for answer in words("w1 w2s")] == ["w1", "w2s"]
    value = build_model(BertForSequenceClassification, id2label={0: "grade"}, num_labels=1)
    with torch.no_grad():
        expected = float(value(**tokenizer(["w1"], return_tensors="pt")).logits)
    (answer,) = MuxPipeline(value, tokenizer, max_length=LENGTH)("w1")
    assert answer == {"label": "grade", "score": pytest.approx(expected, abs=1e-5)}


@pytest.mark.parametrize("requests", [1, 4, 7])
def test_a_pipeline_of_transformers_runs_groups_of_a_multiplexed_model(tokenizer, requests):
    model = build_model(MuxBertForSequenceClassification, 2)
    theirs = pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=4)
    padding = dict(padding="max_length", max_length=LENGTH, truncation=True)
    ours = MuxPipeline(model, tokenizer, max_length=LENGTH, batch_size=2)
    answers = theirs(TEXTS[:requests], **padding)
    for mine, other in zip(ours(TEXTS[:requests]), answers, strict=True):
        assert mine["label"] == other["label"]
        assert mine["score"] == pytest.approx(other["score"], abs=1e-5)


def test_a_pipeline_of_a_folder(tokenizer, tmp_path):
    model = build_model(MuxBertForTokenClassification, 2)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer of an encoder; name one by `tokenizer`"):
        MuxPipeline.from_pretrained(tmp_path, max_length=LENGTH)
    tokenizer.save_pretrained(tmp_path)
    tag = megamod.MuxPipeline.from_pretrained(tmp_path, max_length=LENGTH, batch_size=1)
    assert tag.num_instances == 2 and tag.per_token and not tag.model.training
    assert tag([]) == []
    expected = MuxPipeline(model, tokenizer, max_length=LENGTH, batch_size=1)(TEXTS)
    for ours, theirs in zip(tag(TEXTS), expected, strict=True):
        near = [{**answer, "score": pytest.approx(answer["score"], abs=1e-5)} for answer in theirs]
        assert ours == near
    build_model(MuxBertForMaskedLM, 2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="MuxBertForMaskedLM is no classifier; finetune it first"):
        MuxPipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        MuxPipeline.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["w1", ("w1", "w2")], r"request 1, \('w1', 'w2'\): give texts or pairs, not both"),
        (["w1", 3], "request 1, 3: neither a text nor a pair of texts"),
        (["w1", 9 * ["w" * 900]], r"^request 1, .{,250}: neither a text nor a pair of texts$"),
        ([("w1", "w2", "w3")], "request 0, .* neither a text nor a pair"),
        ({"text_pair": "w1"}, "neither a text nor a pair"),
    ],
)
def test_wrong_requests_are_refused(tokenizer, asked, message):
    with pytest.raises(ValueError, match=message):
        MuxPipeline(build_model(BertForSequenceClassification), tokenizer, max_length=LENGTH)(asked)


def test_mistakes_are_named(tokenizer):
    model = build_model(MuxBertForTokenClassification, 2)
    with pytest.raises(ValueError, match=r"request 1, \[\]: neither a text nor a list of words"):
        MuxPipeline(model, tokenizer, max_length=LENGTH)(["w1", []])
    with pytest.raises(ValueError, match="max_length 13 is not between 3 and 12 positions"):
        MuxPipeline(model, tokenizer, max_length=13)
    with pytest.raises(ValueError, match="batch_size 0 must be 1 or more groups"):
        MuxPipeline(model, tokenizer, max_length=LENGTH, batch_size=0)
    with pytest.raises(ValueError, match="MuxBertForMaskedLM is no classifier"):
        MuxPipeline(build_model(MuxBertForMaskedLM, 2), tokenizer, max_length=LENGTH)
    with pytest.raises(AttributeError, match="has no attribute 'Pipeline'"):
        megamod.Pipeline  # noqa: B018


def test_a_model_without_its_head_answers_nothing(tokenizer, tmp_path):
    model = build_model(BertForSequenceClassification)
    state = {name: w for name, w in model.state_dict().items() if name != "classifier.bias"}
    model.save_pretrained(tmp_path, state_dict=state)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"1 of its weights are missing .* classifier\.bias"):
        MuxPipeline.from_pretrained(tmp_path)
