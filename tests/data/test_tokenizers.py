import copy
import hashlib
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from megamod.data.corpus import sentencepiece_model, tokenizers
from megamod.data.corpus.tokenizers import (
    find_trainer,
    load_tokenizer,
    train_sentencepiece,
    train_wordpiece,
)
from megamod.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tokenizers"
CODE = [Path(module.__file__).read_text("utf-8") for module in (json, hashlib, st, np)]
ODD = [
    "",
    " ",
    "\n",
    " lead  two   three\n\n\ttab\r\n end ",
    "▁ U+2581 ▁▁ and <0x41> </s> <s><pad> <unk>",
    "é e\u0301 漢字 😀 \u2028\u00a0\u200b",
    "if x:\n        return [a+b]  # -----------\n",
]


def need(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip("the shared tokenizer files are not beside this repository")
    return SHARED / name


@pytest.fixture(scope="module")
def trained():
    return train_sentencepiece(CODE, 700)


def test_trained_special_ids(trained):
    assert trained.special_ids == {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
    assert trained.vocab_size == 700
    symbols = [trained.backend.id_to_token(item) for item in range(7)]
    assert symbols == ["<s>", "<pad>", "</s>", "<unk>", "\n", "\t", "<0x00>"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(blacklist_categories=["Cs"])))
def test_trained_is_lossless(trained, text):
    (ids,) = trained.encode_batch([text])
    assert trained.decode(ids) == text
    assert not set(ids.tolist()) & {0, 1, 2, 3}


def test_trained_is_lossless_on_real_and_odd_text(trained):
    for text, ids in zip(CODE + ODD, trained.encode_batch(CODE + ODD), strict=True):
        assert ids.dtype == np.int32
        assert trained.decode(ids) == text


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("aelrst -=_\n\t#▁é")))
def test_trained_equals_sentencepiece_on_repetitive_text(trained, text):
    assert trained.encode_batch([text])[0].tolist() == _processor(trained).encode(text)


def test_trained_equals_sentencepiece_and_auto_tokenizer(trained, tmp_path):
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in zip(CODE + ODD, trained.encode_batch(CODE + ODD), strict=True):
        assert ids.tolist() == _processor(trained).encode(text)
        assert ids.tolist() == auto(text)["input_ids"]
    named = (auto.bos_token_id, auto.pad_token_id, auto.eos_token_id, auto.unk_token_id)
    assert named == (0, 1, 2, 3)
    again = load_tokenizer(tmp_path)
    assert (again.kind, again.digest) == ("sentencepiece", trained.digest)
    assert load_tokenizer(tmp_path / "sentencepiece.model").digest == trained.digest


def test_training_is_deterministic_and_depends_on_the_text(trained):
    assert train_sentencepiece(CODE, 700).files == trained.files
    assert train_sentencepiece(CODE[:2], 700).digest != trained.digest


def test_training_errors():
    with pytest.raises(UserError, match=r"sentencepiece:4096: .*too high"):
        train_sentencepiece(["a few words"], 4096)
    with pytest.raises(UserError, match=r"sentencepiece:100: .*smaller than required"):
        train_sentencepiece(CODE, 100)
    assert find_trainer("some/folder") is find_trainer("sentencepiece") is None
    with pytest.raises(UserError, match="sentencepiece:4k: write the number of ids"):
        find_trainer("sentencepiece:4k")
    with pytest.raises(UserError, match=r"wordpiece:20: .* alone are \d+ ids"):
        train_wordpiece(CODE, 20)


def test_trained_word_pieces_are_those_of_a_bert_tokenizer(tmp_path):
    loaded = find_trainer("wordpiece:600")(CODE)
    assert list(loaded.special_ids.values()) == [2, 0, 3, 1]
    assert loaded.vocab_size == 600
    assert train_wordpiece(CODE, 600).digest == loaded.digest
    loaded.save(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "def Encode(self, value): return json.dumps(value)"
    assert again.encode_batch([text])[0].tolist() == loaded.encode_batch([text])[0].tolist()
    assert again.original.mask_token_id == 4
    ids = again.original(text)["input_ids"]
    assert ids == [2, *loaded.encode_batch([text.lower()])[0].tolist(), 3]
    pieces = again.original.tokenize("encoding")
    assert "".join(piece.removeprefix("##") for piece in pieces) == "encoding"


SYMBOLS = ["<sep>", "<cls>", "ab", "New", "the", "\n", "▁▁", "é", "①", "<<", ".", "x", "a b"]


def foreign(folder: Path, **settings: object) -> Path:
    """A small SentencePiece model with settings of its trainer."""
    import sentencepiece

    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(CODE[:2]).split("\n")),
        model_writer=content,
        vocab_size=500,
        hard_vocab_limit=False,
        minloglevel=3,
        **settings,
    )
    path = folder / "foreign.model"
    path.write_bytes(content.getvalue())
    return path


