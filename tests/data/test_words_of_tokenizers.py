"""Words of a sentence get the tokens that they have in running text, whatever the tokenizer is."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForTokenClassification

from megamod.data.tasks.classification import RowLengthLimits, encode_words
from megamod.data.tasks.token_set import TokenSet
from megamod.evaluation.mux_pipeline import MuxPipeline

SENTENCE = "the minister said on Monday that it 's a fine day in 2020 , cafés !"
WORDS = SENTENCE.split(" ")
TEXT = [SENTENCE, "the day said that the minister is fine", " on Monday"] * 3
LLAMA = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def byte_level(**options: bool):
    return pre_tokenizers.ByteLevel(**options)


def split(pattern: str):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


FAMILIES = {
    "gpt2, roberta, bart, deberta": byte_level(add_prefix_space=False),
    "roberta with add_prefix_space": byte_level(add_prefix_space=True),
    "llama 3, qwen": pre_tokenizers.Sequence(
        [split(LLAMA), byte_level(add_prefix_space=False, use_regex=False)]
    ),
    "starcoder": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
    ),
    "gemma": None,
    "xlm-roberta": pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    ),
    "t5": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "llama 2": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "phi": byte_level(add_prefix_space=False, trim_offsets=False),
}


def train(pre_tokenizer) -> PreTrainedTokenizerFast:
    """A small BPE tokenizer of a family."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if pre_tokenizer is None:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        backend.decoder = decoders.Replace("▁", " ")
    else:
        backend.pre_tokenizer = pre_tokenizer
        if "Metaspace" in str(pre_tokenizer):
            backend.decoder = decoders.Metaspace()
        else:
            backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    if pre_tokenizer is None:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_words_have_the_tokens_of_running_text(family):
    tokenizer = train(FAMILIES[family])
    sentence = TokenSet([WORDS], None, [list(range(len(WORDS)))], "file")
    encoded = encode_words(sentence, tokenizer, RowLengthLimits(99, 99), ["O"])
    # Inside of a text every word comes after a blank, so its tokens do not depend on its place.
    running = tokenizer(" x " + SENTENCE, add_special_tokens=False)["input_ids"]
    ids = encoded.ids.tolist()
    assert running[-len(ids) :] == ids
    assert tokenizer.decode(ids).split() == WORDS
    starts = [*encoded.word_starts[0].tolist(), len(ids)]
    for word, start, end in zip(WORDS, starts, starts[1:], strict=False):
        assert tokenizer.decode(ids[start:end]).strip() == word


def test_the_blank_is_that_of_add_prefix_space():
    tokenizer = train(byte_level(add_prefix_space=False))
    sentence = TokenSet([WORDS], None, [list(range(len(WORDS)))], "file")
    ours = encode_words(sentence, tokenizer, RowLengthLimits(99, 99), ["O"]).ids.tolist()
    tokenizer.backend_tokenizer.pre_tokenizer = byte_level(add_prefix_space=True)
    theirs = tokenizer(WORDS, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    assert ours == theirs


def test_the_pipeline_gives_words_their_blanks():
    tokenizer = train(byte_level(add_prefix_space=False))
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=40,
    )
    model, seen = RobertaForTokenClassification(config), []
    tag = MuxPipeline(model, tokenizer, max_length=32)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    assert [item["word"] for item in tag("the day\u00a0said\n fine")] == [
        "the",
        "day\u00a0said",
        "fine",
    ]
    tag([WORDS[:5]])
    assert tokenizer.decode(seen[1][0], skip_special_tokens=True).split() == WORDS[:5]
    expected = torch.tensor(tokenizer(" " + " ".join(WORDS[:5]))["input_ids"])
    assert seen[1][0][: len(expected)].equal(expected)
