"""Models saved in several ways: prefixes, tied matrices, buffers, heads; quantised weights."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from megamod.errors import UserError
from megamod.merging.merge import average_folders, merge
from megamod.merging.recipe_file import read_recipe
from megamod.states.forest import open_forest
from megamod.states.weights import read_weights

LLAMA = dict(
    vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2
)
LLAMA |= dict(num_key_value_heads=1, max_position_embeddings=32)
BERT = dict(
    vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
)


def make(kind: type, folder: Path, config, seed: int) -> dict[str, torch.Tensor]:
    """A model with random weights in a folder, and these weights."""
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder, max_shard_size="5KB" if seed % 2 else "5GB")
    return read_weights(folder)


def rewrite(folder: Path, state: dict, **config) -> None:
    """Store other tensors in one file, and change fields of config.json."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(fields))


def average(tmp_path: Path, *names: str) -> tuple[dict, dict]:
    average_folders([(tmp_path / n, None) for n in names], [1.0] * len(names), tmp_path / "out")
    return read_weights(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("order", ["head-first", "base-first"])
def test_a_base_class_and_a_head_class_of_one_model(tmp_path, caplog, order):
    head = make(BertForMaskedLM, tmp_path / "head", BertConfig(**BERT), 1)
    base = make(BertModel, tmp_path / "base", BertConfig(**BERT), 2)
    names = ("head", "base") if order == "head-first" else ("base", "head")
    result, config = average(tmp_path, *names)
    first = head if order == "head-first" else base
    assert result.keys() == first.keys() and config["architectures"] == (
        ["BertForMaskedLM"] if order == "head-first" else ["BertModel"]
    )
    for name, tensor in result.items():
        bare = name.removeprefix("bert.")
        if bare in base and f"bert.{bare}" in head:
            expected = (base[bare] + head[f"bert.{bare}"]) / 2
        else:
            expected = first[name]
        torch.testing.assert_close(tensor, expected, msg=name)
    alone = "cls." if order == "head-first" else "pooler."
    assert alone in caplog.text and "in one of them only" in caplog.text


def test_names_without_the_prefix_that_the_same_class_has(tmp_path):
    """As in the first GPT-2 files: no `transformer.` prefix, causal masks in floating point."""
    config = GPT2Config(vocab_size=24, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    states = [make(GPT2LMHeadModel, tmp_path / name, config, n) for n, name in enumerate("ab")]
    bare = {name.removeprefix("transformer."): tensor for name, tensor in states[1].items()}
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 16, 16).tril() for n in range(2)}
    masks |= {f"h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(2)}
    rewrite(tmp_path / "b", bare | masks)
    result, _ = average(tmp_path, "a", "b")
    assert result.keys() == states[0].keys()
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    average_folders([(tmp_path / n, None) for n in "ba"], [1, 1], tmp_path / "turned")
    turned = read_weights(tmp_path / "turned")
    assert turned.keys() == {*bare, *masks}
    assert all(torch.equal(turned[name], tensor) for name, tensor in masks.items())
    torch.testing.assert_close(turned["wte.weight"], result["transformer.wte.weight"])


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_that_one_file_has(tmp_path, first, dtype):
    """Tables of angles as older programs stored them, under a name that no list has."""
    states = [
        make(LlamaForCausalLM, tmp_path / n, LlamaConfig(**LLAMA), s) for s, n in enumerate("ab")
    ]
    states = [{k: v.to(dtype) for k, v in entry.items()} for entry in states]
    extra = {f"model.layers.{n}.self_attn.rotary_emb.angles": torch.arange(2.0) for n in range(3)}
    rewrite(tmp_path / "a", states[0])
    rewrite(tmp_path / "b", states[1] | extra)
    result, _ = average(tmp_path, first, "b" if first == "a" else "a")
    assert result.keys() == states[0].keys() | (extra.keys() if first == "b" else set())
    name = "model.layers.1.mlp.up_proj.weight"
    mean = (states[0][name].float() + states[1][name].float()) / 2
    torch.testing.assert_close(result[name], mean.to(dtype))


def test_a_weight_that_one_model_lacks_is_no_buffer(tmp_path):
    states = [
        make(LlamaForCausalLM, tmp_path / n, LlamaConfig(**LLAMA), s) for s, n in enumerate("ab")
    ]
    lacking = {k: v for k, v in states[1].items() if "layers.1.mlp.up_proj" not in k}
    rewrite(tmp_path / "b", lacking)
    for names in ("ab", "ba"):
        with pytest.raises(UserError, match=r"b has no model\.layers\.1\.mlp\.up_proj\.weight|has"):
            average(tmp_path, *names)


@pytest.mark.parametrize("order", ["tied-first", "untied-first"])
@pytest.mark.parametrize("stored", ["once", "twice"])
def test_tied_and_untied_models(tmp_path, order, stored):
    """The embeddings of a tied model are its output matrix; the result is no longer tied."""
    tied = make(
        LlamaForCausalLM, tmp_path / "tied", LlamaConfig(**LLAMA, tie_word_embeddings=True), 1
    )
    untied = make(LlamaForCausalLM, tmp_path / "untied", LlamaConfig(**LLAMA), 2)
    embedding = tied["model.embed_tokens.weight"]
    assert "lm_head.weight" not in tied and "lm_head.weight" in untied
    if stored == "twice":
        rewrite(tmp_path / "tied", tied | {"lm_head.weight": embedding})
    names = ("tied", "untied") if order == "tied-first" else ("untied", "tied")
    result, config = average(tmp_path, *names)
    assert config["tie_word_embeddings"] is False
    torch.testing.assert_close(result["lm_head.weight"], (embedding + untied["lm_head.weight"]) / 2)
    table = "model.embed_tokens.weight"
    torch.testing.assert_close(result[table], (embedding + untied[table]) / 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model.lm_head.weight.data, result["lm_head.weight"])


def test_models_that_are_tied_stay_so(tmp_path):
    config = LlamaConfig(**LLAMA, tie_word_embeddings=True)
    states = [make(LlamaForCausalLM, tmp_path / n, config, s) for s, n in enumerate("ab")]
    rewrite(tmp_path / "a", states[0] | {"lm_head.weight": states[0]["model.embed_tokens.weight"]})
    result, config = average(tmp_path, "a", "b")
    assert config["tie_word_embeddings"] is True
    assert torch.equal(result["lm_head.weight"], result["model.embed_tokens.weight"])


QUANTISED = [
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {"quant_method": "fp8"}},
    {"compression_config": {"format": "pack-quantized"}},
    {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    {},
]


@pytest.mark.parametrize("config", QUANTISED)
def test_quantised_models_are_refused(tmp_path, config):
    """Integers of quantised weights have no mean, and those of one model are wrong too."""
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        numbers = torch.randint(-127, 127, (4, 6), generator=generator).to(torch.int8)
        state = {"h.0.w.weight": numbers, "h.0.w.SCB": torch.rand(4, generator=generator)}
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "toy"} | config))
    message = next(iter(next(iter(config.values()), {})), "") if "text_config" in config else ""
    with pytest.raises(UserError) as error:
        average(tmp_path, "a", "b")
    assert (message or next(iter(config), "h.0.w.weight")) in str(error.value)
    assert len(str(error.value).splitlines()) <= 3 and not (tmp_path / "out").exists()