@pytest.mark.parametrize("seed", range(14))
def test_ids_of_random_sentencepiece_models_are_those_of_sentencepiece(tmp_path, seed):
    draw = random.Random(seed)
    kind = ["bpe", "unigram"][seed % 2]
    symbols, control = draw.sample(SYMBOLS, seed % 4), draw.sample(["<ctl>", "[C]", "<se"], 2)
    settings = dict(
        user_defined_symbols=symbols,
        control_symbols=control,
        byte_fallback=draw.random() < 0.5,
        add_dummy_prefix=draw.random() < 0.6,
        remove_extra_whitespaces=draw.random() < 0.6,
        normalization_rule_name=draw.choice(["nmt_nfkc", "identity", "nmt_nfkc_cf"]),
        split_by_whitespace=draw.random() < 0.8,
    )
    path = foreign(tmp_path, model_type=kind, **settings)
    try:
        loaded = load_tokenizer(path)
    except UserError as error:
        assert "does not reproduce" in str(error)
        return
    words = [*symbols, " ", "  ", "the", "cabs", "ａ", "hello", "New York", "\n", ".", "漢"]
    spelled = [*control, "<s>", "<unk>", "<0x41>"]
    for number in range(300):
        texts = words if number % 2 and kind == "unigram" else words + spelled
        text = "".join(draw.choices(texts, k=draw.randint(1, 7)))
        exact = _processor(loaded).encode(text)
        assert loaded.encode_batch([text])[0].tolist() == exact
        if texts is words or kind == "bpe":
            assert loaded.backend.encode(text, add_special_tokens=False).ids == exact, text
        if loaded.unk_id not in exact:
            assert loaded.decode(exact) == _processor(loaded).decode(exact)


def test_user_defined_symbols_of_a_model_in_a_saved_folder(tmp_path):
    from transformers import AutoTokenizer

    path = foreign(tmp_path, model_type="bpe", user_defined_symbols=["<sep>", "<cls>"])
    loaded = load_tokenizer(path)
    texts = ["<sep> the<sep>", "<sep>", "a<cls><s><cls> end", "the  <sep>  <unk>"]
    loaded.save(tmp_path / "saved")
    auto, again = (
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
        load_tokenizer(tmp_path / "saved"),
    )
    assert again.digest == loaded.digest
    for text, ids in zip(texts, copy.deepcopy(again).encode_batch(texts), strict=True):
        assert ids.tolist() == _processor(loaded).encode(text)
        assert ids.tolist() == auto(text, add_special_tokens=False)["input_ids"]
    pieces = auto.convert_ids_to_tokens(auto(texts[0], add_special_tokens=False)["input_ids"])
    assert pieces[:2] == ["▁", "<sep>"] and pieces[2].startswith("▁t") and pieces[-1] == "<sep>"


def test_models_that_tokenizers_cannot_reproduce_are_refused(tmp_path):
    path = foreign(tmp_path, model_type="bpe", user_defined_symbols=["①<"])
    with pytest.raises(UserError, match=r"does not reproduce this model: it encodes '.*①<"):
        load_tokenizer(path)
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "settings", [{}, {"add_dummy_prefix": False}, {"split_by_whitespace": False}]
)
def test_huge_texts_have_the_ids_of_sentencepiece(tmp_path, monkeypatch, settings):
    loaded = load_tokenizer(foreign(tmp_path, model_type="unigram", **settings))
    monkeypatch.setattr(sentencepiece_model, "LONGEST_PART", 300)
    texts = [CODE[0][:4000], "short", "x" * 1000, "a " * 400]
    assert [ids.tolist() for ids in loaded.encode_batch(texts)] == _processor(loaded).encode(texts)


def test_a_huge_text_is_cut_before_blanks(trained, monkeypatch):
    text = "\n".join(" ".join(part.split()) for part in CODE[0].split("\n\n"))
    whole = trained.backend.encode(text).ids
    monkeypatch.setattr(tokenizers, "LONGEST", 500)
    assert trained.encode_batch([text, "a"])[0].tolist() == whole
    assert trained.decode(trained.encode_batch(["x" * 1200])[0]) == "x" * 1200


