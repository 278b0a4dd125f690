import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megamod.errors import UserError
from megamod.merging.merge import merge
from megamod.merging.methods.table import METHODS, list_method_parameters
from megamod.merging.recipe import MergeRecipe, build_weighted_recipe
from megamod.merging.recipe_file import read_recipe
from megamod.merging.settings import (
    ParameterLookup,
    check_parameter_names,
    compute_relative_depths,
    look_up_parameters,
)
from megamod.states.weights import read_weights

SLICED = "merge_method: x\nslices:\n- sources: [{model: a, layer_range: "
HEAD = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "merge.yml"
    path.write_text(text)
    return path


def values_of(recipe: MergeRecipe, name: str, depth: float) -> tuple[dict, list[dict]]:
    """Values of one tensor: of the whole merge, and of each model."""
    common = [(f"{recipe.origin}, parameters", recipe.parameters)]
    places = [(f"{recipe.origin}, {entry}", entry.parameters) for entry in recipe.inputs]
    check_parameter_names([*places, *common], list_method_parameters(), recipe.method)
    each = [ParameterLookup(name, [root, *common]) for root in places]
    return look_up_parameters(METHODS[recipe.method], depth, ParameterLookup(name, common), each)


def weights_of(recipe: MergeRecipe, names: list[str]) -> dict[str, list[float]]:
    depth = compute_relative_depths(names)
    return {n: [v["weight"] for v in values_of(recipe, n, depth[n])[1]] for n in names}


def test_depth_is_the_layers_place_among_the_layers():
    names = ["embed", "h.0.mlp.0.w", "h.2.x", "h.4.x", "norm"]
    assert compute_relative_depths(names) == {
        "embed": 0,
        "h.0.mlp.0.w": 0,
        "h.2.x": 0.5,
        "h.4.x": 1,
        "norm": 0,
    }
    assert compute_relative_depths(["embed", "h.0.x"]) == {"embed": 0, "h.0.x": 1}


def test_numbers_lists_and_filters(tmp_path):
    text = """
merge_method: linear
models:
- model: a
  parameters: {weight: [0, 1, 10]}
- model: b
  parameters:
    weight:
    - {filter: mlp, value: [2, 4]}
    - {filter: attn, value: 1e-3}
- model: c
parameters:
  weight: [{filter: "*", value: 7}]
  normalize: false
  int8_mask: true
dtype: float32
"""
    recipe = read_recipe(write(tmp_path, text))
    assert (recipe.dtype, recipe.out_dtype) == ("float32", None)
    assert (recipe.base, recipe.template_model, recipe.tokenizer) == (None, 0, 0)
    assert weights_of(recipe, ["wte", "h.0.mlp", "h.1.mlp", "h.3.mlp", "h.4.attn"]) == {
        "wte": [0, 7, 7],
        "h.0.mlp": [0, 2, 7],
        "h.1.mlp": [0.5, 2.5, 7],
        "h.3.mlp": [5.5, 3.5, 7],
        "h.4.attn": [10, 1e-3, 7],
    }
    assert values_of(recipe, "x", 0)[0] == {"normalize": False}


