"""Union of vocabularies; rows equal those of mergekit 0.1.5."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from megamod.errors import UserError
from megamod.merging import vocabulary_view
from megamod.merging.merge import merge
from megamod.merging.recipe_file import read_recipe
from megamod.states.weights import read_weights

WORDS = {
    "a": ["<unk>", "<s>", "a", "b", "c", "onlyA", "ab", "pad"],
    "b": ["<unk>", "<s>", "c", "b", "a", "bc", "onlyB", "ab"],
    "c": ["<unk>", "<s>", "bc", "c", "cOnly", "a"],
}
ADDED = {"b": ["<added>"]}
SPARE = {"a": 2}  # rows that no word has
UNION = [*WORDS["a"], "bc", "onlyB", "cOnly", "<added>"]


def make(root: Path) -> None:
    """Models whose rows name their origin: 100 for the first of a, 201 for the second of b."""
    for number, (name, words) in enumerate(WORDS.items(), start=1):
        (root / name).mkdir()
        tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.add_special_tokens(["<unk>", "<s>"])
        tokenizer.add_tokens(ADDED.get(name, []))
        tokenizer.save(str(root / name / "tokenizer.json"))
        (root / name / "vocab.txt").write_text("\n".join(words))
        size = tokenizer.get_vocab_size() + SPARE.get(name, 0)
        rows = (torch.arange(size) + 100.0 * number)[:, None].expand(size, 3)
        state = {"model.embed_tokens.weight": rows, "lm_head.weight": rows + 0.5}
        state |= {"lm_head.bias": rows[:, 0] / 4, "model.layers.0.w": torch.full((10, 2), 3.0)}
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(state, root / name / "model.safetensors")
        config = {"model_type": "toy", "vocab_size": size, "bos_token_id": 1}
        config["pad_token_id"] = words.index("ab") if "ab" in words else None
        (root / name / "config.json").write_text(json.dumps(config))
        (root / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))


@pytest.fixture(scope="module")
def models_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("words")
    make(root)
    return root


def run(
    models_root: Path, tmp_path: Path, weights: list, extra: str, method: str = "linear"
) -> tuple[dict, dict, Path]:
    """Embedding rows by word, configuration and folder of a merge with these weights."""
    lines = [
        f"- {{model: {models_root / name}, parameters: {{weight: {weight}}}}}"
        for name, weight in zip(WORDS, weights, strict=True)
    ]
    recipe = tmp_path / "merge.yml"
    text = "\n".join(
        [f"merge_method: {method}", "models:", *lines, extra.replace("@", f"{models_root}/")]
    )
    recipe.write_text(text)
    output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    merge(read_recipe(recipe), output)
    state, config = read_weights(output), json.loads((output / "config.json").read_text())
    words = Tokenizer.from_file(str(output / "tokenizer.json")).get_vocab(with_added_tokens=True)
    table = state["model.embed_tokens.weight"]
    assert len(words) == len(table) == len(state["lm_head.weight"]) == config["vocab_size"]
    assert sorted(words.values()) == list(range(len(words)))
    torch.testing.assert_close(state["lm_head.bias"] * 4, table[:, 0])
    return {word: float(table[number, 1]) for word, number in words.items()}, config, output


def by_word(*rows: float) -> dict[str, float]:
    return dict(zip(UNION, rows, strict=True))


# What mergekit 0.1.5 gives for these models with base_model a, whose words come first.
BASE_A = {
    "a": by_word(100, 101, 102, 103, 104, 105, 106, 107, 253.5, 206, 304, 208),
    "b": by_word(200, 201, 204, 203, 202, 105, 207, 107, 205, 206, 304, 208),
    "c": by_word(300, 301, 305, 103, 303, 105, 106, 107, 302, 206, 304, 208),
}
# Without a base it is the mean of all models that have the word.
NO_BASE_C = by_word(300, 301, 305, 153, 303, 105, 156.5, 107, 302, 206, 304, 208)


@pytest.mark.parametrize("pieces", [1 << 20, 16])
@pytest.mark.parametrize("name", WORDS)
def test_rows_of_a_union_are_those_of_mergekit(models_root, tmp_path, monkeypatch, name, pieces):
    monkeypatch.setattr(vocabulary_view, "PIECE", pieces)
    weights = [int(name == other) for other in WORDS]
    extra = "tokenizer_source: union\nbase_model: '@a'\n"
    result, config, output = run(models_root, tmp_path, weights, extra)
    assert result == BASE_A[name]
    assert config["bos_token_id"] == 1 and config["pad_token_id"] == 6
    # Words of the base keep their numbers; the tokenizer knows the new ones as well.
    words = Tokenizer.from_file(str(output / "tokenizer.json"))
    assert [words.id_to_token(n) for n in range(len(UNION))] == UNION
    assert words.encode("bc a cOnly <added> zzz").tokens == ["bc", "a", "cOnly", "<added>", "<unk>"]
    assert not (output / "vocab.txt").exists()


def test_weights_mix_rows_of_one_word(models_root, tmp_path):
    result, _, output = run(models_root, tmp_path, [0, 0, 1], "tokenizer: {source: union}")
    assert result == NO_BASE_C
    result, _, _ = run(
        models_root, tmp_path, [1, 2, 1], "tokenizer_source: union\nbase_model: '@a'"
    )
    for word, value in result.items():
        mixed = (BASE_A["a"][word] + 2 * BASE_A["b"][word] + BASE_A["c"][word]) / 4
        assert value == pytest.approx(mixed), word
    message = json.loads((output / "merge.json").read_text())["tokenizer"]
    assert message == {"source": "union", "tokens": {}}


def test_ties_on_a_union_elects_signs_word_by_word(models_root, tmp_path):
    extra = "tokenizer_source: union\nbase_model: '@a'\nparameters: {normalize: true}"
    result, _, _ = run(models_root, tmp_path, [9, 1, 1], extra, "ties")
    for word, value in result.items():
        base = BASE_A["a"][word]
        taus = [BASE_A[name][word] - base for name in "bc"]
        sign = 1 if sum(taus) >= 0 else -1
        kept = [tau for tau in taus if tau * sign > 0]
        assert value == pytest.approx(base + sum(kept) / max(1, len(kept))), word


@pytest.mark.parametrize("key", ["tokenizer_source: '@c'", "tokenizer: {source: '@c'}"])
def test_the_vocabulary_of_one_model(models_root, tmp_path, key):
    result, config, output = run(models_root, tmp_path, [1, 0, 0], f"{key}\nbase_model: '@b'")
    assert result == dict(zip(WORDS["c"], [100, 101, 205, 104, 304, 102], strict=True))
    # The configuration is b's, whose padding c has not, and whose number 2 is c's 3.
    assert config["bos_token_id"] == 1 and config["pad_token_id"] is None
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [3, None]
    original = (models_root / "c" / "tokenizer.json").read_bytes()
    assert (output / "tokenizer.json").read_bytes() == original
    assert (output / "vocab.txt").exists()


def test_equal_vocabularies_stay_as_they_are(models_root, tmp_path):
    lines = f"[{{model: {models_root}/a, parameters: {{weight: 1}}}}]"
    recipe = tmp_path / "merge.yml"
    recipe.write_text(f"merge_method: linear\nmodels: {lines}\ntokenizer_source: base\n")
    merge(read_recipe(recipe), tmp_path / "out")
    assert len(read_weights(tmp_path / "out")["lm_head.weight"]) == 10  # with the spare rows


def test_rows_that_a_recipe_names(models_root, tmp_path):
    tokens = """