def tiny_gpt2(folder: Path) -> dict[str, str]:
    """GPT-2 BPE with two merges and a dict.txt in another order; gives symbol -> token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoder = {token: number for number, token in enumerate([*alphabet, "he", "Ġhe"])}
    folder.mkdir()
    (folder / "encoder.json").write_text(json.dumps(encoder))
    (folder / "vocab.bpe").write_text("#version: 0.2\nh e\nĠ he\n")
    symbols = [str(number) for number in reversed(range(len(encoder)))] + ["madeupword0000"]
    (folder / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    return {str(number): token for token, number in encoder.items()}


def test_tiny_gpt2_by_hand(tmp_path):
    tokens = tiny_gpt2(tmp_path / "gpt2")
    loaded = load_tokenizer(tmp_path / "gpt2")
    size = len(tokens)
    assert (loaded.kind, loaded.vocab_size) == ("gpt2", size + 5)
    of = {token: 4 + size - 1 - int(symbol) for symbol, token in tokens.items()}
    (ids,) = loaded.encode_batch(["he </s> he"])
    assert ids.tolist() == [of[t] for t in ["he", "Ġ", "<", "/", "s", ">", "Ġhe"]]
    assert [loaded.decode(item) for item in loaded.encode_batch(ODD)] == ODD
    loaded.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").digest == loaded.digest
    text = (tmp_path / "gpt2" / "dict.txt").read_text().split("\n", 1)[1]
    (tmp_path / "gpt2" / "dict.txt").write_text(text)
    with pytest.raises(UserError, match=rf"dict\.txt lacks 1 ids .* such as {size - 1}"):
        load_tokenizer(tmp_path / "gpt2")


def test_released_gpt2_files(tmp_path):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer

    folder = need("gpt2")
    loaded = load_tokenizer(folder)
    assert loaded.vocab_size == 50264
    plain = ByteLevelBPETokenizer.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    lines = (folder / "dict.txt").read_text("utf-8").splitlines()
    of = {line.split(" ")[0]: number + 4 for number, line in enumerate(lines)}
    loaded.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*CODE, *ODD, "Hello world"]
    for text, ids in zip(texts, loaded.encode_batch(texts), strict=True):
        assert ids.tolist() == [of[str(item)] for item in plain.encode(text).ids]
        assert ids.tolist() == auto(text)["input_ids"]
        assert loaded.decode(ids) == text
    assert ids.tolist() == [of["15496"], of["995"]]


@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-cased"])
def test_bert_from_its_vocabulary_alone(tmp_path, name):
    from tokenizers import BertWordPieceTokenizer
    from transformers import AutoTokenizer

    folder = need(name)
    loaded = load_tokenizer(folder)
    plain = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=name.endswith("uncased"))
    pad, unk, cls, sep = (
        plain.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    )
    assert loaded.special_ids == {"bos_id": cls, "pad_id": pad, "eos_id": sep, "unk_id": unk}
    loaded.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["Größe matters, it's 3 Words", CODE[0]]:
        ids = loaded.encode_batch([text])[0].tolist()
        assert ids == plain.encode(text, add_special_tokens=False).ids
        assert ids == auto(text, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(tmp_path).digest == loaded.digest


def test_defaults_of_missing_special_tokens(tmp_path):
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordLevel({"a": 0, "b": 1, "[SEP]": 2}, unk_token="b"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="[SEP]").save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_ids == {"bos_id": 2, "pad_id": 2, "eos_id": 2, "unk_id": 2}
    assert loaded.encode_batch(["a b a", ""])[0].tolist() == [0, 1, 0]
    loaded.save_dictionary(tmp_path / "dict.txt")
    assert not (tmp_path / "dict.txt").exists()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match="neither an eos nor a sep"):
        load_tokenizer(tmp_path / "none")


def test_missing_tokenizers(tmp_path):
    (tmp_path / "folder").mkdir()
    for spec in (tmp_path / "folder", tmp_path / "a.model"):
        with pytest.raises(UserError, match="--tokenizer"):
            load_tokenizer(spec)


def test_dictionary_of_a_trained_tokenizer(trained, tmp_path):
    trained.save_dictionary(tmp_path / "dict.txt")
    lines = (tmp_path / "dict.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [str(item) for item in range(4, 700)]


def _processor(loaded):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=loaded.files["sentencepiece.model"])