def test_base_and_tokenizer_are_found_among_the_models(tmp_path):
    (tmp_path / "b").mkdir()
    text = HEAD + "- {model: b, member: law, parameters: {weight: 2}}\nbase_model: b\n"
    recipe = read_recipe(write(tmp_path, text + "tokenizer_source: a\nout_dtype: bfloat16"))
    assert [entry.path for entry in recipe.inputs] == [Path("a"), tmp_path / "b"]
    assert (recipe.base, recipe.tokenizer, recipe.inputs[1].member) == (1, 0, "law")
    assert read_recipe(write(tmp_path, text + "tokenizer_source: base")).tokenizer == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "merge.yml, line 1"),
        ("- a", "is not `key: value` lines; keys are models"),
        (HEAD + "dtyp: float32", "'dtyp'; the nearest is 'dtype'"),
        (HEAD + "dtype: float33", "'float33' is not one of float32"),
        (HEAD + "modules: {a: {models: [{model: a}]}}", "has all of models, modules; give exactly"),
        (HEAD + "parameters: {weight: &a {value: *a}}", "is nested more than 100 deep"),
        (
            HEAD + "dtype: float32\ndtype: float16",
            "line 5, column 1: not YAML: 'dtype' appears twice",
        ),
        (HEAD + "tokenizer_source: z", "is 'z'; give union, base, or one of the models a"),
        (HEAD + "tokenizer: {tokens: {}}", "tokenizer.source is missing"),
        (HEAD + "tokenizer_source: a\ntokenizer: {source: a}", "has both tokenizer and"),
        (HEAD + "base_model: 3", "base_model: 3 is not text"),
        (HEAD + "align: 3", "align: 3 is not `key: value` lines"),
        ("merge_method: linear", "has none of models, slices, modules"),
        (SLICED + "[3, 1]}]", "slices[0].sources[0].layer_range: [3, 1] is not [FIRST, LAST + 1]"),
        (SLICED + "[0, true]}]", "layer_range[1]: True is not a whole number"),
        (
            SLICED + "[0, 2]}, {model: b, layer_range: [0, 3]}]",
            "slices[0]: sources have [2, 3] layers",
        ),
        ("merge_method: x\nslices: [{sorces: []}]", "unknown key 'sorces'"),
        ("merge_method: x\nslices: []", "slices: [] has fewer than 1 items"),
        (
            "merge_method: x\nmodules: {a: {}, b: {}}",
            "modules.a: has none of models, slices; give",
        ),
        ("merge_method: x\nmodules: [a]", "modules: ['a'] is not `key: value` lines"),
        (
            "merge_method: x\nmodules: {a: {models: [{model: a}]}, "
            "b: {slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}}",
            "several modules cannot have slices",
        ),
        ("merge_method: x\nmodules: {a: {model: b}}", "unknown key 'model'"),
        (HEAD + "chat_template: x", "chat_template: 'x' is not one of auto"),
        (HEAD + "parameters: 3", "parameters: 3 is not `key: value` lines"),
        ("merge_method: linear\nmodels: []", "models: [] has fewer than 1 items"),
        (
            "merge_method: linear\nmodels: [a]",
            "models[0]: 'a' is not `key: value` lines; keys are model",
        ),
        ("merge_method: linear\nmodels: [{model: a, wieght: 2}]", "'wieght'"),
        (
            "merge_method: linear\nmodels: [{model: a, member: 3}]",
            "models[0].member: 3 is not text",
        ),
        ("models: [{model: a}]", "merge_method is missing"),
        ("", "is not `key: value` lines"),
    ],
)
def test_recipes_that_cannot_be_read(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        read_recipe(write(tmp_path, text))
    assert message in str(error.value) and "merge.yml" in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("{weight: x}", "weight: 'x' is not a finite number"),
        ("{weight: .nan}", "weight: nan is not a finite number"),
        ("{weight: true}", "weight: True is not a number"),
        ("{weight: []}", "weight: [] is not a finite number"),
        ("{weight: [1, a]}", "'a' is not a finite number"),
        ("{weight: [{filter: mlp, value: 1}]}", "weight is missing for attn.w"),
        ("{weight: [{filtr: mlp, value: 1}]}", "is not of the form"),
        ("{normalize: true}", "weight is missing for attn.w"),
        ("{weight: 1, normalize: 2}", "normalize: 2.0 is not true or false"),
        ("{weight: 1e31}", "weight: '1e31' is not a finite number"),
        ("{weight: [{value: 1}, {filter: 2020-01-01, value: 1}]}", "is not of the form"),
        ("{weight: 1, int8_mask: 2020-01-01}", "is not true or false"),
        ("{weight: 1, densty: 1}", "linear has no parameter 'densty'"),
    ],
)
def test_parameters_that_are_wrong(tmp_path, parameters, message):
    text = f"merge_method: linear\nmodels: [{{model: a}}]\nparameters: {parameters}\n"
    recipe = read_recipe(write(tmp_path, text))
    with pytest.raises(UserError) as error:
        values_of(recipe, "attn.w", 0)
    assert message in str(error.value) and "merge.yml" in str(error.value)


def test_as_many_weights_as_models():
    with pytest.raises(UserError, match="--weights: gives 3 weights, but there are 2 models"):
        build_weighted_recipe([(Path("a"), None), (Path("b"), "law")], [1, 2, 3])
    with pytest.raises(UserError, match="no model"):
        build_weighted_recipe([], [])


def make_model(folder: Path, layers: int, seed: int, vocabulary: int = 6, **files: str) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wte.weight": (vocabulary, 3), "ln_f.weight": (3,), "head.weight": (vocabulary, 3)}
    shapes |= {f"h.{layer}.{part}": (3, 3) for layer in range(layers) for part in ("mlp", "attn")}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state |= {f"h.{layer}.mask": torch.tensor([7, 8]) for layer in range(layers)}
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config = {"model_type": "toy", "vocab_size": vocabulary, "n_layer": layers}
    config["layer_types"] = [f"{seed}-{layer}" for layer in range(layers)]
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return state


def run(folder: Path, text: str) -> tuple[dict, dict]:
    """Weights and configuration of the merged model of a recipe."""
    output = folder / f"out{len(list(folder.iterdir()))}"
    merge(read_recipe(write(folder, text)), output)
    return read_weights(output), json.loads((output / "config.json").read_text())