tokenizer:
  source: union
  tokens:
    bc: {source: '@c'}
    ab: {source: {kind: zero}}
    onlyB: {source: {kind: zero}, force: true}
    c: {source: '@b', force: true}
    cOnly: {source: {kind: model_token, model: '@a', token: b}}
    <added>: {source: {kind: model_token, model: '@a', token_id: 5}, force: true}
    new: {source: {kind: zero}}
base_model: '@a'
"""
    changed = {"c": 202, "<added>": 105, "onlyB": 0, "new": 0}
    stored = {
        "a": {"cOnly": 103, "bc": 302},
        "b": {"cOnly": 103},
        "c": {"ab": 0},
    }
    for name in WORDS:
        result, _, _ = run(models_root, tmp_path, [int(name == other) for other in WORDS], tokens)
        assert result == BASE_A[name] | changed | stored[name]


SIZES = dict(
    vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)
KINDS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, tie_word_embeddings=False)),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SIZES, embedding_size=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=3)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_with_the_same_words_in_another_order(tmp_path, kind):
    """The second model is the first with its ids permuted, so the union equals either of them."""
    torch.manual_seed(1)
    model = KINDS[kind]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    words, order = [f"w{n}" for n in range(12)], torch.randperm(12)
    state = model.state_dict()
    for name, folder in (("a", tmp_path / "a"), ("b", tmp_path / "b")):
        listed = words if name == "a" else [words[n] for n in order]
        if name == "b":
            moved = {k: v[order] if v.shape[:1] == (12,) else v for k, v in state.items()}
            model.load_state_dict(moved)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model.save_pretrained(folder)
        tokenizer = Tokenizer(WordLevel({w: n for n, w in enumerate(listed)}, unk_token="w0"))
        tokenizer.save(str(folder / "tokenizer.json"))
    text = "".join(f"- {{model: {tmp_path / n}, parameters: {{weight: 1}}}}\n" for n in "ab")
    (tmp_path / "merge.yml").write_text(
        f"merge_method: linear\ntokenizer_source: union\nmodels:\n{text}"
    )
    merge(read_recipe(tmp_path / "merge.yml"), tmp_path / "out")
    result, expected = read_weights(tmp_path / "out"), read_weights(tmp_path / "a")
    assert result.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in result.items())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("tokenizer: {source: union, pad_to_multiple_of: 8}", "key 'pad_to_multiple_of'"),
        ("tokenizer: {tokens: {}}", "tokenizer.source is missing"),
        ("tokenizer: {source: union, tokens: 3}", "tokens: 3 is not `key: value` lines"),
        ("tokenizer: {source: union, tokens: {a: 3}}", "tokens.a: 3 is not `key: value`"),
        ("tokenizer: {source: union, tokens: {a: {source: '@d'}}}", "give union, base, or one of"),
        ("tokenizer: {source: union, tokens: {a: {source: union}}}", "'union'; give one of the"),
        ("tokenizer: {source: union, tokens: {a: {source: {kind: ones}}}}", "{kind: zero}, or"),
        ("tokenizer: {source: union, tokens: {a: {source: base, force: 2}}}", "force: 2 is not"),
        (
            "tokenizer: {source: union, tokens: {a: {source: {kind: model_token, model: '@a', "
            "token_id: -1}}}}",
            "token_id: -1 is not a word or number",
        ),
        ("tokenizer: {source: union, tokens: {bc: {source: '@a'}}}", "tokenizer.json has no 'bc'"),
        (
            "tokenizer: {source: union, tokens: {bc: {source: {kind: model_token, model: '@a', "
            "token_id: 99}}}}",
            "has 10 rows, but a word has row 99",
        ),
        ("tokenizer_source: union\nalign: {method: weight}", "leave out align"),
    ],
)
def test_what_cannot_be_is_named(models_root, tmp_path, extra, message):
    with pytest.raises(UserError) as error:
        run(models_root, tmp_path, [1, 1, 1], extra)
    assert message in str(error.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("tokenizer.json", None, None, "b: has no tokenizer.json"),
        ("tokenizer.json", "{", "[", "is not the file of a tokenizer"),
        (
            "config.json",
            '"vocab_size": 9',
            '"vocab_size": 10',
            "cannot tell which tensor",
        ),
    ],
)
def test_models_that_cannot_be_united(tmp_path, file, old, new, message):
    make(tmp_path)
    path = tmp_path / "b" / file
    if old is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(old, new))
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError) as error:
        run(tmp_path, tmp_path / "runs", [1, 1, 1], "tokenizer_source: union")
    assert message in str(error.value)


def test_a_tensor_of_unknown_rows_is_refused(tmp_path):
    make(tmp_path)
    for file in tmp_path.glob("*/model.safetensors"):
        rows = {"a": 7, "b": 9}.get(file.parent.name, 5)
        state = read_weights(file.parent)
        save_file(state | {"adapter.w": torch.zeros(rows, 2)}, file)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"whether adapter\.w \([79] rows"):
        run(tmp_path, tmp_path / "runs", [1, 1, 1], "tokenizer_source: union")