def test_packed_weights_that_look_like_floats_are_refused(tmp_path):
    """As 4-bit weights of bitsandbytes with bfloat16 storage, without a word in config.json."""
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        packed = torch.randn(8, 1, generator=generator).bfloat16()
        state = {"h.0.w.weight": packed, "h.0.w.weight.absmax": torch.rand(4)}
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "toy"}')
    with pytest.raises(UserError, match=r"h\.0\.w\.weight\.absmax belongs to"):
        average(tmp_path, "a", "b")


@pytest.mark.parametrize(
    "changed",
    [
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_theta": 500000.0},
        {"logits_soft_cap": 30.0},
        {"sliding_window": 16},
    ],
)
def test_settings_that_change_the_function_are_reported(tmp_path, caplog, changed):
    for seed, name in enumerate("ab"):
        state = make(LlamaForCausalLM, tmp_path / name, LlamaConfig(**LLAMA), seed)
    config = json.loads((tmp_path / "b/config.json").read_text())
    if "rope_theta" in changed:
        del config["rope_parameters"]
        (tmp_path / "b/config.json").write_text(json.dumps(config))
    rewrite(tmp_path / "b", state, **changed)
    caplog.set_level(logging.WARNING)
    average(tmp_path, "a", "b")
    key, value = next(iter(changed.items()))
    value = value.get("rope_theta") if isinstance(value, dict) else value
    assert key.split("_")[0] in caplog.text and str(value) in caplog.text
    assert all(len(entry.getMessage().splitlines()) <= 3 for entry in caplog.records)