def test_slices_stack_layers(tmp_path):
    a, b = make_model(tmp_path / "a", 3, 1), make_model(tmp_path / "b", 4, 2)
    result, config = run(
        tmp_path,
        """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [{model: b, layer_range: [1, 4], parameters: {scale: [{filter: mlp, value: 0.5}]}}]
""",
    )
    assert config["n_layer"] == 5
    assert config["layer_types"] == ["1-0", "1-1", "2-1", "2-2", "2-3"]
    origins = [(a, 0), (a, 1), (b, 1), (b, 2), (b, 3)]
    for layer, (state, number) in enumerate(origins):
        factor = 0.5 if state is b else 1
        assert torch.equal(result[f"h.{layer}.mlp"], factor * state[f"h.{number}.mlp"])
        assert torch.equal(result[f"h.{layer}.attn"], state[f"h.{number}.attn"])
        assert torch.equal(result[f"h.{layer}.mask"], state[f"h.{number}.mask"])
    assert torch.equal(result["wte.weight"], a["wte.weight"])
    assert torch.equal(result["ln_f.weight"], b["ln_f.weight"])
    assert torch.equal(result["head.weight"], b["head.weight"])
    assert len(result) == 5 * 3 + 3


def test_parameters_are_looked_for_in_source_slice_module_and_recipe(tmp_path):
    a, b = make_model(tmp_path / "a", 3, 1), make_model(tmp_path / "b", 3, 2)
    result, _ = run(
        tmp_path,
        """
merge_method: linear
modules:
  default:
    slices:
    - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: b, layer_range: [1, 3], parameters: {weight: [{filter: mlp, value: 3}]}}
      parameters: {weight: [{filter: attn, value: [5, 7]}]}
    - sources: [{model: a, layer_range: [2, 3]}]
    parameters: {weight: [{filter: ln_f, value: 2}, {filter: h.2, value: 4}], normalize: false}
parameters: {weight: 9, normalize: true}
""",
    )
    expected = {"h.0.mlp": (1, 0, 3, 1), "h.1.mlp": (1, 1, 3, 2)}
    expected |= {"h.0.attn": (1, 0, 5, 1), "h.1.attn": (1, 1, 7, 2)}
    for name, (entry, first, other, second) in expected.items():
        part = name.split(".")[2]
        mixed = entry * a[f"h.{first}.{part}"] + other * b[f"h.{second}.{part}"]
        torch.testing.assert_close(result[name], mixed)
    torch.testing.assert_close(result["wte.weight"], a["wte.weight"] + 9 * b["wte.weight"])
    torch.testing.assert_close(result["h.2.mlp"], 4 * a["h.2.mlp"])
    torch.testing.assert_close(result["ln_f.weight"], 2 * a["ln_f.weight"])


MODULES = """
merge_method: linear
modules:
  encoder:
    models:
    - {model: a, parameters: {weight: [1, 3]}}
    - {model: b}
    parameters: {weight: 2}
  decoder:
    models: [{model: c, parameters: {weight: 1}}, {model: a}]
  default:
    models: [{model: b}]
parameters: {weight: 5}
"""


def make_pair(folder: Path, layers: tuple[int, int], seed: int) -> dict:
    """A model of an encoder and a decoder with layers of their own."""
    state = make_model(folder, 0, seed)
    generator = torch.Generator().manual_seed(seed + 50)
    for stack, count in zip(("encoder", "decoder"), layers, strict=True):
        for layer in range(count):
            for part in ("mlp", "encoder"):  # the second is where a decoder reads an encoder
                name = f"model.{stack}.block.{layer}.{part}"
                state[name] = torch.randn(3, 2, generator=generator)
        state[f"model.{stack}.norm"] = torch.randn(3, generator=generator)
    save_file(state, folder / "model.safetensors")
    return state


