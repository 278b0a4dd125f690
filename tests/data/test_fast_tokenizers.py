"""Letter case of BERT vocabularies, and tokenizers that cannot encode text."""

import json
import logging
import random
import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import BertConfig, GPT2Config, PreTrainedTokenizerFast

from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.errors import UserError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = [mark + letter for mark in ("", "##") for letter in string.ascii_lowercase]


def vocabulary(folder: Path, tokens: list[str], mark: str = "", end: str = "\n") -> Path:
    folder.mkdir(exist_ok=True)
    content = mark + end.join([*SPECIAL, *tokens]) + end
    (folder / "vocab.txt").write_bytes(content.encode())
    return folder


def pieces(folder: Path, text: str, **settings: object) -> list[str]:
    return load_tokenizer(folder, **settings).backend.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize("seed", range(4))
def test_a_few_capitals_do_not_make_a_vocabulary_cased(tmp_path, seed, caplog):
    draw = random.Random(seed)
    few = draw.sample(string.ascii_uppercase, 4)
    folder = vocabulary(tmp_path / "few", [*SMALL, *few, "漢", "[unused1]", "<S>"])
    text = "Apple NBA " + "".join(few)
    assert pieces(folder, text) == pieces(folder, text.lower())
    assert "[UNK]" not in pieces(folder, text)
    assert pieces(folder, few[0], do_lower_case=False) == [few[0]]
    assert "of 26 capital letters, such as" in caplog.text
    caplog.clear()
    folder = vocabulary(tmp_path / "cased", [*SMALL, *string.ascii_uppercase, "漢"])
    assert pieces(folder, "Ab") == ["A", "##b"]
    assert pieces(folder, "Ab", do_lower_case=True) == ["a", "##b"]
    assert not caplog.text


def test_marks_and_carriage_returns_are_not_part_of_tokens(tmp_path):
    plain = load_tokenizer(vocabulary(tmp_path / "plain", SMALL))
    for mark, end in (("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")):
        built = load_tokenizer(vocabulary(tmp_path / "other", SMALL, mark, end))
        assert (built.digest, built.pad_id) == (plain.digest, 0)
    (tmp_path / "other" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer"}'
    )
    with pytest.raises(UserError, match=r"begins with a byte order mark, .* token '\[PAD\]'"):
        load_tokenizer(tmp_path / "other")


def test_the_flag_wins_over_the_folder_and_is_kept(tmp_path, caplog):
    folder = vocabulary(tmp_path / "hub", SMALL)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING):
        assert pieces(folder, "Ab") == ["[UNK]"]
    assert "--do_lower_case true encodes them as small letters" in caplog.text
    built = load_tokenizer(folder, do_lower_case=True)
    built.save(tmp_path / "saved")
    assert pieces(tmp_path / "saved", "Ab") == ["a", "##b"]
    backend = Backend(models.WordLevel({"a": 0, "</s>": 1}, unk_token="</s>"))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="--do_lower_case true: only BERT's word pieces"):
        load_tokenizer(tmp_path / "other", do_lower_case=True)


def test_tokenizers_that_encode_no_text_are_refused(tmp_path):
    for config in (BertConfig(), GPT2Config()):  # transformers makes a tokenizer of no file
        config.save_pretrained(tmp_path / config.model_type)
        with pytest.raises(UserError, match=r"has \d ids and none stands for text"):
            load_tokenizer(tmp_path / config.model_type)
    for tokens in ([], [f"[unused{number}]" for number in range(300)]):
        with pytest.raises(UserError, match="so every text would be \\[UNK\\]"):
            load_tokenizer(vocabulary(tmp_path / "empty", tokens))
    backend = Backend(models.WordLevel({"two words": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[UNK]")
    fast.save_pretrained(tmp_path / "unreachable")
    with pytest.raises(UserError, match="has 2 ids and none of its words becomes a token"):
        load_tokenizer(tmp_path / "unreachable")
    load_tokenizer(vocabulary(tmp_path / "one", [*(f"[unused{n}]" for n in range(99)), "漢"]))