def test_other_spellings_of_equal_settings_are_not_reported(tmp_path, caplog):
    for seed, name in enumerate("ab"):
        state = make(LlamaForCausalLM, tmp_path / name, LlamaConfig(**LLAMA), seed)
    config = json.loads((tmp_path / "b/config.json").read_text())
    del config["rope_parameters"], config["rms_norm_eps"]
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    rewrite(
        tmp_path / "b", state, rope_theta=10000.0, attention_dropout=0.1, use_cache=False,
        bos_token_id=5, transformers_version="4.1",
    )  # fmt: skip
    average(tmp_path, "a", "b")
    assert not [entry for entry in caplog.records if "differ in" in entry.getMessage()]


def tokenizer(folder: Path, root: str, added: dict[str, int]) -> None:
    """Files of a tokenizer of four words with added ones, listed in one of three ways."""
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate("wxyz")}))
    if root == "tokenizer.json":
        entries = [{"content": word, "id": number} for word, number in added.items()]
        content = {"model": {"vocab": dict(zip("wxyz", range(4), strict=True))}}
        content["added_tokens"] = entries
        (folder / root).write_text(json.dumps(content))
    elif root == "added_tokens.json":
        (folder / root).write_text(json.dumps(added))
    else:
        entries = {str(number): {"content": word} for word, number in added.items()}
        (folder / root).write_text(json.dumps({"added_tokens_decoder": entries}))


PLACES = ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"]


@pytest.mark.parametrize("first", PLACES)
@pytest.mark.parametrize("second", PLACES)
def test_added_words_that_share_an_id(tmp_path, first, second):
    for n, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_file({"h.0.w": torch.full((6, 2), float(n))}, tmp_path / name / "model.safetensors")
        config = {"model_type": "toy", "vocab_size": 6}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    tokenizer(tmp_path / "a", first, {"<|im_start|>": 4})
    tokenizer(tmp_path / "b", second, {"[PAD]": 4})
    with pytest.raises(UserError) as error:
        average(tmp_path, "a", "b")
    message = str(error.value)
    assert "id 4" in message and "<|im_start|>" in message and "[PAD]" in message
    assert "tokenizer_source: union" in message
    tokenizer(tmp_path / "b", second, {"<|im_start|>": 5})
    with pytest.raises(UserError, match=r"'<\|im_start\|>' has id 4 in the first and 5"):
        average(tmp_path, "a", "b")
    # Words that one of them lacks, and that share no id, do no harm.
    tokenizer(tmp_path / "b", second, {"[PAD]": 5})
    average(tmp_path, "a", "b")


def test_a_union_brings_added_words_together(tmp_path):
    from transformers import GPT2LMHeadModel as Model

    config = GPT2Config(vocab_size=5, n_embd=4, n_layer=1, n_head=1, n_positions=8)
    states = [make(Model, tmp_path / name, config, n) for n, name in enumerate("ab")]
    tokenizer(tmp_path / "a", "tokenizer.json", {"<|im_start|>": 4})
    tokenizer(tmp_path / "b", "tokenizer.json", {"[PAD]": 4})
    lines = "\n".join(f"- {{model: {tmp_path / n}, parameters: {{weight: 1}}}}" for n in "ab")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: linear\ntokenizer_source: union\nmodels:\n{lines}\n")
    merge(read_recipe(recipe), tmp_path / "out")
    table = load_file(tmp_path / "out/model.safetensors")["transformer.wte.weight"]
    assert torch.equal(table[4], states[0]["transformer.wte.weight"][4])
    assert torch.equal(table[5], states[1]["transformer.wte.weight"][4])


def test_experts_of_a_forest_agree_on_their_words(tmp_path):
    for name, word in (("law", "<|im_start|>"), ("med", "[PAD]")):
        (tmp_path / name).mkdir()
        config = {"model_type": "llama", "vocab_size": 6}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        tokenizer(tmp_path / name, "added_tokens.json", {word: 4})
    with pytest.raises(UserError, match=r"id 4 is '<\|im_start\|>' in the first and '\[PAD\]'"):
        open_forest(tmp_path)
    tokenizer(tmp_path / "med", "added_tokens.json", {"<|im_start|>": 4})
    assert open_forest(tmp_path).domains == ("law", "med")