def test_modules_are_merged_each_for_itself(tmp_path):
    a, b, c = (make_pair(tmp_path / n, (3, 2), s) for s, n in enumerate("abc"))
    result, _ = run(tmp_path, MODULES)
    for name, tensor in result.items():
        if "model.encoder" in name:  # a list is spread over the layers of the module
            weight = {"0": 1, "1": 2, "2": 3}.get(name.split(".")[-2], 1)
            expected = (weight * a[name] + 2 * b[name]) / (weight + 2)
        elif "model.decoder" in name:
            expected = (c[name] + 5 * a[name]) / 6
        else:
            expected = b[name]
        torch.testing.assert_close(tensor, expected, msg=name)
    assert result.keys() == a.keys()
    # A base that no module names takes part in all of them.
    text = MODULES.replace("linear", "task_arithmetic") + "base_model: d\n"
    d = make_pair(tmp_path / "d", (3, 2), 9)
    result, _ = run(tmp_path, text)
    for name in ("model.decoder.block.1.encoder", "model.decoder.norm"):
        expected = d[name] + (c[name] - d[name]) + 5 * (a[name] - d[name])
        torch.testing.assert_close(result[name], expected)
    torch.testing.assert_close(result["wte.weight"], d["wte.weight"] * -4 + b["wte.weight"] * 5)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("default", "wte", "modules: head.weight is in none of encoder, decoder, wte; a module"),
        ("decoder", "vision", "modules: vision has no tensor"),
        ("weight: [1, 3]", "wight: 1", "modules, encoder, a: linear has no parameter 'wight'"),
        ("linear", "slerp", "modules, encoder: slerp compares models with base_model"),
    ],
)
def test_modules_that_are_not_there(tmp_path, old, new, message):
    for seed, name in enumerate("abc"):
        make_pair(tmp_path / name, (1, 1), seed)
    with pytest.raises(UserError) as error:
        run(tmp_path, MODULES.replace(old, new))
    assert message in str(error.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{model: a, layer_range: [2, 5]}]", "layer_range [2, 5]: "),
        ("[{model: a, layer_range: [0, 1]}, {model: b, layer_range: [3, 4]}]", "not 2"),
    ],
)
def test_layers_that_are_not_there(tmp_path, text, message):
    make_model(tmp_path / "a", 3, 1), make_model(tmp_path / "b", 3, 2)
    with pytest.raises(UserError) as error:
        run(tmp_path, f"merge_method: passthrough\nslices: [{{sources: {text}}}]")
    assert message in str(error.value) and "merge.yml" in str(error.value)
    make_model(tmp_path / "c", 0, 1)
    with pytest.raises(UserError, match="c has no layers; slices are made of one stack"):
        run(tmp_path, f"{SLICED.replace('x', 'passthrough').replace('a,', 'c,')}[0, 1]}}]")
    linear = "merge_method: linear\nparameters: {weight: 1}\n"
    sources = "[{model: a, layer_range: [0, 1]}, {model: b, layer_range: [3, 4]}]"
    with pytest.raises(UserError, match=r"b has no h\.3\.\w+; it has 3 layers"):
        run(tmp_path, linear + f"slices: [{{sources: {sources}}}]")


def test_a_base_that_is_no_model_becomes_one(tmp_path):
    a, b = make_model(tmp_path / "a", 2, 1), make_model(tmp_path / "b", 2, 2)
    models = "models: [{model: a, parameters: {weight: 0.5}}]\nbase_model: b\n"
    result, _ = run(tmp_path, "merge_method: task_arithmetic\n" + models)
    torch.testing.assert_close(result["h.1.mlp"], (a["h.1.mlp"] + b["h.1.mlp"]) / 2)
    assert torch.equal(result["h.0.mask"], b["h.0.mask"])
    with pytest.raises(UserError, match="b: weight is missing for"):
        run(tmp_path, "merge_method: linear\n" + models)


def test_vocabularies_of_unequal_size(tmp_path):
    a, b = make_model(tmp_path / "a", 1, 1), make_model(tmp_path / "b", 1, 2, vocabulary=8)
    two = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    for extra in ("", "base_model: b\n"):
        result, config = run(tmp_path, "merge_method: linear\n" + two + extra)
        for name in ("wte.weight", "head.weight"):
            torch.testing.assert_close(result[name], (a[name] + b[name][:6]) / 2)
        assert config["vocab_size"] == 6
    result, config = run(tmp_path, "merge_method: task_arithmetic\nbase_model: a\n" + two)
    torch.testing.assert_close(result["wte.weight"], b["wte.weight"][:6])
    assert config["vocab_size"] == 6
    with pytest.raises(UserError, match=r"has 6 rows in .*a, fewer than the 8 of the base"):
        run(tmp_path, "merge_method: ties\nbase_model: b\n" + two)


def test_the_chat_template_of_most_models(tmp_path):
    make_model(tmp_path / "a", 1, 1, tokenizer_config__json='{"chat_template": "one"}')
    make_model(tmp_path / "b", 1, 2, chat_template__jinja="two")
    make_model(tmp_path / "c", 1, 3, tokenizer_config__json='{"chat_template": "two"}')
    models = ", ".join(f"{{model: {name}, parameters: {{weight: 1}}}}" for name in "abc")
    text = f"merge_method: linear\nmodels: [{models}]\n"
    for extra, message in (("", None), ("chat_template: auto", "two")):
        recipe = read_recipe(write(tmp_path, text + extra))
        merge(recipe, tmp_path / f"chat{message}")
        file = tmp_path / f"chat{message}" / "chat_template.jinja"
        assert (file.read_text() if file.exists() else None) == message
        assert (tmp_path / f"chat{message}" / "tokenizer_config.json").exists()
    merge(recipe, tmp_path / "bare", copy_tokenizer=False)
    assert not list((tmp_path / "bare").glob("*t*k*_config.json"))
    assert not (tmp_path / "bare" / "chat_template.jinja").exists()
